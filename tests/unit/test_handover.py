"""Sessions' KV given to another engine: it goes on bit for bit as if nothing had happened, or refuses."""

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from swarm.blocks.engine import Engine
from swarm.blocks.errors import NoCapacity, StepError
from swarm.blocks.handover import kv_bytes, kv_from_bytes, kv_to_bytes
from swarm.blocks.models import Model, resolve
from swarm.kernels.pages import PAGE, Pages, Segment, Segments, append, rows_of
from swarm.page_keys import PAGE_TOKENS, page_keys
from swarm.spans import Span
from tests.engines import PAGES, engine_of, step, step_ids

SPAN = Span(1, 5)
HELD = 2 * PAGE_TOKENS + 11
PROMPT = [4 + i * 37 % 95 for i in range(HELD)]
Checkpoints = Callable[[str], tuple[Path, Any]]


@pytest.fixture(scope="module")
def llama(checkpoint_of: Checkpoints) -> Model:
    return resolve(str(checkpoint_of("Llama")[0]))


def states(tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, 32, generator=torch.Generator().manual_seed(seed))


@asynccontextmanager
async def giver_and_taker(
    model: Model, taker_span: Span = SPAN, **options: Any
) -> AsyncIterator[tuple[Engine, Engine]]:
    """One that holds `HELD` tokens of session `s`, and one where `t` was opened for them."""
    async with engine_of(model, **options) as giver, engine_of(model, taker_span, **options) as taker:
        giver.open_session("s", SPAN, 200)
        taker.open_session("t", SPAN, 200)
        await step(giver, "s", 0, states(HELD))
        yield giver, taker
        giver.close_session("s")
        taker.close_session("t")


async def move(giver: Engine, taker: Engine, *cuts: int) -> None:
    for first, end in zip((0, *cuts), (*cuts, HELD), strict=True):
        await taker.import_kv("t", first, end, await giver.export_kv("s", first, end))
        taker.check_integrity()


async def go_on(engine: Engine, session: str) -> list[Tensor]:
    """A few decode steps, one of several rows that is taken back in part, and a longer one."""
    given = [await step(engine, session, HELD + at, states(1, at)) for at in range(3)]
    given.append(await step(engine, session, HELD + 3, states(7, 8)))
    given.append(await step(engine, session, HELD + 5, states(1, 9)))
    given.append(await step(engine, session, HELD - 20, states(60, 10)))
    return given


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("Llama", "float32"),
        ("Llama", "float16"),
        ("Llama", "bfloat16"),
        ("Gemma2", "float32"),
        ("DeepseekV3", "float32"),
        ("GptOss", "float16"),
    ],
)
@pytest.mark.parametrize("cuts", [(), (PAGE_TOKENS, HELD - 1), (5, 40)])
async def test_the_other_goes_on_as_if_nothing_had_happened(
    family: str, dtype: str, cuts: tuple[int, ...], checkpoint_of: Checkpoints
) -> None:
    model = resolve(str(checkpoint_of(family)[0]))
    async with giver_and_taker(model, Span(0, 5), dtype=dtype) as (giver, taker):
        taker.open_session("beside", SPAN, 100)
        await step(taker, "beside", 0, states(50, 5))
        await move(giver, taker, *cuts)
        assert await taker.export_kv("t", 0, HELD) == await giver.export_kv("s", 0, HELD)
        for ours, theirs in zip(await go_on(taker, "t"), await go_on(giver, "s"), strict=True):
            assert torch.equal(ours, theirs)
        taker.close_session("beside")


async def test_the_bytes_are_as_many_as_is_said(llama: Model) -> None:
    async with giver_and_taker(llama) as (giver, taker):
        token_bytes = SPAN.size * 2 * (8 + 8) * 4
        assert giver.kv_bytes("s", 7) == taker.kv_bytes("t", 7) == 7 * token_bytes
        assert len(await giver.export_kv("s", 3, 10)) == 7 * token_bytes
        with pytest.raises(StepError, match="no such session"):
            giver.kv_bytes("other", 7)


