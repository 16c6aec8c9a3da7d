"""A server's way into its swarm: who it is, its key and lists, and its network, joined or begun anew."""

import asyncio
from contextlib import AsyncExitStack

from swarm.dht.joining import Network, join
from swarm.dht.reaching import Listening
from swarm.errors import SwarmError
from swarm.net.entrance import Entrance, entrance
from swarm.net.identity import Identity
from swarm.server.config import ServerConfig


async def way_in(config: ServerConfig) -> tuple[Identity, Entrance]:
    """
    Raises:
        InputError: a file that the options name cannot be used, or an address or an invitation.
    """
    return await asyncio.to_thread(_read, config)


def _read(config: ServerConfig) -> tuple[Identity, Entrance]:
    found = entrance(
        config.initial_peers,
        config.swarm_key,
        config.allow_peers,
        config.block_peers,
        remembers=config.remembers,
    )
    identity = Identity.generate() if config.identity is None else Identity.load_or_create(config.identity)
    return identity, found


async def enter(
    stack: AsyncExitStack, config: ServerConfig, identity: Identity, entrance: Entrance
) -> Network:
    """Join the swarm, or begin one; `stack` leaves it.

    Raises:
        InputError: an address cannot be used, or the key is not that of the swarm.
        SwarmError: the swarm was not reached in time, or the network cannot be started.
    """
    try:
        async with asyncio.timeout(config.timeout):
            listening = Listening(
                config.host_maddrs, config.announce_maddrs, config.relays, config.shortcut_port
            )
            return await join(stack, entrance, identity, listening)
    except TimeoutError as error:
        raise SwarmError(
            f"The swarm was not reached within {config.timeout:g} seconds.",
            "Check the initial peers, or give more time with --timeout.",
        ) from error
