"""Joining a swarm: an identity, the network, and the records of the swarm.

Owns the order in which these start and close, that a peer which was there before finds back when those it was
to join by are gone, and that one whom nobody reaches starts again behind relays. The heavy libraries behind
them are imported off the event loop, when needed. Knows nothing of models, nor what its caller wants in the
swarm.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from swarm.dht.outside import looking_from_outside
from swarm.dht.reaching import (
    Listening,
    listening_of_client,
    look_back,
    outer_address,
    relaying_of,
    relays_among,
    say_hidden,
)
from swarm.dht.store import RecordStore, StoreUnreachable
from swarm.errors import InputError, SwarmError
from swarm.importing import imported
from swarm.net.addresses import outward
from swarm.net.entrance import Entrance
from swarm.net.identity import Identity
from swarm.net.peer_memory import MAX_PEERS, PeerMemory
from swarm.net.reachability import listening_port, own_addresses
from swarm.net.relaying import Relaying
from swarm.net.transport import PeerUnreachable, Transport

logger = logging.getLogger(__name__)

REMEMBER_PERIOD = 60.0
"""Seconds between two notes of who is there."""


@dataclass(frozen=True)
class Network:
    """One peer's access to the swarm: who it is, a way to its peers, and to what they announce.

    `is_new` is true of a swarm that this peer has begun.
    """

    identity: Identity
    transport: Transport
    store: RecordStore
    is_new: bool = False


async def join(
    stack: AsyncExitStack,
    entrance: Entrance,
    identity: Identity | Path | str | None = None,
    listening: Listening | None = None,
) -> Network:
    """Start the network of a peer; `stack` closes it.

    Unless it is `listening` it serves nothing, and cannot be reached. Where nobody answers whom it is to join
    by, it joins by those it remembers; if it remembers nobody either, and was to join by nobody, one that
    listens begins a new swarm.

    Raises:
        InputError: there is no address to join by, or one that cannot be used, or the key is not the swarm's.
        SwarmError: nobody can be reached.
    """
    who = identity if isinstance(identity, Identity) else await asyncio.to_thread(_identify, identity)
    remembered = await _remembered(entrance, who)
    if listening is None and not remembered and not entrance.addresses:
        raise _no_peer()
    if not remembered:
        return await _start(stack, entrance, entrance.addresses, who, listening)
    try:
        if entrance.addresses:
            return await _start(stack, entrance, entrance.addresses, who, listening)
        silent = _nobody_answers()
    except (PeerUnreachable, StoreUnreachable) as error:
        silent = error
    try:
        network = await _start(stack, entrance, (*entrance.addresses, *remembered), who, listening)
    except (PeerUnreachable, StoreUnreachable):
        if entrance.addresses or listening is None:
            raise silent from None
        logger.warning("%s This peer begins the swarm anew.", silent.message)
        return await _start(stack, entrance, (), who, listening)
    logger.warning("Joined by peers that were remembered, since no initial peer answers.")
    return network


def _nobody_answers() -> SwarmError:
    return PeerUnreachable(
        "Nobody answers at the addresses remembered of this swarm.",
        "Give the address of a peer that is there: --initial-peers ADDRESS.",
    )


async def _remembered(entrance: Entrance, own: Identity) -> list[str]:
    """The addresses of the peers remembered of a swarm."""
    if entrance.memory is None:
        return []
    found = await asyncio.to_thread(entrance.memory.recall, time.time())
    return [address for one in found if one.peer != own.peer for address in one.addresses]


async def _start(
    stack: AsyncExitStack,
    entrance: Entrance,
    addresses: Sequence[str],
    who: Identity,
    listening: Listening | None,
) -> Network:
    async with AsyncExitStack() as starting:
        ips = await asyncio.to_thread(own_addresses)
        relaying = relaying_of(addresses, listening, sorted(ips))
        network = await _enter(starting, entrance, addresses, who, listening, relaying)
        if listening is not None:
            better = await _better(network, addresses, listening)
            if better is not None:
                await starting.aclose()
                listening, relaying = better
                network = await _enter(starting, entrance, addresses, who, listening, relaying)
        if relaying.through or (listening is None and relaying.uses):
            looking = looking_from_outside(network.transport, network.store, addresses)
            await starting.enter_async_context(looking)
        if entrance.memory is not None:
            await starting.enter_async_context(_remembering(entrance.memory, network.store))
        stack.push_async_exit(starting.pop_all())
    return network


async def _better(
    network: Network, addresses: Sequence[str], listening: Listening
) -> tuple[Listening, Relaying] | None:
    """How a peer is to start again so that others reach it; None if that is not needed, or of no use."""
    transport = network.transport
    said = await look_back(transport, addresses)
    if said is None:
        return None
    own = await transport.addresses()
    port = listening_port(own)
    if said.is_reached:
        outer = outer_address(said, own, port or 0)
        if outer is None or listening.announce_maddrs:
            return None
        told = (outer, *(address.rpartition("/p2p/")[0] for address in outward(own)))
        listens = tuple(address.replace("/tcp/0", f"/tcp/{port}") for address in listening.host_maddrs)
        known = replace(listening, host_maddrs=listens, announce_maddrs=told)
        return known, relaying_of(addresses, known, ())
    relays: list[str] = []
    if listening.relays is None and not listening.announce_maddrs:
        relays = await relays_among(transport, network.store, addresses)
    say_hidden(listening, port, relays)
    return (listening, Relaying(uses=True, through=tuple(relays))) if relays else None


async def _enter(
    stack: AsyncExitStack,
    entrance: Entrance,
    addresses: Sequence[str],
    who: Identity,
    listening: Listening | None,
    relaying: Relaying,
) -> Network:
    libp2p, kademlia = await import_network()
    place = listening or listening_of_client(relaying)
    transport = await libp2p.Libp2pTransport.start(
        who,
        addresses,
        place.host_maddrs,
        place.announce_maddrs,
        routes_for_others=listening is not None,
        relaying=relaying,
        shortcut_port=place.shortcut_port,
        door=entrance.door,
    )
    stack.push_async_callback(transport.close)
    store = await kademlia.KademliaStore.start(transport, addresses, client_mode=listening is None)
    stack.push_async_callback(store.close)
    return Network(who, transport, store, is_new=not addresses)


@asynccontextmanager
async def _remembering(memory: PeerMemory, store: RecordStore) -> AsyncIterator[None]:
    """Note who is in the swarm, now and every `REMEMBER_PERIOD`."""
    task = asyncio.create_task(_remember_forever(memory, store), name="remember peers")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _remember_forever(memory: PeerMemory, store: RecordStore) -> None:
    while True:
        try:
            if addresses := await store.neighbours(MAX_PEERS):
                await asyncio.to_thread(memory.remember, addresses, time.time())
        except (SwarmError, OSError) as error:
            logger.info("the peers that are there cannot be remembered: %s", error)
        await asyncio.sleep(REMEMBER_PERIOD)


def _identify(path: Path | str | None) -> Identity:
    return Identity.generate() if path is None else Identity.load_or_create(path)


def require_peers(entrance: Entrance) -> None:
    """
    Raises:
        InputError: there is neither an address to join by, nor a key by which some may be remembered.
    """
    if not entrance.swarm:
        raise _no_peer()


def _no_peer() -> InputError:
    return InputError(
        "There is no peer to join by.",
        "Give the address that a server prints: --initial-peers ADDRESS, or SWARM_INITIAL_PEERS.",
    )


async def import_network() -> tuple[Any, Any]:
    """The modules of the network and of the DHT, off the event loop: they take a moment."""
    libp2p = await imported("swarm.net.libp2p")
    kademlia = await imported("swarm.dht.kademlia")
    return libp2p, kademlia
