"""What an engine answers a step: for which of its rows, as tokens or hidden states, in which numbers."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch

from swarm.blocks.batch import DECODE_ROWS
from swarm.blocks.choosing import choose
from swarm.blocks.compute import HEAD_ROWS
from swarm.blocks.engine import Engine
from swarm.blocks.errors import StepError
from swarm.blocks.head import Head
from swarm.blocks.models import Model, resolve
from swarm.blocks.precision import Precision, choose_precision
from swarm.blocks.steps import BatchReport
from swarm.kernels.codecs import from_wire
from swarm.kernels.linear import has_native
from swarm.net.forms import tensor_bytes
from swarm.sampling import Sampling
from swarm.spans import Span
from tests.engines import WHOLE, as_bytes, engine_of, likeliest, step, step_ids

CPU = torch.device("cpu")
LONG = 150
"""Tokens of a step that runs in several iterations."""


@pytest.fixture(scope="module")
def llama(checkpoint_of: Callable[[str], tuple[Path, Any]]) -> Model:
    return resolve(str(checkpoint_of("Llama")[0]))


@pytest_asyncio.fixture
async def engine(llama: Model) -> AsyncIterator[Engine]:
    async with engine_of(llama) as engine:
        yield engine


def prompt_of(tokens: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(4, 99) for _ in range(tokens)]


async def one_by_one(engine: Engine, ids: Sequence[int]) -> list[int]:
    """The likeliest token after each of `ids`, each in a step of its own."""
    engine.open_session("alone", WHOLE, len(ids))
    tokens = [(await likeliest(engine, "alone", at, [id], 1))[0] for at, id in enumerate(ids)]
    engine.close_session("alone")
    return tokens


@pytest.mark.parametrize("tokens", [1, 5, DECODE_ROWS, LONG])
async def test_hidden_states_are_given_for_the_rows_that_are_asked_for(engine: Engine, tokens: int) -> None:
    hidden = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(0))
    iterations: list[BatchReport] = []
    engine.on_batch = iterations.append
    engine.open_session("s", WHOLE, tokens)
    whole = await step(engine, "s", 0, hidden)
    assert whole.shape == (tokens, 32)
    await asyncio.sleep(0)  # the last iteration is counted once its result is out
    assert tokens < LONG or len(iterations) > 1
    for rows in {1, tokens // 2 + 1, tokens - 1, tokens} - {0}:
        given = await step(engine, "s", 0, hidden, rows=rows)
        assert given.shape == (rows, 32)
        assert torch.equal(given, whole[-rows:])
    engine.close_session("s")


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Qwen3Moe"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
async def test_tokens_of_many_rows_are_those_of_steps_one_by_one(
    family: str, dtype: str, checkpoint_of: Callable[[str], tuple[Path, Any]]
) -> None:
    """Few rows, as many as a long prefill has, and those of several sessions together."""
    model = resolve(str(checkpoint_of(family)[0]))
    ids = prompt_of(LONG)
    async with engine_of(model, dtype=dtype) as engine:
        expected = await one_by_one(engine, ids)
        for name in ("long", "short", "other"):
            engine.open_session(name, WHOLE, LONG)
        for rows in (0, 1, HEAD_ROWS + 9, LONG - 3):
            whole, few, one = await asyncio.gather(
                likeliest(engine, "long", 0, ids, rows),
                likeliest(engine, "short", 0, ids[:DECODE_ROWS], 5),
                likeliest(engine, "other", 0, ids[:1], 1),
            )
            assert whole == expected[-rows:]
            assert few == expected[DECODE_ROWS - 5 : DECODE_ROWS]
            assert one == expected[:1]
        for name in ("long", "short", "other"):
            engine.close_session(name)


@pytest.mark.skipif(not has_native(), reason="only native kernels give a row the same bits in any company")
async def test_logits_of_a_row_have_the_same_bits_in_any_company(engine: Engine) -> None:
    logits = engine._loaded.logits
    assert logits is not None
    rows = torch.randn(HEAD_ROWS, 32, generator=torch.Generator().manual_seed(0))
    whole = logits(rows)
    for some in (1, 2, 7, 16):
        assert torch.equal(torch.cat([logits(part) for part in rows.split(some)]), whole)


async def test_rows_that_nobody_asked_for_are_not_kept(engine: Engine) -> None:
    kept: list[int] = []
    hand_out = engine._hand_out

    def watch(pieces: Any, outcome: Any) -> None:
        kept.extend(piece.output.untyped_storage().nbytes() for piece in pieces)
        hand_out(pieces, outcome)

    engine._hand_out = watch  # type: ignore[method-assign]
    engine.open_session("s", WHOLE, LONG)
    await step(engine, "s", 0, torch.randn(LONG, 32), rows=2)
    assert len(kept) > 1
    assert sum(kept) == 2 * 32 * 4
    engine.close_session("s")


@pytest.mark.parametrize("rows", [-1, 6, 10**9])
async def test_more_rows_than_there_are_tokens_are_refused(engine: Engine, rows: int) -> None:
    engine.open_session("s", WHOLE, 40)
    with pytest.raises(StepError, match="cannot be answered") as refused:
        await step(engine, "s", 0, torch.randn(5, 32), rows=rows)
    assert refused.value.code == "bad_request"
    engine.close_session("s")


async def test_a_step_whose_logits_are_no_numbers_fails_alone(engine: Engine) -> None:
    for name in ("bad", "good"):
        engine.open_session(name, WHOLE, 40)
    ill = torch.full((3, 32), float("nan"))
    wire = engine.wire_form("exact")
    bad = engine.step(
        "bad", 0, ill.numpy().tobytes(), (3, 32), wire.wire_dtype, wire.codec, response_type="token_ids"
    )
    failed, given = await asyncio.gather(
        bad, likeliest(engine, "good", 0, prompt_of(4), 0), return_exceptions=True
    )
    assert isinstance(failed, StepError)
    assert failed.code == "internal"
    assert given == await one_by_one(engine, prompt_of(4))
    for name in ("bad", "good"):
        engine.close_session(name)


@pytest.mark.parametrize("tokens", [1, LONG])
async def test_a_token_is_sampled_as_a_client_would(engine: Engine, llama: Model, tokens: int) -> None:
    """Beside one that wants the likeliest tokens, and one that wants none."""
    head, prompt = Head.load(llama, "float32", "cpu"), prompt_of(tokens)
    for name in ("sampled", "likeliest", "plain"):
        engine.open_session(name, WHOLE, LONG)
    for number in range(8):
        sampling = Sampling(1.2, 50, 0.95, None, bytes([number]) * 16)
        sampled = engine.step(
            "sampled", 0, as_bytes(prompt), (tokens,), "uint32", "raw", rows=1, sampling=sampling
        )
        done, _, plain = await asyncio.gather(
            sampled, likeliest(engine, "likeliest", 0, prompt, 1), step_ids(engine, "plain", 0, prompt)
        )
        hidden = from_wire(done.data, done.shape, done.dtype, done.codec)
        assert torch.equal(hidden, plain[-1:])
        assert done.token == choose(head.logits(hidden)[0], sampling, tokens)
    for name in ("sampled", "likeliest", "plain"):
        engine.close_session(name)


PLAIN = Sampling(1.0, None, None, None, bytes(16))


@pytest.mark.parametrize("wish", [{"response_type": "token_ids"}, {"sampling": PLAIN}], ids=str)
async def test_tokens_are_chosen_where_the_model_ends_alone(llama: Model, wish: dict[str, Any]) -> None:
    async with engine_of(llama) as engine:
        engine.open_session("s", Span(0, 1), 4)
        with pytest.raises(StepError, match="last block"):
            await engine.step("s", 0, as_bytes([5]), (1,), "uint32", "raw", **wish)
        engine.close_session("s")


async def test_several_rows_that_are_verified_at_once_count_as_decode(engine: Engine) -> None:
    """A prefill beside them takes no more rows than beside as many that decode one by one."""
    iterations: list[BatchReport] = []
    engine.on_batch = iterations.append
    for name in ("drafts", "long"):
        engine.open_session(name, WHOLE, 300)
    await step(engine, "drafts", 0, torch.randn(DECODE_ROWS, 32))
    assert engine._decoding(engine._sessions.find("drafts").decoded_at) == [DECODE_ROWS]
    long = asyncio.create_task(step(engine, "long", 0, torch.randn(300, 32)))
    while not long.done():
        await step(engine, "drafts", 4, torch.randn(DECODE_ROWS, 32))
    shared = [one for one in iterations if one.decode_tokens and one.prefill_tokens]
    assert shared
    assert {one.decode_tokens for one in shared} == {DECODE_ROWS}
    for name in ("drafts", "long"):
        engine.close_session(name)


@pytest.mark.parametrize(
    ("dtype", "exact", "half"),
    [
        ("float32", ("float32", "raw"), ("float16", "scaled")),
        ("bfloat16", ("bfloat16", "raw"), ("bfloat16", "raw")),
    ],
)
def test_16_bits_a_value_are_for_servers_that_compute_in_more(
    dtype: str, exact: tuple[str, str], half: tuple[str, str]
) -> None:
    precision = choose_precision(dtype, CPU, torch.float32)
    assert form_of(precision, "exact") == exact
    assert form_of(precision, "half") == half
    assert form_of(precision, "int8") == ("int8", "blocks")


def form_of(precision: Precision, wish: str) -> tuple[str, str]:
    form = precision.wire_form(wish)
    return form.wire_dtype, form.codec


@pytest.mark.parametrize(("wire", "loss"), [("half", 1e-2), ("int8", 0.3)])
async def test_each_session_has_its_own_form_in_a_shared_batch(
    engine: Engine, wire: str, loss: float
) -> None:
    hidden = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    engine.open_session("exact", WHOLE, 40)
    engine.open_session("lean", WHOLE, 40, wire=wire)
    exact, lean = await asyncio.gather(
        step(engine, "exact", 0, hidden), step(engine, "lean", 0, hidden, wire=wire)
    )
    assert lean.dtype == torch.float32
    assert 0 < (lean - exact).abs().max() < loss * exact.abs().max()
    by_ids = await step_ids(engine, "lean", 0, prompt_of(3), wire=wire)
    assert by_ids.shape == (3, 32)
    for name in ("exact", "lean"):
        engine.close_session(name)


@pytest.mark.parametrize("wire", ["exact", "half", "int8"])
async def test_answers_are_as_long_as_the_wire_says(engine: Engine, wire: str) -> None:
    engine.open_session("s", WHOLE, 40, wire=wire)
    done = await engine.step("s", 0, as_bytes(prompt_of(7)), (7,), "uint32", "raw", rows=3)
    assert len(done.data) == tensor_bytes(done.shape, done.dtype, done.codec)  # type: ignore[arg-type]
    engine.close_session("s")


async def test_another_form_than_was_agreed_on_is_refused(engine: Engine) -> None:
    engine.open_session("s", WHOLE, 40, wire="half")
    with pytest.raises(StepError, match="travel as float16 scaled"):
        await step(engine, "s", 0, torch.randn(2, 32))
    engine.close_session("s")


async def test_the_last_span_alone_tells_tokens(llama: Model) -> None:
    async with engine_of(llama, Span(0, 5)) as first:
        first.open_session("s", first.span, 40)
        with pytest.raises(StepError, match="last block"):
            await likeliest(first, "s", 0, [5, 6], 2)
        first.close_session("s")
