"""A network inside one process: the same `Transport` with settable latency, bandwidth, loss and partitions.

It runs on the event loop's clock and draws from seeded generators, so on a virtual clock a run repeats
itself exactly. It keeps the rules of the real network: the same limits, bounded buffers, ordered streams
that deliver everything or break. How time passes on a wire is `wire`'s; what peers say is not known here.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import combinations, product
from types import TracebackType
from typing import Self, TypeAlias

from swarm.net.door import Door
from swarm.net.framing import check_sendable
from swarm.net.identity import Identity, is_peer_id
from swarm.net.inbound import Inbound
from swarm.net.transport import (
    CONNECT_TIMEOUT,
    MAX_BODY_BYTES,
    Buffer,
    FrameError,
    OnStream,
    PeerId,
    PeerUnreachable,
    StreamClosed,
    Takes,
    TransportError,
)
from swarm.net.wire import Link, Pipe, Wire

Who: TypeAlias = str | Identity
"""A peer: its identity, its peer id, or a name that stands for an identity made from it."""


class MemoryNetwork:
    """All peers of one in-process swarm and the wires between them.

    A wire is as `link_of` says of its two ends, or as `default_link` if there is none.
    """

    def __init__(
        self,
        seed: int = 0,
        default_link: Link | None = None,
        link_of: Callable[[PeerId, PeerId], Link] | None = None,
    ):
        self.default_link = default_link or Link()
        self.places: dict[PeerId, str] = {}
        """Where others see a peer's connections come from, as multiaddrs; for tests to set."""
        self.relays: dict[PeerId, int] = {}
        """How many bytes a connection may carry that a peer relays; for tests to set."""
        self._seed = seed
        self._link_of = link_of
        self._named: dict[str, Identity] = {}
        self._transports: dict[PeerId, MemoryTransport] = {}
        self._wires: dict[tuple[PeerId, PeerId], Wire] = {}

    def transport(self, who: Who, door: Door | None = None) -> "MemoryTransport":
        """A new peer's access to this network. A peer that closed or was killed may come back.

        Who may come in at its `door` may open streams to it; by default all may.

        Raises:
            ValueError: that peer is in this network already, or only its peer id is given.
        """
        identity = who if isinstance(who, Identity) else self._identity(who)
        if identity.peer in self._transports:
            raise ValueError(f"peer {identity.peer} is in this network already")
        self._transports[identity.peer] = transport = MemoryTransport(self, identity, door or Door())
        return transport

    def peer(self, who: Who) -> PeerId:
        """The peer id that `who` means."""
        if isinstance(who, Identity):
            return who.peer
        return PeerId(who) if is_peer_id(who) else self._identity(who).peer

    def set_link(
        self,
        a: Who,
        b: Who,
        *,
        latency: float | None = None,
        bandwidth: float | None = None,
        loss: float | None = None,
    ) -> None:
        """Change both directions between `a` and `b` for frames sent from now on. None leaves a value.

        `latency` is in seconds one way, `bandwidth` in bytes a second, `loss` a probability.
        """
        given = {"latency": latency, "bandwidth": bandwidth, "loss": loss}
        changes = {name: value for name, value in given.items() if value is not None}
        for wire in self.wires(self.peer(a), self.peer(b)):
            wire.link = replace(wire.link, **changes)

    def partition(self, *sides: Iterable[Who]) -> None:
        """Cut every wire between peers of different sides, in addition to what is cut already."""
        groups = [[self.peer(who) for who in side] for side in sides]
        for one, other in combinations(groups, 2):
            for a, b in product(one, other):
                for wire in self.wires(a, b):
                    wire.cut()

    def heal(self) -> None:
        """Mend all that is cut; what was stalled arrives one latency later."""
        for wire in self._wires.values():
            wire.mend()

    def kill(self, who: Who) -> None:
        """End a peer as a crash would: its streams end at both sides, its own calls fail from now on.

        Raises:
            KeyError: it is not in this network.
        """
        transport = self._transports[self.peer(who)]
        transport.fail(TransportError(f"Peer {transport.peer} was killed."))

    def wires(self, a: PeerId, b: PeerId) -> tuple[Wire, Wire]:
        """From `a` to `b`, and back."""
        return self._wire(a, b), self._wire(b, a)

    async def reach(self, source: PeerId, target: PeerId, door: Door) -> "MemoryTransport":
        """Go to `target` and back, which takes one round trip.

        Raises:
            PeerUnreachable: nobody listens there or speaks as the source's `door` has it, or nothing came
                back within `CONNECT_TIMEOUT`.
        """
        wires = self.wires(source, target)
        round_trip = sum(wire.link.latency for wire in wires)
        is_too_slow = round_trip > CONNECT_TIMEOUT or any(wire.is_cut for wire in wires)
        await asyncio.sleep(CONNECT_TIMEOUT if is_too_slow else round_trip)
        transport = self._transports.get(target)
        is_lost = is_too_slow or any(wire.is_cut for wire in wires)
        if is_lost or transport is None or not transport.is_listening or target == source:
            raise PeerUnreachable(f"Peer {target} cannot be reached.", "It may have left.")
        if transport.door.protocol != door.protocol:
            raise PeerUnreachable(
                f"Peer {target} does not speak {door.protocol}.", "It may be in another swarm."
            )
        return transport

    def leave(self, peer: PeerId) -> None:
        self._transports.pop(peer, None)

    def _wire(self, source: PeerId, target: PeerId) -> Wire:
        if (source, target) not in self._wires:
            link = self._link_of(source, target) if self._link_of else self.default_link
            self._wires[source, target] = Wire(link, f"{self._seed} {source} {target}")
        return self._wires[source, target]

    def _identity(self, name: str) -> Identity:
        if is_peer_id(name):
            raise ValueError("to enter the network a peer needs its identity or a name")
        if name not in self._named:
            self._named[name] = Identity.from_seed(f"memory network: {name}")
        return self._named[name]


