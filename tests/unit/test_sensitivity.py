"""How far rounding alone carries results, and that nobody honest is taken for a liar because of it."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from swarm.blocks.engine import Engine, EngineConfig
from swarm.blocks.models import Model, resolve
from swarm.client.sensitivity import CALM, JITTER, Sensitivity, jittered, sensitivity
from swarm.client.verdict import TRUE, Allowance, Distance, Form, allowance
from swarm.kernels.codecs import from_wire, to_wire
from swarm.kernels.imprint import differences, projected
from swarm.spans import Span

ALLOWED = Allowance(mean=1.0, row=2.0, gap=3.0)
ROWS = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))

TOKENS = 64
BLOCKS = 6


def test_jitter_moves_every_value_a_little_and_always_the_same_way() -> None:
    moved = jittered(ROWS)
    torch.testing.assert_close((moved - ROWS).abs(), ROWS.abs() * JITTER, rtol=1e-3, atol=0)
    assert (moved == jittered(ROWS)).all()
    assert 0.4 < (moved > ROWS).float().mean() < 0.6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_jitter_moves_is_not_lost_on_the_way(dtype: torch.dtype) -> None:
    assert (jittered(ROWS.to(dtype)).to(dtype) != ROWS.to(dtype)).all()


def test_what_hands_differences_on_as_they_come_allows_no_more() -> None:
    found = sensitivity(ROWS, 3 * ROWS, 3 * jittered(ROWS))
    assert found.growth == pytest.approx(1.0, rel=1e-3)
    assert found.of(ALLOWED).mean == pytest.approx(ALLOWED.mean, rel=1e-3)
    calmer = sensitivity(ROWS, ROWS, ROWS)
    assert calmer.growth == 0
    assert calmer.of(ALLOWED) == CALM.of(ALLOWED) == ALLOWED


def test_where_differences_grow_more_is_allowed() -> None:
    found = sensitivity(ROWS, ROWS, ROWS + 5 * (jittered(ROWS) - ROWS))
    assert 4 < found.growth < 6
    allowed = found.of(ALLOWED)
    assert (allowed.mean, allowed.gap) == (found.growth * ALLOWED.mean, found.growth * ALLOWED.gap)
    assert found.joined(CALM) == found


def test_a_row_may_differ_by_as_much_as_any_was_moved() -> None:
    """As where another expert is chosen."""
    moved = jittered(ROWS)
    moved[3] = -ROWS[3]
    found = sensitivity(ROWS, ROWS, moved)
    assert found.row > 0.5
    assert found.of(Allowance(1e-4, 1e-3, 1e-3)).row == found.row


def test_no_inputs_at_all_prove_nothing() -> None:
    assert sensitivity(torch.zeros(2, 8), ROWS[:2], ROWS[2:4]).growth == 1


@pytest.mark.parametrize("family", ["Llama", "Gemma3", "Mixtral", "Qwen3Moe", "GptOss"])
def test_honest_peers_of_other_dtypes_are_not_taken_for_liars(
    family: str, checkpoint_of: Callable[[str], tuple[Path, Any]]
) -> None:
    """Not even where tokens go to experts, of which rounding may choose another."""
    model = resolve(str(checkpoint_of(family)[0]))
    inputs = torch.randn(TOKENS, model.hidden_size, generator=torch.Generator().manual_seed(0))
    true = run(model, TRUE, inputs)
    found = sensitivity(inputs, true, run(model, TRUE, jittered(inputs)))
    for form in [("float16", "none"), ("bfloat16", "none"), ("float32", "int8"), ("bfloat16", "int8")]:
        given = run(model, form, inputs)
        assert not differs(given, true, form, found), form
    other = torch.randn(TOKENS, model.hidden_size, generator=torch.Generator().manual_seed(1))
    assert differs(run(model, TRUE, other), true, TRUE, found), "results of another text"


def differs(given: Tensor, true: Tensor, form: Form, found: Sensitivity) -> bool:
    distance = Distance.of(differences(projected(given.numpy()), projected(true.numpy())))
    return distance.exceeds(found.of(allowance([form, TRUE], "raw", BLOCKS)))


def run(model: Model, form: Form, inputs: Tensor) -> Tensor:
    """What an engine makes of the inputs that computes so."""

    async def computed() -> Tensor:
        dtype, quantize = form
        config = EngineConfig(dtype=dtype, device="cpu", quantize=quantize, kv_tokens=TOKENS)
        engine = await Engine.load(model, Span(0, model.num_blocks), config)
        engine.open_session("one", engine.span, TOKENS)
        wire = engine.precision.wire_dtype, engine.precision.codec
        done = await engine.step("one", 0, to_wire(inputs, *wire), tuple(inputs.shape), *wire)
        engine.close()
        return from_wire(done.data, done.shape, done.dtype, done.codec).float()

    return asyncio.run(computed())
