"""What every network must offer: authenticated peers and ordered, framed streams between them.

Two implementations exist: `libp2p` over hivemind's daemon, and `memory` inside one process for tests
and simulation. A frame is a short header (a packed message) and a body (raw tensor bytes); what they
mean is not known here.
"""

from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import NewType, Protocol, Self, TypeAlias

from swarm.errors import SwarmError

PeerId = NewType("PeerId", str)
"""The base58 text of a libp2p peer id. An Ed25519 peer id contains its public key."""

Buffer: TypeAlias = bytes | bytearray | memoryview

PROTOCOL = "/swarm/inference/1.0.0"
PRIVATE_PROTOCOL = "/swarm/private/1.0.0"
"""The same after both ends have proven that they have the swarm's key. A private swarm speaks no other."""

MAX_HEADER_BYTES = 64 * 1024
MAX_BODY_BYTES = 256 * 1024 * 1024


class TransportError(SwarmError):
    """This peer's own network failed: the daemon died, a port is in use, an address cannot be used."""


class PeerUnreachable(SwarmError):
    """No connection to the peer could be made."""


class OtherPeer(PeerUnreachable):
    """At the peer's addresses another one answers, `found` if it could be told."""

    def __init__(self, message: str, hint: str, found: str):
        super().__init__(message, hint)
        self.found = found


class OtherProtocol(PeerUnreachable):
    """The peer is there, and does not speak `PROTOCOL`."""


class NotAdmitted(PeerUnreachable):
    """There is no going to the peer, or no coming in for it: it lacks the swarm's key, or lists forbid it."""


class StreamClosed(SwarmError):
    """The stream ended: the peer closed it, left, or the connection broke."""


class FrameError(SwarmError):
    """The peer broke a framing rule; the stream is closed and nothing else is touched."""


class Stream(Protocol):
    """An ordered, two-way stream of frames to one authenticated peer."""

    peer: PeerId

    async def send(self, header: Buffer, body: Buffer = b"") -> None:
        """Send one frame, waiting while the peer is slow to read. The body must not change afterwards.

        Raises:
            StreamClosed: the stream has ended.
            ValueError: the frame is larger than any peer would take.
        """
        ...

    def offer(self, header: Buffer, body: Buffer = b"") -> bool:
        """Send one frame at once if nothing is in its way, and tell whether that was done.

        It saves small frames a task and a deadline. Where it was not done, `send` does it, or tells why not.
        """
        ...

    async def receive(
        self, max_body: int = MAX_BODY_BYTES, takes: "Takes | None" = None
    ) -> tuple[bytes, memoryview]:
        """The next frame: header and body. Lengths are checked before anything is allocated.

        Each is first shown to `takes`, as soon as it has come: those that it takes are not returned, and what
        it raises is raised here.

        Raises:
            StreamClosed: the stream has ended.
            FrameError: the frame is malformed or larger than allowed; the stream is closed.
        """
        ...

    def close(self) -> None:
        """End both directions at once; what was sent before still arrives. Safe to call again."""
        ...


Takes: TypeAlias = Callable[[bytes, memoryview], bool]
"""Is shown a frame, header and body, and tells whether it has taken it."""

OnStream: TypeAlias = Callable[[Stream], Awaitable[None]]


class Transport(Protocol):
    """One peer's access to the network. An async context manager: leaving it closes everything."""

    peer: PeerId

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def clock(self) -> float:
        """Seconds from some moment on, fine enough for this network's round trips.

        An event loop's own clock may be as coarse as a millisecond; a virtual network has a virtual clock.
        """
        ...

    async def addresses(self) -> list[str]:
        """Multiaddrs, each ending in `/p2p/PEER`, at which others may reach this peer."""
        ...

    async def seen_at(self, peer: PeerId) -> str:
        """The multiaddr from which this peer's connection with `peer` comes; empty if there is none.

        Raises:
            TransportError: this peer's own network has failed or was closed.
        """
        ...

    async def be_seen_at(self, outer: str) -> None:
        """Know that the internet sees this peer at the multiaddr `outer`.

        That is what straight connections with others behind routers need, in place of relayed ones.

        Raises:
            TransportError: this peer's own network has failed or was closed.
        """
        ...

    async def bytes_relayed_by(self, peer: PeerId) -> int:
        """How many bytes each connection may carry that `peer`, to whom there is one, relays to this peer.

        0 if it relays none.

        Raises:
            TransportError: this peer's own network has failed or was closed.
        """
        ...

    async def listen(self, on_stream: OnStream) -> None:
        """Call `on_stream` in a task of its own for each stream opened to this peer.

        The stream is closed when `on_stream` returns or raises. Called again, it takes the place of the one
        before, whose streams are ended.
        """
        ...

    async def open_stream(self, peer: PeerId, addresses: Sequence[str] = ()) -> Stream:
        """Open a stream to `peer`, dialling `addresses` if there is no connection yet.

        Raises:
            PeerUnreachable: within `CONNECT_TIMEOUT` seconds no stream could be opened.
            NotAdmitted: the peer has not this swarm's key, or this peer's lists forbid it.
            TransportError: this peer's own network has failed or was closed.
        """
        ...

    async def wait_failed(self) -> TransportError:
        """Return only when this peer's own network has failed for good, with the reason."""
        ...

    async def close(self) -> None:
        """Close all streams and stop. Safe to call again."""
        ...


CONNECT_TIMEOUT = 10.0
"""Seconds within which a stream must be open."""