class MemoryStream:
    """One end of a stream. Implements `Stream`."""

    def __init__(self, owner: "MemoryTransport", peer: PeerId, wire: Wire, outgoing: Pipe, incoming: Pipe):
        self.peer = peer
        self._owner = owner
        self._wire = wire
        self._outgoing = outgoing
        self._incoming = incoming
        self._sending = asyncio.Lock()
        owner.streams[self] = None

    def offer(self, header: Buffer, body: Buffer = b"") -> bool:
        return False  # each frame takes its turn on the wire

    async def send(self, header: Buffer, body: Buffer = b"") -> None:
        check_sendable(header, body)
        try:
            async with self._sending:
                await self._outgoing.put(bytes(header), bytes(body))
        except StreamClosed:
            self.close()
            raise

    async def receive(
        self, max_body: int = MAX_BODY_BYTES, takes: Takes | None = None
    ) -> tuple[bytes, memoryview]:
        while True:
            try:
                header, body = await self._incoming.get(max_body)
            except (StreamClosed, FrameError):
                self.close()
                raise
            if takes is None or not takes(header, body):
                return header, body

    def close(self) -> None:
        """End both directions here at once, and at the other end when the news has come there."""
        news_at = self._wire.news_at(asyncio.get_running_loop().time())
        self._outgoing.end(news_at)
        self._incoming.leave(news_at)
        self._owner.streams.pop(self, None)


class MemoryTransport:
    """One peer in a `MemoryNetwork`. Implements `Transport`."""

    def __init__(self, network: MemoryNetwork, identity: Identity, door: Door):
        self.identity = identity
        self.peer = identity.peer
        self.door = door
        self.streams: dict[MemoryStream, None] = {}
        self._network = network
        self._inbound: Inbound | None = None
        self._failure: TransportError | None = None
        self._has_failed = asyncio.Event()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def is_listening(self) -> bool:
        return self._inbound is not None

    def clock(self) -> float:
        return asyncio.get_running_loop().time()

    async def addresses(self) -> list[str]:
        return [f"/memory/1/p2p/{self.peer}"]

    async def seen_at(self, peer: PeerId) -> str:
        self._check_usable()
        return self._network.places.get(peer, "")

    async def be_seen_at(self, outer: str) -> None:
        self._check_usable()
        self._network.places[self.peer] = outer

    async def bytes_relayed_by(self, peer: PeerId) -> int:
        self._check_usable()
        return self._network.relays.get(peer, 0)

    async def listen(self, on_stream: OnStream) -> None:
        self._check_usable()
        before, self._inbound = self._inbound, Inbound(on_stream, self.door, self.peer)
        self.door.watch(self.streams)
        if before is not None:
            await before.close()

    async def open_stream(self, peer: PeerId, addresses: Sequence[str] = ()) -> MemoryStream:
        self._check_usable()
        self.door.check(peer)
        target = await self._network.reach(self.peer, peer, self.door)
        self._check_usable()
        stream = target.accept(self)
        self.door.watch(self.streams)
        await self.door.call_enter(stream, self.peer)
        return stream

    def accept(self, source: "MemoryTransport") -> MemoryStream:
        """Join `source` to this peer by a stream, and return the end that is `source`'s."""
        assert self._inbound is not None, "only a listening peer can be reached"
        there, back = self._network.wires(source.peer, self.peer)
        outgoing, incoming = Pipe(there), Pipe(back)
        self._inbound.accept(MemoryStream(self, source.peer, back, incoming, outgoing))
        return MemoryStream(source, self.peer, there, outgoing, incoming)

    async def wait_failed(self) -> TransportError:
        await self._has_failed.wait()
        assert self._failure is not None
        return self._failure

    def fail(self, reason: TransportError) -> None:
        """Leave the network at once and for good, with a reason."""
        self._failure = reason
        self._has_failed.set()
        self._leave()

    async def close(self) -> None:
        inbound = self._inbound
        self._leave()
        await self.door.close()
        self._failure = self._failure or TransportError("This peer has left the network.")
        if inbound is not None:
            await inbound.close()

    def _leave(self) -> None:
        self._network.leave(self.peer)
        for stream in list(self.streams):
            stream.close()
        if self._inbound is not None:
            self._inbound.cancel()

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise self._failure