async def test_a_session_goes_on_from_a_prefix_that_was_found(llama: Model) -> None:
    """Only the rest is taken over, which leaves the shared pages as they are."""
    keys = page_keys(PROMPT, secret=b"mine")
    async with giver_and_taker(llama) as (giver, taker):
        taker.open_session("before", SPAN, 100, client="me")
        await step(taker, "before", 0, states(HELD), keys)
        taker.close_session("before")
        taker.close_session("t")
        assert taker.open_session("t", SPAN, 200, client="me", page_keys=keys) == 64
        assert taker.open_session("u", SPAN, 200, client="me", page_keys=keys) == 64
        await taker.import_kv("t", 64, HELD, await giver.export_kv("s", 64, HELD))
        for ours, theirs in zip(await go_on(taker, "t"), await go_on(giver, "s"), strict=True):
            assert torch.equal(ours, theirs)
        giver.open_session("v", SPAN, 200)
        await step(giver, "v", 0, states(64))
        assert await taker.export_kv("u", 0, 64) == await giver.export_kv("v", 0, 64)
        giver.close_session("v")
        taker.close_session("u")


async def test_what_others_computed_is_found_by_nobody(llama: Model) -> None:
    """Not even where steps that are named go on from the middle of a page of it."""
    keys = page_keys(PROMPT, secret=b"mine")
    async with engine_of(llama) as giver, engine_of(llama) as taker:
        for engine in (giver, taker):
            engine.open_session("s", Span(0, 6), 200, client="me")
        await step_ids(giver, "s", 0, PROMPT)
        await taker.import_kv("s", 0, 40, await giver.export_kv("s", 0, 40))
        await step_ids(taker, "s", 10, PROMPT[10:])
        await step(taker, "s", 10, states(HELD - 10), keys)
        await step_ids(taker, "s", 0, PROMPT)
        taker.close_session("s")
        assert taker.stats.kv_pages_cached == 0
        for client in ("me", ""):
            for names in (keys, page_keys(PROMPT)):
                assert taker.open_session("t", Span(0, 6), 200, client=client, page_keys=names) == 0
                taker.close_session("t")
        giver.close_session("s")


OUT_OF_PLACE = [(0, HELD), (5, HELD), (7, 7), (9, 3), (-1, 3), (0, 201), (0, 2**31), (2**31, 2**31 + 1)]


@pytest.mark.parametrize(("first", "end"), OUT_OF_PLACE)
async def test_positions_that_do_not_fit_are_refused(llama: Model, first: int, end: int) -> None:
    async with giver_and_taker(llama) as (giver, taker):
        await step(taker, "t", 0, states(4))
        used = taker.stats.kv_pages_used
        data = b"\0" * min(10**6, max(0, giver.kv_bytes("s", end - first)))
        with pytest.raises(StepError) as refused:
            await taker.import_kv("t", first, end, data)
        assert refused.value.code == "bad_request"
        assert taker.stats.kv_pages_used == used
        taker.check_integrity()
        await step(taker, "t", 4, states(1))


@pytest.mark.parametrize(("first", "end"), [(0, HELD + 1), (4, 4), (-3, 5), (HELD, HELD + 1), (0, 2**31)])
async def test_only_what_is_held_is_given(llama: Model, first: int, end: int) -> None:
    async with giver_and_taker(llama) as (giver, _):
        with pytest.raises(StepError) as refused:
            await giver.export_kv("s", first, end)
        assert refused.value.code == "bad_request"


@pytest.mark.parametrize("change", ["short", "long", "empty", "nan", "inf"])
async def test_bytes_that_cannot_be_right_are_refused_and_cost_no_page(llama: Model, change: str) -> None:
    async with giver_and_taker(llama) as (giver, taker):
        await taker.import_kv("t", 0, 40, await giver.export_kv("s", 0, 40))
        right = bytes(await giver.export_kv("s", 40, HELD))
        wrong = {
            "short": right[:-4],
            "long": right + b"\0" * 4,
            "empty": b"",
            "nan": right[:-4] + torch.tensor([float("nan")]).numpy().tobytes(),
            "inf": torch.tensor([-float("inf")]).numpy().tobytes() + right[4:],
        }[change]
        used = taker.stats.kv_pages_used
        with pytest.raises(StepError) as refused:
            await taker.import_kv("t", 40, HELD, wrong)
        assert refused.value.code == "bad_request"
        assert taker.stats.kv_pages_used == used
        taker.check_integrity()
        await taker.import_kv("t", 40, HELD, right)
        for ours, theirs in zip(await go_on(taker, "t"), await go_on(giver, "s"), strict=True):
            assert torch.equal(ours, theirs)


