"""The shard cell: one span's place in this process, empty at first and filled in the background.

Owns the phase this peer is in, how much of the shard is loaded, and the engine once there is one. Must
not know of streams, announcements or the command line; whoever needs to know of changes is called.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeAlias

from swarm.dht.announcement import PeerState, Throughput
from swarm.net.messages import Codec, Dtype
from swarm.spans import Span

MIN_RETRY, MAX_RETRY, UNKNOWN_RETRY = 0.5, 30.0, 2.0
"""Seconds a client is told to wait for the shard: least, most, and while no rate is known."""

KNOWN_PROGRESS = 0.02
"""The loaded fraction from which on the rate says something."""

MOVES: dict[PeerState, frozenset[PeerState]] = {
    "joining": frozenset({"serving", "left"}),
    "serving": frozenset({"draining"}),
    "draining": frozenset({"left"}),
    "left": frozenset(),
}


class IllegalMove(Exception):
    """A change of phase that the table does not allow: a bug of ours."""


class Abandoned(Exception):
    """Ends the loading of a shard that nobody waits for."""


def advance(phase: PeerState, to: PeerState) -> PeerState:
    """The phase after a move from `phase` to `to`.

    Raises:
        IllegalMove: the table has no such move.
    """
    if to not in MOVES[phase]:
        raise IllegalMove(f"A peer that is {phase} cannot become {to}.")
    return to


def estimate_wait(progress: float, elapsed: float) -> float:
    """Seconds until a shard is loaded that took `elapsed` seconds for the fraction `progress`."""
    if progress < KNOWN_PROGRESS:
        return UNKNOWN_RETRY
    return min(max(elapsed * (1 - progress) / progress, MIN_RETRY), MAX_RETRY)


class StepOutcome(Protocol):
    """What an engine's step gives: raw little-endian values, and where the milliseconds went."""

    @property
    def data(self) -> memoryview: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> Dtype: ...
    @property
    def codec(self) -> Codec: ...
    @property
    def queue_ms(self) -> float: ...
    @property
    def compute_ms(self) -> float: ...


class WireForm(Protocol):
    """In which numbers a shard is held (`name`), and in which its activations travel."""

    @property
    def name(self) -> str: ...
    @property
    def wire_dtype(self) -> Dtype: ...
    @property
    def codec(self) -> Codec: ...


class SpanEngine(Protocol):
    """What fills the cell: `swarm.blocks.engine.Engine`, or a fake in tests."""

    @property
    def precision(self) -> WireForm: ...
    @property
    def max_step_tokens(self) -> int: ...
    @property
    def kv_tokens_left(self) -> int: ...
    @property
    def queue(self) -> int: ...

    def open_session(self, session_id: str, span: Span, max_tokens: int) -> None:
        """Reserve KV memory for blocks `span` of its own. Raises NoCapacity, StepError."""
        ...

    async def step(
        self, session_id: str, seq_pos: int, data: memoryview, shape: tuple[int, ...], dtype: str, codec: str
    ) -> StepOutcome:
        """Run hidden states [tokens, hidden] from position `seq_pos` on. Raises StepError."""
        ...

    def close_session(self, session_id: str) -> None:
        """Free the session's KV memory."""
        ...

    async def measure(self) -> tuple[float, float]:
        """Rates of decode and prefill, in (token, block) pairs a second."""
        ...

    def close(self) -> None:
        """Stop computing once the running step is done. Safe to call again."""
        ...


OnProgress: TypeAlias = Callable[[float], None]
Load: TypeAlias = Callable[[OnProgress], Awaitable[SpanEngine]]


class ShardCell:
    """The cell of blocks `span`: `joining` until `fill` is done.

    `load` gets a callback for the loaded fraction, which may be called from any thread; `on_change` is
    called on the event loop after each change of phase or progress.
    """

    def __init__(self, span: Span, load: Load, on_change: Callable[[], None] = lambda: None):
        self.span = span
        self.phase: PeerState = "joining"
        self.progress = 0.0
        self.engine: SpanEngine | None = None
        self.throughput = Throughput()
        self._load = load
        self._on_change = on_change
        self._started_at: float | None = None
        self._is_abandoned = False

    async def fill(self) -> None:
        """Load the shard, measure its speed, and begin to serve. Cancelled, it stops the loading too.

        Raises:
            SwarmError: the shard cannot be loaded; the cell stays empty.
        """
        loop = asyncio.get_running_loop()
        self._started_at = loop.time()
        try:
            self.engine = await self._load(lambda fraction: self._report(loop, fraction))
            self._on_progress(1.0)
            decode, prefill = await self.engine.measure()
        except asyncio.CancelledError:
            self._is_abandoned = True
            raise
        self.throughput = Throughput(decode=decode, prefill=prefill)
        self.move("serving")

    def move(self, to: PeerState) -> None:
        """Change the phase.

        Raises:
            IllegalMove: the table has no such move.
        """
        self.phase = advance(self.phase, to)
        self._on_change()

    def retry_after(self) -> float:
        """Seconds after which a client that came early should ask again."""
        if self._started_at is None:
            return UNKNOWN_RETRY
        return estimate_wait(self.progress, asyncio.get_running_loop().time() - self._started_at)

    def close(self) -> None:
        """Empty the cell. Safe to call again."""
        if self.engine is not None:
            self.engine.close()
            self.engine = None

    def _report(self, loop: asyncio.AbstractEventLoop, fraction: float) -> None:
        """Runs in the loading thread, which nothing but an exception can stop."""
        if self._is_abandoned:
            raise Abandoned("The peer leaves: its shard is not needed any more.")
        loop.call_soon_threadsafe(self._on_progress, fraction)

    def _on_progress(self, fraction: float) -> None:
        fraction = min(fraction, 1.0)
        if self.phase == "joining" and fraction > self.progress:
            self.progress = fraction
            self._on_change()
