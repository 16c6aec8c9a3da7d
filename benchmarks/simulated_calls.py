"""What a DHT needs of the world in a simulation: its calls, which take simulated time, and a simulated clock.

hivemind's DHT is used as it is. `Calls` stands in for hivemind's `P2P` as far as the DHT uses that, and
`simulated_clock` for the clock that it asks for the time. A call takes one way there and one way back; one to
a peer that has vanished is never answered. Knows nothing of records.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import swarm.dht.kademlia  # noqa: F401, before hivemind

# isort: split

from hivemind.p2p import PeerID

from swarm.net.door import Door
from swarm.net.transport import PeerId
from swarm.net.virtual_time import VirtualTimeLoop

SILENCE = 3600.0
"""Seconds without an answer: longer than anybody waits."""

CLOCKS = (
    "time.time",
    "hivemind.utils.timed_storage.get_dht_time",
    "hivemind.dht.routing.get_dht_time",
    "hivemind.dht.protocol.get_dht_time",
    "hivemind.dht.node.get_dht_time",
)


@contextmanager
def simulated_clock(loop: VirtualTimeLoop) -> Iterator[None]:
    """Let the time of day be that of `loop` meanwhile, for all that this process asks."""
    with ExitStack() as stack:
        for name in CLOCKS:
            stack.enter_context(mock.patch(name, loop.now))
        stack.enter_context(mock.patch("time.monotonic", loop.time))
        yield


@dataclass
class Post:
    """All nodes of a DHT, `seconds` apart one way, and what they have sent: calls by name, and bytes."""

    seconds: Callable[[PeerId, PeerId], float]
    nodes: dict[PeerID, "Calls"] = field(default_factory=dict)
    networks: dict[bytes, str] = field(default_factory=dict)
    """The network that each peer is in, by binary peer ids: one of its own."""
    calls: Counter[str] = field(default_factory=Counter)
    bytes: int = 0


@dataclass(frozen=True)
class Context:
    """Who calls."""

    remote_id: PeerID


class Calls:
    """The calls of one node."""

    def __init__(self, post: Post, peer: PeerId):
        self.peer_id = PeerID.from_base58(peer)
        self._peer = peer
        self._post = post
        self._handlers: dict[str, tuple[Callable[..., Awaitable[Any]], Any]] = {}
        post.nodes[self.peer_id] = self
        post.networks[self.peer_id.to_bytes()] = peer

    @property
    def networks(self) -> dict[bytes, str]:
        return self._post.networks

    def vanish(self) -> None:
        """Answer nobody any more, and reach nobody."""
        self._post.nodes.pop(self.peer_id, None)

    async def add_protobuf_handler(
        self, name: str, handler: Callable[..., Awaitable[Any]], input_type: Any, **how: Any
    ) -> None:
        self._handlers[name] = handler, input_type

    async def remove_protobuf_handler(self, name: str, **how: Any) -> None:
        self._handlers.pop(name, None)

    async def call_protobuf_handler(self, peer: PeerID, name: str, message: Any, output_type: Any) -> Any:
        data = message.SerializeToString()
        self._post.calls[name] += 1
        self._post.bytes += len(data)
        way = self._post.seconds(self._peer, PeerId(peer.to_base58()))
        await asyncio.sleep(way)
        node = self._post.nodes.get(peer)
        if node is None or self.peer_id not in self._post.nodes:
            await asyncio.sleep(SILENCE)
            raise ConnectionError("nobody answers")
        handler, input_type = node._handlers[name]
        answer = (await handler(input_type.FromString(data), Context(self.peer_id))).SerializeToString()
        self._post.bytes += len(answer)
        await asyncio.sleep(way)
        return output_type.FromString(answer)


@dataclass(frozen=True)
class Access:
    """A peer's way into the DHT: what a `KademliaStore` takes of its transport."""

    peer: PeerId
    p2p: Calls
    door: Door = field(default_factory=Door)

    async def networks(self) -> dict[bytes, str]:
        return self.p2p.networks

    async def known_addresses(self, peer: PeerId) -> list[str]:
        return [address_of(peer)]


def address_of(peer: PeerId) -> str:
    """An address that says who the peer is; where it is does not matter here."""
    return f"/ip4/192.0.2.1/tcp/4001/p2p/{peer}"