async def test_a_full_server_takes_nothing_over(llama: Model) -> None:
    async with giver_and_taker(llama, kv_tokens=8 * PAGE_TOKENS, overcommit=3.0) as (giver, taker):
        taker.open_session("big", SPAN, 8 * PAGE_TOKENS)
        await step(taker, "big", 0, states(7 * PAGE_TOKENS))
        with pytest.raises(NoCapacity) as full:
            await move(giver, taker)
        assert full.value.retry_after
        taker.check_integrity()
        taker.close_session("big")
        await move(giver, taker)


async def test_sessions_that_keep_states_are_not_handed_over(checkpoint_of: Checkpoints) -> None:
    model = resolve(str(checkpoint_of("Qwen3Next")[0]))
    async with engine_of(model) as engine:
        assert not engine.can_hand_over
        engine.open_session("s", SPAN, 40)
        await step(engine, "s", 0, states(4))
        with pytest.raises(StepError, match="not handed over"):
            await engine.export_kv("s", 0, 4)
        with pytest.raises(StepError, match="not handed over"):
            await engine.import_kv("s", 4, 5, b"")
        engine.close_session("s")


async def test_unknown_sessions_have_nothing(llama: Model) -> None:
    async with giver_and_taker(llama) as (giver, _):
        assert giver.can_hand_over
        for asked in (giver.export_kv("x", 0, 1), giver.import_kv("x", 0, 1, b"")):
            with pytest.raises(StepError) as refused:
                await asked
            assert refused.value.code == "unknown_session"


@asynccontextmanager
async def held_up(engine: Engine) -> AsyncIterator[None]:
    """The compute thread is busy with something else."""
    has_begun, may_go_on = threading.Event(), threading.Event()

    def hold() -> None:
        has_begun.set()
        may_go_on.wait(10)

    busy = engine._thread.run(hold)
    await asyncio.to_thread(has_begun.wait, 10)
    try:
        yield
    finally:
        may_go_on.set()
        await busy


async def test_a_step_and_a_handover_of_one_session_exclude_each_other(llama: Model) -> None:
    async with giver_and_taker(llama) as (giver, taker):
        async with held_up(giver):
            given = asyncio.create_task(giver.export_kv("s", 0, HELD))
            await asyncio.sleep(0)
            for asked in (step(giver, "s", HELD, states(1)), giver.export_kv("s", 0, 1)):
                with pytest.raises(StepError, match="still running"):
                    await asked
        async with held_up(taker):
            taken = asyncio.create_task(taker.import_kv("t", 0, HELD, await given))
            await asyncio.sleep(0)
            taker.check_integrity()
            with pytest.raises(StepError, match="still running"):
                await step(taker, "t", 0, states(1))
        await taken
        async with held_up(taker):
            stepping = asyncio.create_task(step(taker, "t", HELD, states(1)))
            await asyncio.sleep(0)
            with pytest.raises(StepError, match="still running"):
                await taker.export_kv("t", 0, 1)
            with pytest.raises(StepError, match="still running"):
                await taker.import_kv("t", HELD, HELD + 1, b"")
        await stepping


@pytest.mark.parametrize("how", ["cancelled", "closed", "shut down"])
async def test_who_stops_waiting_loses_no_page(llama: Model, how: str) -> None:
    async with giver_and_taker(llama) as (giver, taker):
        data = await giver.export_kv("s", 0, HELD)
        async with held_up(taker):
            taking = asyncio.create_task(taker.import_kv("t", 0, HELD, data))
            await asyncio.sleep(0)
            if how == "cancelled":
                taking.cancel()
            elif how == "closed":
                taker.close_session("t")
            else:
                taker.close()
            await asyncio.sleep(0)
            taker.check_integrity()
            assert taker.stats.kv_pages_used == 3, "the thread may still write to them"
        with pytest.raises(asyncio.CancelledError if how == "cancelled" else StepError):
            await taking
        await taker.wait_closed() if how == "shut down" else await go_on_after(taker, how)
        taker.check_integrity()


