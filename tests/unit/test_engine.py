"""The engine: sessions that come, go and roll back in one batch, each exactly as if it were alone."""

import asyncio
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from swarm.blocks.compute import Compute
from swarm.blocks.engine import Engine
from swarm.blocks.errors import NoCapacity, StepError
from swarm.blocks.head import Head
from swarm.blocks.models import Model, resolve
from swarm.blocks.steps import BatchReport
from swarm.page_keys import PAGE_TOKENS, page_keys
from swarm.spans import Span
from tests.engines import WHOLE, engine_of, step, step_ids
from tests.tiny import greedy


@pytest.fixture(scope="module")
def llama(checkpoint_of: Callable[[str], tuple[Path, Any]]) -> tuple[Model, Any]:
    folder, reference = checkpoint_of("Llama")
    return resolve(str(folder)), reference


def random_prompt(rng: random.Random, most: int = 90) -> list[int]:
    return [rng.randrange(4, 99) for _ in range(rng.randrange(1, most))]


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "GptOss", "Qwen3Moe"])
async def test_sessions_that_share_batches_answer_as_if_alone(
    family: str, checkpoint_of: Callable[[str], tuple[Path, Any]]
) -> None:
    """Staggered joins and leaves, and rollbacks in between: greedy tokens equal the unsplit model's."""
    folder, reference = checkpoint_of(family)
    model = resolve(str(folder))
    head, rng = Head.load(model, "float32", "cpu"), random.Random(1)
    async with engine_of(model) as engine:

        async def live(name: str, prompt: list[int], joins_after: int, count: int) -> None:
            for _ in range(joins_after):
                await asyncio.sleep(0.001)
            engine.open_session(name, WHOLE, len(prompt) + count, client=name)
            wrong = await step(engine, name, 0, head.embed(torch.tensor(prompt[: len(prompt) // 2 + 1])))
            assert torch.isfinite(wrong).all()
            hidden = await step(engine, name, 0, head.embed(torch.tensor(prompt)))
            answer: list[int] = []
            while len(answer) < count:
                token = head.logits(hidden[-1:])[0].argmax()
                answer.append(int(token))
                position = len(prompt) + len(answer) - 1
                if len(answer) % 5 == 0:  # a guess that is taken back
                    await step(
                        engine,
                        name,
                        position,
                        head.embed(torch.tensor([7, 8, 9][: count - len(answer)] or [7])),
                    )
                hidden = await step(engine, name, position, head.embed(token[None]))
            engine.close_session(name)
            assert answer == greedy(reference, prompt, count)

        async with asyncio.TaskGroup() as tasks:
            for i in range(6):
                tasks.create_task(live(f"s{i}", random_prompt(rng), 3 * i, 12))
    assert engine.stats.sessions == 0


async def test_steps_that_are_ready_together_share_an_iteration(llama: tuple[Model, Any]) -> None:
    reports: list[BatchReport] = []
    async with engine_of(llama[0]) as engine:
        engine.on_batch = reports.append
        for i in range(5):
            engine.open_session(str(i), WHOLE, 64)
            await step(engine, str(i), 0, torch.randn(20 + i, 32))
        await asyncio.sleep(0)  # the last iteration is counted once its result is out
        reports.clear()
        await asyncio.gather(*(step(engine, str(i), 20 + i, torch.randn(1, 32)) for i in range(5)))
        for i in range(5):
            engine.close_session(str(i))
    assert [(report.steps, report.decode_tokens) for report in reports] == [(5, 5)]


async def test_a_long_prefill_runs_in_chunks_between_which_others_decode(llama: tuple[Model, Any]) -> None:
    reports: list[BatchReport] = []
    async with engine_of(llama[0], kv_tokens=600) as engine:
        engine.on_batch = reports.append
        engine.open_session("long", WHOLE, 500)
        engine.open_session("short", WHOLE, 60)
        await step(engine, "short", 0, torch.randn(3, 32))
        long = asyncio.create_task(step(engine, "long", 0, torch.randn(500, 32)))
        decoded = 0
        while not long.done():
            await step(engine, "short", 3 + decoded % 50, torch.randn(1, 32))
            decoded += 1
        assert (await long).shape == (500, 32)
        for name in ("long", "short"):
            engine.close_session(name)
    assert decoded > 2
    assert max(report.prefill_tokens for report in reports) < 500


async def test_a_prefix_is_skipped_by_its_client_alone(llama: tuple[Model, Any]) -> None:
    model, _ = llama
    prompt = [5 + i % 90 for i in range(80)]
    keys = page_keys(prompt, secret=b"mine")
    hidden = torch.randn(80, 32)
    async with engine_of(model, Span(2, 6)) as engine:
        span = engine.span
        assert engine.open_session("a", span, 100, client="me", page_keys=keys) == 0
        whole = await step(engine, "a", 0, hidden, keys)
        engine.close_session("a")
        assert engine.open_session("b", span, 100, client="other", page_keys=keys) == 0
        assert engine.open_session("c", span, 100, client="me", page_keys=keys) == 64
        assert torch.equal(await step(engine, "c", 64, hidden[64:], keys[:0]), whole[64:])
        assert engine.open_session("d", Span(2, 4), 100, client="me", page_keys=keys) == 0, "other blocks"
        for name in "bcd":
            engine.close_session(name)
        assert engine.stats.prefix_tokens_held == 64


async def test_a_prefix_whose_tokens_the_server_saw_is_skipped_by_everybody(llama: tuple[Model, Any]) -> None:
    model, reference = llama
    prompt = [5 + i % 90 for i in range(70)]
    head = Head.load(model, "float32", "cpu")
    async with engine_of(model) as engine:
        engine.open_session("a", WHOLE, 100, client="me")
        whole = await step_ids(engine, "a", 0, prompt)
        assert torch.equal(whole, await step(engine, "a", 0, head.embed(torch.tensor(prompt))))
        engine.close_session("a")
        held = engine.open_session("b", WHOLE, 100, client="other", page_keys=page_keys(prompt))
        assert held == 64
        hidden = await step_ids(engine, "b", 63, prompt[63:])
        assert torch.equal(hidden, whole[63:])
        assert int(head.logits(hidden[-1:]).argmax()) == greedy(reference, prompt, 1)[0]
        engine.close_session("b")


async def test_without_a_prefix_cache_nothing_is_kept(llama: tuple[Model, Any]) -> None:
    async with engine_of(llama[0], prefix_cache=False) as engine:
        for name in "ab":
            assert engine.open_session(name, WHOLE, 100, page_keys=page_keys([5] * 64)) == 0
            await step_ids(engine, name, 0, [5] * 64)
            engine.close_session(name)
        assert engine.stats.kv_pages_cached == 0


async def test_more_may_be_promised_than_there_is(llama: tuple[Model, Any]) -> None:
    async with engine_of(llama[0], kv_tokens=4 * PAGE_TOKENS, overcommit=2.0) as engine:
        for name in "ab":
            engine.open_session(name, WHOLE, 4 * PAGE_TOKENS)
        with pytest.raises(NoCapacity):
            engine.open_session("c", WHOLE, 1)
        await step(engine, "a", 0, torch.randn(3 * PAGE_TOKENS, 32))
        await step(engine, "b", 0, torch.randn(PAGE_TOKENS, 32))
        with pytest.raises(NoCapacity) as full:
            await step(engine, "b", PAGE_TOKENS, torch.randn(1, 32))
        assert full.value.retry_after
        engine.check_integrity()
        engine.close_session("a")
        await step(engine, "b", PAGE_TOKENS, torch.randn(1, 32))
        engine.close_session("b")


async def test_a_cancelled_or_closed_step_leaves_no_trace(llama: tuple[Model, Any]) -> None:
    async with engine_of(llama[0]) as engine:
        for name in "abc":
            engine.open_session(name, WHOLE, 700 // 3)
        running = [asyncio.create_task(step(engine, name, 0, torch.randn(100, 32))) for name in "abc"]
        await asyncio.sleep(0)
        running[0].cancel()
        engine.close_session("b")
        with pytest.raises(asyncio.CancelledError):
            await running[0]
        with pytest.raises(StepError, match="closed"):
            await running[1]
        assert (await running[2]).shape == (100, 32)
        with pytest.raises(StepError, match="no such session"):
            await step(engine, "b", 0, torch.randn(1, 32))
        await step(engine, "a", 0, torch.randn(1, 32))
        for name in "ac":
            engine.close_session(name)


async def test_one_step_that_fails_takes_no_other_with_it(llama: tuple[Model, Any]) -> None:
    async with engine_of(llama[0]) as engine:
        forward, bad = engine._loaded.forward.run, torch.full((1, 32), 13.0)

        def run(hidden: Tensor, *others: Any) -> Tensor:
            if (hidden == 13.0).all(1).any():
                raise RuntimeError("out of luck")
            return forward(hidden, *others)

        engine._loaded.forward.run = run  # type: ignore[method-assign]
        for name in "abc":
            engine.open_session(name, WHOLE, 40)
        rows = {"a": torch.randn(1, 32), "b": bad, "c": torch.randn(3, 32)}
        async with asyncio.TaskGroup() as tasks:
            done = {
                name: tasks.create_task(outcome(step(engine, name, 0, row))) for name, row in rows.items()
            }
        assert isinstance(done["b"].result(), RuntimeError)
        for name in "ac":
            assert done[name].result().shape == rows[name].shape
        assert torch.isfinite(await step(engine, "b", 0, torch.randn(2, 32))).all()
        for name in "abc":
            engine.close_session(name)


async def outcome(work: Any) -> Any:
    try:
        return await work
    except RuntimeError as error:
        return error


async def test_token_ids_are_checked(llama: tuple[Model, Any]) -> None:
    model, _ = llama
    async with engine_of(model) as first, engine_of(model, Span(3, 6)) as last:
        assert first.takes_token_ids
        assert not last.takes_token_ids
        first.open_session("s", WHOLE, 40)
        first.open_session("part", Span(1, 3), 40)
        last.open_session("s", last.span, 40)
        bad: list[tuple[Engine, str, list[int]]] = [
            (first, "s", [model.vocab_size]),
            (first, "part", [3]),
            (last, "s", [3]),
        ]
        for engine, session, ids in bad:
            with pytest.raises(StepError) as refused:
                await step_ids(engine, session, 0, ids)
            assert refused.value.code == "bad_request"
        for engine, session in ((first, "s"), (first, "part"), (last, "s")):
            engine.close_session(session)


async def test_a_session_runs_one_step_at_a_time(llama: tuple[Model, Any]) -> None:
    async with engine_of(llama[0]) as engine:
        engine.open_session("s", WHOLE, 40)
        first = asyncio.create_task(step(engine, "s", 0, torch.randn(3, 32)))
        await asyncio.sleep(0)
        with pytest.raises(StepError, match="still running"):
            await step(engine, "s", 0, torch.randn(3, 32))
        assert (await first).shape == (3, 32)
        engine.close_session("s")


async def test_the_last_block_tells_the_likeliest_token(llama: tuple[Model, Any]) -> None:
    """Greedy answers by token ids in and out alone, of sessions that share batches."""
    model, reference = llama
    rng = random.Random(2)
    async with engine_of(model) as engine, engine_of(model, Span(0, 5)) as first:

        async def live(name: str, prompt: list[int]) -> None:
            engine.open_session(name, WHOLE, 120)
            answer: list[int] = []
            tokens, seq_pos = prompt, 0
            while len(answer) < 10:
                data = torch.tensor(tokens, dtype=torch.int32).numpy().tobytes()
                done = await engine.step(
                    name, seq_pos, data, (len(tokens),), "uint32", "raw", response_type="token_ids", rows=1
                )
                assert (done.dtype, done.shape) == ("uint32", (1,))
                seq_pos += len(tokens)
                tokens = [int.from_bytes(done.data, "little")]
                answer += tokens
            engine.close_session(name)
            assert answer == greedy(reference, prompt, 10)

        async with asyncio.TaskGroup() as tasks:
            for i in range(4):
                tasks.create_task(live(str(i), random_prompt(rng)))
        first.open_session("s", first.span, 40)
        data = torch.tensor([5], dtype=torch.int32).numpy().tobytes()
        with pytest.raises(StepError, match="last block"):
            await first.step("s", 0, data, (1,), "uint32", "raw", response_type="token_ids")
        first.close_session("s")


async def test_pages_of_a_step_that_was_given_up_get_no_name_of_the_next(llama: tuple[Model, Any]) -> None:
    async with engine_of(llama[0]) as engine:
        forward, runs, may_end = engine._loaded.forward.run, asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()

        def run(*rows: Any) -> Tensor:
            loop.call_soon_threadsafe(runs.set)
            assert may_end.wait(10)
            return forward(*rows)

        engine._loaded.forward.run = run  # type: ignore[method-assign]
        for name in ("s", "other"):
            engine.open_session(name, WHOLE, 100)
        given_up = asyncio.create_task(step_ids(engine, "s", 0, [5] * 64))
        await runs.wait()
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        with pytest.raises(StepError, match="still running"):
            await step_ids(engine, "s", 0, [6] * 64)
        may_end.set()
        await step_ids(engine, "other", 0, [7])
        for name in ("s", "other"):
            engine.close_session(name)
        assert engine.open_session("t", WHOLE, 100, page_keys=page_keys([6] * 64)) == 0
        engine.close_session("t")


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of those that computed, iteration by iteration."""
    names: list[str] = []
    run = Compute.run

    def noted(self: Compute, pieces: Any) -> None:
        names.append(threading.current_thread().name)
        run(self, pieces)

    monkeypatch.setattr(Compute, "run", noted)
    return names


async def decode(engine: Engine, names: str, seq_pos: int) -> None:
    """One step of each session, one after the other, and a moment for what is counted afterwards."""
    for name in names:
        await step(engine, name, seq_pos, torch.randn(1, 32))
        await asyncio.sleep(0)


async def test_steps_of_a_session_that_is_alone_are_computed_on_the_event_loop(
    llama: tuple[Model, Any], threads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = threading.current_thread().name
    monkeypatch.setattr("swarm.blocks.engine.INLINE_SECONDS", 60.0)
    async with engine_of(llama[0]) as engine:
        engine.open_session("a", WHOLE, 60)
        await step(engine, "a", 0, torch.randn(30, 32))
        for at in range(30, 34):
            await decode(engine, "a", at)
        assert threads == ["compute", "compute", own, own, own], "the first tells how long they take"
        engine.open_session("b", WHOLE, 60)
        threads.clear()
        for at in range(3):
            await decode(engine, "ab", at)
        assert set(threads) == {"compute"}
        threads.clear()
        monkeypatch.setattr("swarm.blocks.engine.DECODING_SECONDS", 0.0)
        await decode(engine, "aa", 3)
        assert threads == [own, own], "the other rests"
        await step(engine, "a", 0, torch.randn(50, 32))
        assert threads[2:] == ["compute"], "a prompt takes its time"
        for name in "ab":
            engine.close_session(name)


async def test_steps_that_take_longer_leave_the_event_loop_alone(
    llama: tuple[Model, Any], threads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swarm.blocks.engine.INLINE_SECONDS", 1e-9)
    async with engine_of(llama[0]) as engine:
        engine.open_session("a", WHOLE, 60)
        for at in range(4):
            await decode(engine, "a", at)
        engine.close_session("a")
    assert threads == ["compute"] * 4


async def test_what_fails_on_the_event_loop_fails_its_step_alone(
    llama: tuple[Model, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swarm.blocks.engine.INLINE_SECONDS", 60.0)
    async with engine_of(llama[0]) as engine:
        engine.open_session("a", WHOLE, 60)
        hidden = torch.randn(5, 32)
        for at in range(4):
            await step(engine, "a", at, hidden[at : at + 1])
            await asyncio.sleep(0)
        with monkeypatch.context() as broken:
            broken.setattr(Compute, "run", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                await step(engine, "a", 4, hidden[4:])
        again = await step(engine, "a", 4, hidden[4:])
        engine.open_session("b", WHOLE, 60)
        torch.testing.assert_close(again[-1], (await step(engine, "b", 0, hidden))[-1], rtol=0, atol=0)
        for name in "ab":
            engine.close_session(name)
