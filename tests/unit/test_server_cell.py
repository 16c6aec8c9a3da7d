"""The shard cell: its table of moves, its progress, and what happens when filling it ends early."""

import asyncio
import weakref
from dataclasses import replace
from itertools import product
from typing import Any, get_args

import pytest

from swarm.dht.announcement import PeerState, Throughput
from swarm.errors import InputError
from swarm.net.virtual_time import in_virtual_time
from swarm.server.cell import (
    MAX_RETRY,
    MIN_RETRY,
    MOVES,
    UNKNOWN_RETRY,
    Abandoned,
    IllegalMove,
    OnProgress,
    ShardCell,
    ShardView,
    advance,
    estimate_wait,
)
from swarm.spans import Span
from tests.fake_engine import FakeEngine

SPAN = Span(2, 4)
STATES: tuple[PeerState, ...] = get_args(PeerState)
LEGAL = {
    ("joining", "serving"),
    ("joining", "left"),
    ("serving", "joining"),
    ("serving", "draining"),
    ("draining", "joining"),
    ("draining", "left"),
}


@pytest.mark.parametrize(("phase", "to"), sorted(LEGAL))
def test_legal_moves(phase: PeerState, to: PeerState) -> None:
    assert advance(phase, to) == to


@pytest.mark.parametrize(("phase", "to"), sorted(set(product(STATES, STATES)) - LEGAL))
def test_illegal_moves_raise(phase: PeerState, to: PeerState) -> None:
    with pytest.raises(IllegalMove, match=f"{phase} cannot become {to}"):
        advance(phase, to)


def test_the_table_knows_every_phase() -> None:
    assert set(MOVES) == set(STATES)


@pytest.mark.parametrize(
    ("progress", "elapsed", "wait"),
    [
        (0.0, 5.0, UNKNOWN_RETRY),
        (0.01, 50.0, UNKNOWN_RETRY),
        (0.25, 2.0, 6.0),
        (0.99, 1.0, MIN_RETRY),
        (1.0, 1.0, MIN_RETRY),
        (0.1, 1000.0, MAX_RETRY),
    ],
)
def test_the_wait_follows_the_rate_within_bounds(progress: float, elapsed: float, wait: float) -> None:
    assert estimate_wait(progress, elapsed) == pytest.approx(wait)


@in_virtual_time
async def test_filling_reports_progress_and_ends_in_serving() -> None:
    engine = FakeEngine()
    seen: list[tuple[str, float]] = []

    async def load(on_progress: OnProgress) -> FakeEngine:
        for fraction in (0.25, 0.5, 0.5, 0.25):
            on_progress(fraction)
            await asyncio.sleep(1)
        return engine

    cell = ShardCell(SPAN, load, lambda: seen.append((cell.phase, cell.progress)))
    assert (cell.phase, cell.engine) == ("joining", None)
    await cell.fill()
    assert seen == [("joining", 0.25), ("joining", 0.5), ("joining", 1.0), ("serving", 1.0)]
    assert cell.engine is engine
    assert cell.throughput == Throughput(decode=100.0, prefill=1000.0)


@in_virtual_time
async def test_progress_may_be_reported_from_a_thread() -> None:
    async def load(on_progress: OnProgress) -> FakeEngine:
        await asyncio.to_thread(on_progress, 0.5)
        await asyncio.sleep(1)
        assert cell.progress == 0.5
        return FakeEngine()

    cell = ShardCell(SPAN, load)
    await cell.fill()


@in_virtual_time
async def test_retry_after_counts_from_the_begin_of_loading() -> None:
    async def load(on_progress: OnProgress) -> FakeEngine:
        await asyncio.sleep(4)
        on_progress(0.5)
        await asyncio.sleep(1)
        assert cell.retry_after() == pytest.approx(5.0)
        return FakeEngine()

    cell = ShardCell(SPAN, load)
    assert cell.retry_after() == UNKNOWN_RETRY
    await cell.fill()


@in_virtual_time
async def test_a_shard_that_cannot_be_loaded_leaves_the_cell_empty() -> None:
    async def load(on_progress: OnProgress) -> FakeEngine:
        on_progress(0.5)
        raise InputError("The checkpoint is broken.")

    cell = ShardCell(SPAN, load)
    with pytest.raises(InputError, match="broken"):
        await cell.fill()
    assert (cell.phase, cell.engine) == ("joining", None)


