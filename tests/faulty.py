"""A network that fails: frames lost, late, doubled or torn, peers that hang, die and come back, cut wires.

Stands between peers and the in-process network. What happens is told by rules or drawn from one generator,
so that a run repeats itself with its seed, and is written into a log for whoever reads of a failure. Faults
strike where a frame arrives, stream by stream: the order of one stream's frames stays, that across streams
does not.
"""

import asyncio
import random
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self, TypeAlias

from swarm.net import messages
from swarm.net.transport import (
    MAX_BODY_BYTES,
    Buffer,
    FrameError,
    OnStream,
    PeerId,
    Stream,
    StreamClosed,
    Takes,
    Transport,
    TransportError,
)

Act: TypeAlias = Literal["lose", "delay", "repeat", "cut", "garble", "close"]
"""A frame never comes; comes late, with all behind it; comes twice; ends the stream instead of coming; comes
by half; is the stream's last."""

Struck: TypeAlias = tuple[Act, float]
"""What is done to a frame, and for how many seconds it is held up."""

Kind: TypeAlias = type[messages.Message]

ACTS: tuple[Act, ...] = ("lose", "delay", "repeat", "cut", "garble", "close")


@dataclass
class Rule:
    """Does `act` to frames of type `kind` between these peers: to the first `times` after `skip` others.

    `seconds` is how late they come. What is None may be any.
    """

    act: Act
    kind: Kind | None = None
    source: PeerId | None = None
    target: PeerId | None = None
    skip: int = 0
    times: int = 1
    seconds: float = 1.0

    def strikes(self, kind: Kind | None, source: PeerId, target: PeerId) -> bool:
        """Whether it is this frame's turn; counts it if it is of those meant."""
        fits = self.kind in (None, kind) and self.source in (None, source) and self.target in (None, target)
        if not fits or not self.times:
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.times -= 1
        return True


@dataclass(frozen=True)
class Odds:
    """How likely each act is for a frame, and within how many seconds late ones come."""

    lose: float = 0.0
    delay: float = 0.0
    repeat: float = 0.0
    cut: float = 0.0
    garble: float = 0.0
    close: float = 0.0
    seconds: float = 2.0


@dataclass
class Faults:
    """What goes wrong in one run. `names` are the peers' in the log; `hung` ones are not heard any more.

    `seen` counts the frames by their type, struck or not. Chance ends once `is_calm`.
    """

    seed: int
    rules: Sequence[Rule] = ()
    odds: Odds = Odds()
    names: dict[PeerId, str] = field(default_factory=dict)
    hung: set[PeerId] = field(default_factory=set)
    seen: Counter[str] = field(default_factory=Counter)
    log: list[str] = field(default_factory=list)
    is_calm: bool = False

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)

    @property
    def latest(self) -> float:
        """How many seconds late a frame may come, and what is behind it, the end of its stream included."""
        late = [rule.seconds for rule in self.rules if rule.act == "delay"]
        return max([*late, self.odds.seconds if self.odds.delay else 0.0])

    def wrap(self, transport: Transport) -> "FaultyTransport":
        return FaultyTransport(transport, self)

    def note(self, what: str) -> None:
        self.log.append(f"{asyncio.get_running_loop().time():8.3f} {what}")

    def strike(self, kind: Kind | None, source: PeerId, target: PeerId) -> tuple[Act, float] | None:
        """What is to be done to this frame; None where nothing is."""
        named = kind.__name__ if kind else "nonsense"
        self.seen[named] += 1
        struck: Struck | None = ("lose", 0.0)
        if source not in self.hung:
            struck = self._told(kind, source, target) or self._drawn()
        if struck is not None:
            late = f" by {struck[1]:.3f} s" if struck[1] else ""
            self.note(f"{struck[0]} {named} {self._name(source)} -> {self._name(target)}{late}")
        return struck

    def _told(self, kind: Kind | None, source: PeerId, target: PeerId) -> Struck | None:
        struck = [rule for rule in self.rules if rule.strikes(kind, source, target)]
        if not struck:
            return None
        return struck[0].act, struck[0].seconds if struck[0].act == "delay" else 0.0

    def _drawn(self) -> Struck | None:
        chance = self.rng.random()
        if self.is_calm:
            return None
        for act in ACTS:
            chance -= getattr(self.odds, act)
            if chance < 0:
                return act, self.rng.uniform(0, self.odds.seconds) if act == "delay" else 0.0
        return None

    def _name(self, peer: PeerId) -> str:
        return self.names.get(peer, peer[-6:])