async def go_on_after(taker: Engine, how: str) -> None:
    await taker._thread.run(lambda: None)  # after what was given up
    if how == "closed":
        assert taker.stats.kv_pages_used == 0
        taker.open_session("t", SPAN, 200)
    await step(taker, "t", 0, states(4))


async def test_what_fails_while_it_is_written_takes_the_session_back(llama: Model) -> None:
    async with giver_and_taker(llama) as (giver, taker):
        await taker.import_kv("t", 0, 40, await giver.export_kv("s", 0, 40))
        copy = taker._loaded.forward.copy

        def fail(copies: Any) -> None:
            raise RuntimeError("out of luck")

        taker._loaded.forward.copy = fail  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="out of luck"):
            await taker.import_kv("t", 40, HELD, await giver.export_kv("s", 40, HELD))
        taker._loaded.forward.copy = copy  # type: ignore[method-assign]
        taker.check_integrity()
        await taker.import_kv("t", 40, HELD, await giver.export_kv("s", 40, HELD))
        for ours, theirs in zip(await go_on(taker, "t"), await go_on(giver, "s"), strict=True):
            assert torch.equal(ours, theirs)


async def test_random_moves_between_two_engines_change_no_bit(llama: Model) -> None:
    """A session that wanders, now growing, now rolled back, beside one that stays."""
    rng = random.Random(3)
    async with engine_of(llama) as one, engine_of(llama) as other, engine_of(llama) as still:
        here, there, length, name = one, other, 0, 0
        still.open_session("0", SPAN, 300)
        here.open_session("0", SPAN, 300)
        for turn in range(40):
            first = rng.randrange(max(0, length - 40), length + 1)
            rows = min(rng.choice([1, 1, 5, 16, 50]), 300 - first)
            expected = await step(still, "0", first, states(rows, turn))
            assert torch.equal(await step(here, str(name), first, states(rows, turn)), expected)
            length = first + rows
            if rng.random() < 0.4:
                there.open_session(str(name + 1), SPAN, 300)
                at = 0
                while at < length:
                    end = min(length, at + rng.randrange(1, 80))
                    await there.import_kv(str(name + 1), at, end, await here.export_kv(str(name), at, end))
                    at = end
                here.close_session(str(name))
                here, there, name = there, here, name + 1
                one.check_integrity()
                other.check_integrity()
        assert name > 5
        here.close_session(str(name))
        still.close_session("0")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("first", "end"), [(0, 1), (3, 90), (31, 33), (64, 96)])