@in_virtual_time
async def test_cancelling_the_filling_stops_the_loading_thread() -> None:
    reports: list[OnProgress] = []

    async def load(on_progress: OnProgress) -> FakeEngine:
        reports.append(on_progress)
        await asyncio.sleep(1e6)
        raise AssertionError("never reached")

    cell = ShardCell(SPAN, load)
    filling = asyncio.create_task(cell.fill())
    await asyncio.sleep(1)
    filling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await filling
    with pytest.raises(Abandoned):
        reports[0](0.5)


@in_virtual_time
async def test_closing_empties_the_cell_and_may_be_repeated() -> None:
    engine = FakeEngine()

    async def load(on_progress: OnProgress) -> FakeEngine:
        return engine

    cell = ShardCell(SPAN, load)
    await cell.fill()
    cell.close()
    cell.close()
    assert engine.is_closed
    assert cell.engine is None


class Loads:
    """Loads an engine each time, in ten seconds, and remembers when it began."""

    def __init__(self, **engine: Any):
        self.began_at: list[float] = []
        self.engines: list[FakeEngine] = []
        self._engine = engine

    async def __call__(self, on_progress: OnProgress) -> FakeEngine:
        self.began_at.append(asyncio.get_running_loop().time())
        await asyncio.sleep(5)
        on_progress(0.5)
        await asyncio.sleep(5)
        self.engines.append(FakeEngine(**self._engine))
        return self.engines[-1]


@in_virtual_time
async def test_evicted_it_sleeps_until_woken_and_is_filled_anew() -> None:
    load = Loads()
    seen: list[tuple[str, float, bool]] = []
    cell = ShardCell(SPAN, load, lambda: seen.append((cell.phase, cell.progress, cell.is_asleep)))
    await cell.wait_wanted()
    cell.wake()
    await cell.fill()
    assert not cell.is_asleep
    await cell.evict()
    assert (cell.phase, cell.progress, cell.is_asleep, cell.engine) == ("joining", 0.0, True, None)
    assert load.engines[0].is_closed
    assert cell.retry_after() == UNKNOWN_RETRY
    waiting = asyncio.create_task(cell.wait_wanted())
    await asyncio.sleep(100)
    assert not waiting.done()
    cell.wake()
    cell.wake()
    await waiting
    await cell.fill()
    assert cell.engine is load.engines[1]
    filling = [("joining", 0.5, False), ("joining", 1.0, False), ("serving", 1.0, False)]
    assert seen == [*filling, ("joining", 0.0, True), ("joining", 0.0, False), *filling]


@in_virtual_time
async def test_nothing_loads_before_the_memory_of_the_last_engine_is_back() -> None:
    load = Loads(closing_seconds=7.0)
    cell = ShardCell(SPAN, load)
    await cell.fill()
    evicting = asyncio.create_task(cell.evict())
    await asyncio.sleep(1)
    assert cell.is_asleep
    cell.wake()
    await cell.fill()
    assert evicting.done()
    assert load.began_at == [0.0, 17.0]


@in_virtual_time
async def test_only_a_serving_cell_can_be_evicted() -> None:
    cell = ShardCell(SPAN, Loads())
    with pytest.raises(IllegalMove):
        await cell.evict()
    filling = asyncio.create_task(cell.fill())
    await asyncio.sleep(1)
    with pytest.raises(IllegalMove):
        await cell.evict()
    await filling
    cell.move("draining")
    with pytest.raises(IllegalMove):
        await cell.evict()
    assert cell.engine is not None


@in_virtual_time
async def test_an_evicted_engine_can_be_collected() -> None:
    load = Loads()
    cell = ShardCell(SPAN, load)
    await cell.fill()
    engine = load.engines.pop()
    engine.itself = engine  # type: ignore[attr-defined]
    gone = weakref.ref(engine)
    del engine
    await cell.evict()
    assert gone() is None


@in_virtual_time
async def test_its_view_tells_what_it_holds() -> None:
    cell = ShardCell(SPAN, Loads(shard_bytes=77), dtype="auto", quantization="int8")
    empty = ShardView(
        span=SPAN,
        loaded=None,
        bytes=0,
        dtype="auto",
        quantization="int8",
        state="joining",
        asleep=False,
        progress=0.0,
    )
    assert cell.view() == empty
    await cell.fill()
    full = replace(empty, loaded=SPAN, bytes=77, dtype="float16", state="serving", progress=1.0)
    assert cell.view() == full
    await cell.evict()
    assert cell.view() == replace(empty, dtype="float16", asleep=True)