class FaultyTransport:
    """A peer's access to the network, with faults in what arrives. Implements `Transport`."""

    def __init__(self, transport: Transport, faults: Faults):
        self.peer = transport.peer
        self._transport = transport
        self._faults = faults

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def clock(self) -> float:
        return self._transport.clock()

    async def addresses(self) -> list[str]:
        return await self._transport.addresses()

    async def listen(self, on_stream: OnStream) -> None:
        async def on_faulty(stream: Stream) -> None:
            await on_stream(FaultyStream(stream, self.peer, self._faults))

        await self._transport.listen(on_faulty)

    async def open_stream(self, peer: PeerId, addresses: Sequence[str] = ()) -> "FaultyStream":
        return FaultyStream(await self._transport.open_stream(peer, addresses), self.peer, self._faults)

    async def wait_failed(self) -> TransportError:
        return await self._transport.wait_failed()

    async def close(self) -> None:
        await self._transport.close()


class FaultyStream:
    """The end of a stream that belongs to `owner`. Implements `Stream`."""

    def __init__(self, stream: Stream, owner: PeerId, faults: Faults):
        self.peer = stream.peer
        self._stream = stream
        self._owner = owner
        self._faults = faults
        self._coming: deque[tuple[float, bytes, memoryview]] = deque()
        self._has_closed = asyncio.Event()

    def offer(self, header: Buffer, body: Buffer = b"") -> bool:
        return self._stream.offer(header, body)

    async def send(self, header: Buffer, body: Buffer = b"") -> None:
        await self._stream.send(header, body)

    async def receive(
        self, max_body: int = MAX_BODY_BYTES, takes: Takes | None = None
    ) -> tuple[bytes, memoryview]:
        while True:
            header, body = await self._receive(max_body)
            if takes is None or not takes(header, body):
                return header, body

    async def _receive(self, max_body: int) -> tuple[bytes, memoryview]:
        while not self._coming:
            self._strike(*await self._stream.receive(max_body))
        due, header, body = self._coming[0]
        if due > asyncio.get_running_loop().time():
            await self._wait(due)
        self._coming.popleft()
        return header, body

    def close(self) -> None:
        self._has_closed.set()
        self._stream.close()

    def _strike(self, header: bytes, body: memoryview) -> None:
        """Let the frame that has come meet its fate."""
        now = asyncio.get_running_loop().time()
        match self._faults.strike(kind_of(header), self.peer, self._owner):
            case None:
                self._coming.append((now, header, body))
            case "delay", seconds:
                self._coming.append((now + seconds, header, body))
            case "repeat", _:
                self._coming += [(now, header, body)] * 2
            case "garble", _:
                self._coming.append((now, header[: len(header) // 2], body[: len(body) // 2]))
            case "close", _:
                self._coming.append((now, header, body))
                self._stream.close()
            case "cut", _:
                self.close()
                raise StreamClosed("The stream was cut in the middle of a frame.")

    async def _wait(self, until: float) -> None:
        try:
            async with asyncio.timeout_at(until):
                await self._has_closed.wait()
        except TimeoutError:
            return
        raise StreamClosed("The stream has ended.")


def kind_of(header: bytes) -> Kind | None:
    try:
        return type(messages.decode(header))
    except FrameError:
        return None