def test_bytes_are_rows_of_tokens_however_they_lie_in_pages(dtype: torch.dtype, first: int, end: int) -> None:
    """Blocks of several shapes, keys and values of different widths among them."""
    shapes = [(2, 8, 8), (1, 24, 10), (3, 33, 17)]
    table = [7, 2, 9]
    pages = [Pages.empty(PAGES, *shape, dtype, "cpu") for shape in shapes]
    written = []
    for one, (heads, key_dim, value_dim) in zip(pages, shapes, strict=True):
        keys, values = torch.randn(96, heads, key_dim).to(dtype), torch.randn(96, heads, value_dim).to(dtype)
        append(one, keys, values, Segments.of([Segment(96, 0, table)]))
        written.append((keys[first:end], values[first:end]))
        for found, rows in zip(rows_of(one, table, first, end), written[-1], strict=True):
            assert torch.equal(found, rows)
    data = kv_to_bytes(pages, table, first, end)
    expected = b"".join(
        rows.contiguous().view(torch.uint8).numpy().tobytes() for two in written for rows in two
    )
    assert data == expected
    assert len(data) == kv_bytes(pages, end - first)

    others = [Pages.empty(PAGES, *shape, dtype, "cpu") for shape in shapes]
    elsewhere = [1, 0, 5]
    for one in others:
        one.keys.fill_(1.0)
        one.values.fill_(1.0)
    kv_from_bytes(others, elsewhere, first, end, data)
    assert kv_to_bytes(others, elsewhere, first, end) == data
    for one in others:
        untouched = sorted(set(range(PAGES)) - set(elsewhere[first // PAGE : -(-end // PAGE)]))
        assert (one.keys[untouched] == 1.0).all()
        assert (one.values[untouched] == 1.0).all()


async def test_full_pages_are_copied_while_a_step_runs(llama: Model) -> None:
    async with giver_and_taker(llama) as (giver, _):
        expected = bytes(await giver.export_kv("s", 0, 2 * PAGE_TOKENS))
        async with held_up(giver):
            stepping = asyncio.create_task(step(giver, "s", HELD, states(1)))
            await asyncio.sleep(0)
            copying = asyncio.create_task(giver.copy_kv("s", 0, 2 * PAGE_TOKENS))
            await asyncio.sleep(0)
            giver.check_integrity()
        await stepping
        assert bytes(await copying) == expected
        for first, end in ((0, HELD), (1, PAGE_TOKENS), (0, 3 * PAGE_TOKENS), (PAGE_TOKENS, PAGE_TOKENS)):
            with pytest.raises(StepError):
                await giver.copy_kv("s", first, end)
        with pytest.raises(StepError, match="no such session"):
            await giver.copy_kv("t", 0, PAGE_TOKENS)


@pytest.mark.parametrize("how", ["rolled back", "closed", "given up"])
async def test_what_is_copied_stays_as_it_was_whatever_becomes_of_the_session(llama: Model, how: str) -> None:
    async with giver_and_taker(llama) as (giver, _):
        expected = bytes(await giver.export_kv("s", 0, 2 * PAGE_TOKENS))
        stepping: asyncio.Task[Any] | None = None
        async with held_up(giver):
            copying = asyncio.create_task(giver.copy_kv("s", 0, 2 * PAGE_TOKENS))
            await asyncio.sleep(0)
            if how == "rolled back":
                stepping = asyncio.create_task(step(giver, "s", 5, states(3, seed=1)))
            elif how == "closed":
                giver.close_session("s")
            else:
                copying.cancel()
            for _ in range(3):
                await asyncio.sleep(0)
            giver.check_integrity()
            assert giver.stats.kv_pages_used >= 2, "the thread still reads them"
        if stepping is not None:
            await stepping
        if how == "given up":
            with pytest.raises(asyncio.CancelledError):
                await copying
        else:
            assert bytes(await copying) == expected
        await giver._thread.run(lambda: None)
        giver.check_integrity()
        assert giver.stats.kv_pages_used == {"rolled back": 1, "closed": 0, "given up": 3}[how]


async def test_nothing_is_copied_where_steps_may_need_every_page(llama: Model) -> None:
    async with engine_of(llama, SPAN, kv_tokens=3 * PAGE_TOKENS) as engine:
        engine.open_session("s", SPAN, 3 * PAGE_TOKENS)
        await step(engine, "s", 0, states(HELD))
        with pytest.raises(NoCapacity):
            await engine.copy_kv("s", 0, PAGE_TOKENS)
        engine.rewind("s", PAGE_TOKENS)
        await engine.copy_kv("s", 0, PAGE_TOKENS)
        engine.close_session("s")


async def test_a_copy_is_taken_back_in_part_and_goes_on_bit_for_bit(llama: Model) -> None:
    async with giver_and_taker(llama) as (giver, taker):
        await taker.import_kv("t", 0, 40, await giver.export_kv("s", 0, 40))
        taker.rewind("t", PAGE_TOKENS)
        taker.check_integrity()
        data = await giver.export_kv("s", PAGE_TOKENS, HELD)
        await taker.import_kv("t", PAGE_TOKENS, HELD, data)
        taker.rewind("t", 1000)
        for given, taken in zip(await go_on(giver, "s"), await go_on(taker, "t"), strict=True):
            assert torch.equal(given, taken)
        with pytest.raises(StepError, match="no such session"):
            taker.rewind("s", 0)
