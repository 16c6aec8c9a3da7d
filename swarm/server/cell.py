"""The shard cell: one span's place in this process, empty at first and filled in the background.

Owns the phase this peer is in, how much of the shard is loaded, and the engine once there is one. Evicted,
it is empty again and asleep, until it is wanted. Another span can take the place of its own, loaded beside it
or once it is empty. Must not know of streams, announcements or the command line; whoever needs to know of
changes is called.
"""

import asyncio
import gc
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeAlias

from swarm.blocks.heap import give_back_freed_memory
from swarm.dht.announcement import PeerState, Throughput
from swarm.server.span_engine import SpanEngine
from swarm.spans import Span

MIN_RETRY, MAX_RETRY, UNKNOWN_RETRY = 0.5, 30.0, 2.0
"""Seconds a client is told to wait for the shard: least, most, and while no rate is known."""

KNOWN_PROGRESS = 0.02
"""The loaded fraction from which on the rate says something."""

MOVES: dict[PeerState, frozenset[PeerState]] = {
    "joining": frozenset({"serving", "left"}),
    "serving": frozenset({"joining", "draining"}),
    "draining": frozenset({"joining", "left"}),
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


OnProgress: TypeAlias = Callable[[float], None]
Load: TypeAlias = Callable[[OnProgress], Awaitable[SpanEngine]]
Measure: TypeAlias = Callable[[SpanEngine], Awaitable[Throughput]]


async def measured(engine: SpanEngine) -> Throughput:
    """What the engine says of itself after having run a little."""
    decode, prefill = await engine.measure()
    return Throughput(decode=decode, prefill=prefill)


@dataclass(frozen=True)
class ShardView:
    """What a cell for blocks `span` holds: `loaded` of them, which take `bytes`, in the dtype named.

    While nothing is loaded, the dtype is the one that was asked for or was there before.
    """

    span: Span
    loaded: Span | None
    bytes: int
    dtype: str
    quantization: str
    state: PeerState
    asleep: bool
    progress: float


class ShardCell:
    """The cell of blocks `span`: `joining` until `fill` is done, and again once `evict` was called.

    `load` gets a callback for the loaded fraction, which may be called from any thread; `on_change` is
    called on the event loop after each change of phase or progress. `measure` finds out how fast what was
    loaded is. `dtype` and `quantization` are what was asked for.
    """

    def __init__(
        self,
        span: Span,
        load: Load,
        on_change: Callable[[], None] = lambda: None,
        *,
        measure: Measure = measured,
        dtype: str = "auto",
        quantization: str = "none",
    ):
        self.span = span
        self.left: Span | None = None
        """The blocks that it served before these, if any."""
        self.phase: PeerState = "joining"
        self.progress = 0.0
        self.engine: SpanEngine | None = None
        self.throughput = Throughput()
        self.dtype = dtype
        self.quantization = quantization
        self.serving_since = 0.0  # in the loop's time
        self._load = load
        self._measure = measure
        self._retired: list[SpanEngine] = []
        self._on_change = on_change
        self._started_at: float | None = None
        self._is_wanted = asyncio.Event()
        self._is_wanted.set()
        self._memory = asyncio.Lock()  # held by who takes much of it, or gives it back

    @property
    def is_asleep(self) -> bool:
        """Empty since it was evicted, and nobody has asked for the shard yet."""
        return self.phase == "joining" and not self._is_wanted.is_set()

    async def wait_wanted(self) -> None:
        """Return once the cell is to be filled: at first, and whenever it was woken."""
        await self._is_wanted.wait()

    async def fill(self) -> None:
        """Load the shard, measure its speed, and begin to serve. Cancelled, it stops the loading too.

        Raises:
            SwarmError: the shard cannot be loaded; the cell stays empty.
        """
        loop = asyncio.get_running_loop()
        async with self._memory:
            self._started_at = loop.time()
            self.engine = await self._loaded(self._load, self._on_progress)
            self._on_progress(1.0)
            self.throughput = await self._measure(self.engine)
        self.dtype = self.engine.precision.name
        self.serving_since = loop.time()
        self._is_wanted.clear()
        self.move("serving")

    async def evict(self) -> None:
        """Empty the serving cell, give its memory back, and let it sleep until `wake`.

        Its sessions must have been ended.

        Raises:
            IllegalMove: it is not serving.
        """
        if self.phase != "serving":
            raise IllegalMove(f"A peer that is {self.phase} cannot be evicted.")
        await self._empty()

    async def give_way(self, span: Span, load: Load) -> None:
        """Empty the draining cell, give its memory back, and let it be filled with `span` by `load`.

        Its sessions must have been ended.

        Raises:
            IllegalMove: it is not draining.
        """
        if self.phase != "draining":
            raise IllegalMove(f"A peer that is {self.phase} cannot give way.")
        self._is_wanted.set()
        self.left, self.span, self._load = self.span, span, load
        await self._empty()

    def place(self, span: Span, load: Load) -> None:
        """It is to hold `span` instead, which `load` fills: nothing of its own is loaded yet."""
        assert self.phase == "joining", "only an empty cell can hold another span at once"
        assert self.engine is None, "only an empty cell can hold another span at once"
        self.span, self._load, self.progress, self._started_at = span, load, 0.0, None

    async def load_beside(self, load: Load) -> tuple[SpanEngine, Throughput]:
        """Another engine, for `swap`, and its speed. Cancelled, it stops the loading too.

        Raises:
            SwarmError: it cannot be loaded, for example since there is no memory for both.
        """
        async with self._memory:
            engine = await self._loaded(load, lambda fraction: None)
            try:
                return engine, await self._measure(engine)
            except BaseException:
                engine.close()
                raise

    def swap(self, span: Span, load: Load, engine: SpanEngine, throughput: Throughput) -> SpanEngine:
        """Serve `span` by `engine` from now on. Returns the one before, for `retire` once nobody needs it."""
        assert self.phase == "serving", "only a cell that serves can go on with another span"
        assert self.engine is not None, "a cell that serves holds an engine"
        before = self.engine
        self._retired.append(before)
        self.left, self.span, self._load = self.span, span, load
        self.engine, self.throughput = engine, throughput
        self._on_change()
        return before

    async def retire(self, engine: SpanEngine) -> None:
        """Close an engine that `swap` gave, and give its memory back."""
        engine.close()
        async with self._memory:
            await engine.wait_closed()
            self._retired = [other for other in self._retired if other is not engine]
            del engine
            await asyncio.to_thread(_give_back_memory)

    def wake(self) -> None:
        """Somebody asked for the shard: if the cell is asleep, it is to be filled again."""
        if self.is_asleep:
            self._is_wanted.set()
            self._on_change()

    def move(self, to: PeerState) -> None:
        """Change the phase.

        Raises:
            IllegalMove: the table has no such move.
        """
        self.phase = advance(self.phase, to)
        self._on_change()

    def view(self) -> ShardView:
        """What the cell holds now."""
        return ShardView(
            span=self.span,
            loaded=self.span if self.engine else None,
            bytes=self.engine.shard_bytes if self.engine else 0,
            dtype=self.dtype,
            quantization=self.quantization,
            state=self.phase,
            asleep=self.is_asleep,
            progress=self.progress,
        )

    def retry_after(self) -> float:
        """Seconds after which a client that came early should ask again."""
        if self._started_at is None:
            return UNKNOWN_RETRY
        return estimate_wait(self.progress, asyncio.get_running_loop().time() - self._started_at)

    def close(self) -> None:
        """Stop computing and drop all engines. Safe to call again."""
        if self.engine is not None:
            self._retired.append(self.engine)
            self.engine = None
        for engine in self._retired:
            engine.close()

    async def vacate(self) -> None:
        """Give the memory of all engines back that `close` has dropped."""
        async with self._memory:
            while self._retired:
                await self._retired.pop().wait_closed()
            await asyncio.to_thread(_give_back_memory)

    async def _empty(self) -> None:
        phase = advance(self.phase, "joining")
        self.close()
        self.phase, self.progress, self._started_at = phase, 0.0, None
        self._on_change()
        await self.vacate()

    async def _loaded(self, load: Load, on_progress: OnProgress) -> SpanEngine:
        """What `load` gives. Once this is cancelled, nothing but an exception can stop the loading thread."""
        loop, is_abandoned = asyncio.get_running_loop(), False

        def report(fraction: float) -> None:
            if is_abandoned:
                raise Abandoned("This shard is not needed any more.")
            loop.call_soon_threadsafe(on_progress, fraction)

        try:
            return await load(report)
        except asyncio.CancelledError:
            is_abandoned = True
            raise

    def _on_progress(self, fraction: float) -> None:
        fraction = min(fraction, 1.0)
        if self.phase == "joining" and fraction > self.progress:
            self.progress = fraction
            self._on_change()


def _give_back_memory() -> None:
    """An engine is full of cycles, which only the collector frees."""
    gc.collect()
    give_back_freed_memory()
