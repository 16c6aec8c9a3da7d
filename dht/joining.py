"""Joining a swarm as one who serves nothing: an identity, the network, and the records of the swarm.

Owns the order in which these start and close. The heavy libraries behind them are imported off the event
loop, when they are needed. Knows nothing of models, nor what its caller wants in the swarm.
"""

import asyncio
import importlib
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swarm.dht.store import RecordStore
from swarm.errors import InputError
from swarm.net.identity import Identity
from swarm.net.transport import Transport


@dataclass(frozen=True)
class Network:
    """One peer's access to the swarm: who it is, a way to its peers, and to what they announce."""

    identity: Identity
    transport: Transport
    store: RecordStore


async def join(
    stack: AsyncExitStack, initial_peers: Sequence[str], identity: Path | str | None = None
) -> Network:
    """Start the network of a peer that serves nothing; `stack` closes it.

    Raises:
        InputError: there is no address to join by, or one that cannot be used.
        SwarmError: none of the initial peers can be reached.
    """
    require_peers(initial_peers)
    libp2p = await _imported("swarm.net.libp2p")
    kademlia = await _imported("swarm.dht.kademlia")
    who = (
        Identity.generate()
        if identity is None
        else await asyncio.to_thread(Identity.load_or_create, identity)
    )
    transport = await libp2p.Libp2pTransport.start(
        who, initial_peers=initial_peers, host_maddrs=(), routes_for_others=False
    )
    stack.push_async_callback(transport.close)
    store = await kademlia.KademliaStore.start(transport, initial_peers, client_mode=True)
    stack.push_async_callback(store.close)
    return Network(who, transport, store)


def require_peers(initial_peers: Sequence[str]) -> None:
    """
    Raises:
        InputError: there is none.
    """
    if not initial_peers:
        raise InputError(
            "There is no peer to join by.",
            "Give the address that a server prints: --initial-peers ADDRESS, or SWARM_INITIAL_PEERS.",
        )


async def _imported(module: str) -> Any:
    return await asyncio.to_thread(importlib.import_module, module)
