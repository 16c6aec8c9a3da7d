"""Joining a swarm as a client: everything `connect` starts, in order, and closes again in reverse.

Loads the model's ends while the network comes up, since both take seconds. The heavy rooms are imported
off the event loop, when they are needed.
"""

import asyncio
import importlib
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swarm.client.concurrently import concurrently
from swarm.dht.store import RecordStore
from swarm.errors import InputError
from swarm.net.identity import Identity
from swarm.net.transport import Transport

if TYPE_CHECKING:
    from swarm.blocks.head import Head
    from swarm.blocks.models import Model

OnProgress = Callable[[str, float], None]
"""Called, from any thread, with the stage that finding and loading the model is in, and its done fraction."""


@dataclass(frozen=True)
class Network:
    """This client's access to the swarm: who it is, a way to its peers, and to what they announce."""

    identity: Identity
    transport: Transport
    store: RecordStore


async def join(
    stack: AsyncExitStack, initial_peers: Sequence[str], identity: Path | str | None = None
) -> Network:
    """Start the network of a client that serves nothing; `stack` closes it.

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


async def load_ends(name: str, dtype: str, on_progress: OnProgress | None) -> "tuple[Model, Head]":
    """Find the model and load its tokenizer, embeddings and head, off the event loop.

    Raises:
        InputError: the model cannot be found, or its files cannot be used.
    """
    models = await _imported("swarm.blocks.models")
    model = await asyncio.to_thread(partial(models.resolve, name, on_progress=on_progress))
    if on_progress is not None:
        await asyncio.to_thread(model.ensure_files, None, True, on_progress)
    heads = await _imported("swarm.blocks.head")
    return model, await asyncio.to_thread(heads.Head.load, model, dtype)


async def join_with_model(
    stack: AsyncExitStack,
    initial_peers: Sequence[str],
    name: str,
    *,
    identity: Path | str | None = None,
    dtype: str = "auto",
    on_progress: OnProgress | None = None,
) -> "tuple[Network, Model, Head]":
    """`join` and `load_ends` at the same time."""
    work: list[Coroutine[Any, Any, Any]] = [
        join(stack, initial_peers, identity),
        load_ends(name, dtype, on_progress),
    ]
    network, (model, head) = await concurrently(*work)
    return network, model, head


async def _imported(module: str) -> Any:
    return await asyncio.to_thread(importlib.import_module, module)
