"""Sampling: the same distribution as transformers' generate, seeds, and refused values."""

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import msgspec
import pytest
import torch
from transformers.generation.logits_process import TopPLogitsWarper

from swarm.blocks.choosing import choose, processed
from swarm.client.options import GenerationOptions, SamplingOptions, generation_options
from swarm.client.sampling import Sampler
from swarm.errors import InputError
from swarm.sampling import Sampling
from tests.tiny import tiny_model

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])


class Anything:
    """A constraint that allows all."""

    def allowed(self, tokens: Sequence[int]) -> torch.Tensor:
        return torch.ones(len(LOGITS), dtype=torch.bool)


def drawn(sampler: Sampler, logits: torch.Tensor, draws: int) -> list[int]:
    """One token for each of the first `draws` positions."""
    return [sampler.choose([5] * at, logits.clone()) for at in range(draws)]


def scores(options: SamplingOptions, tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
    """Logits [vocabulary] as tokens are sampled by them."""
    sampler = Sampler(options)
    return processed(sampler.adjusted(tokens, logits), sampler.sampling)


def seen(options: SamplingOptions, draws: int = 300) -> set[int]:
    return set(drawn(Sampler(options), LOGITS, draws))


def test_temperature_zero_takes_the_likeliest() -> None:
    assert seen(SamplingOptions(top_k=3, top_p=0.1, min_p=0.9), draws=5) == {0}


@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 1e-6, 1e-5, 1e-4])
def test_the_smallest_temperatures_take_the_likeliest_too(temperature: float) -> None:
    for options in ({}, {"top_k": 2}, {"top_p": 5e-324}, {"min_p": 5e-324}, {"repetition_penalty": 0.01}):
        assert seen(SamplingOptions(temperature=temperature, **options), draws=5) == {0}


def test_top_k_top_p_and_min_p_bound_what_is_drawn() -> None:
    assert seen(SamplingOptions(temperature=5.0, top_k=2, seed=1)) == {0, 1}
    assert seen(SamplingOptions(temperature=1.0, top_p=0.5, seed=1)) == {0}
    assert seen(SamplingOptions(temperature=1.0, min_p=0.3, seed=1)) == {0, 1}
    assert seen(SamplingOptions(temperature=50.0, seed=1)) == {0, 1, 2, 3, 4, 5}


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    sampler = Sampler(SamplingOptions(temperature=1.0, seed=7))
    tokens = torch.tensor(drawn(sampler, LOGITS, 6_000))
    often = torch.bincount(tokens, minlength=len(LOGITS)) / len(tokens)
    torch.testing.assert_close(often, LOGITS.softmax(-1), atol=0.02, rtol=0)


def test_what_is_left_out_is_never_drawn() -> None:
    sampler = Sampler(SamplingOptions(temperature=1.0, seed=7))
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf])
    assert set(drawn(sampler, logits, 1000)) == {1, 3}


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_leaves_out_what_transformers_does(top_p: float) -> None:
    logits = 3 * torch.randn(1, 5000, generator=torch.Generator().manual_seed(3))
    theirs = TopPLogitsWarper(top_p)(None, logits)
    ours = scores(SamplingOptions(temperature=1.0, top_p=top_p), [], logits[0])
    assert torch.equal(ours, theirs[0])


def test_repetition_penalty_sees_the_prompt() -> None:
    assert Sampler(SamplingOptions(repetition_penalty=3.0)).choose([0, 0], LOGITS.clone()) == 1


def test_presence_and_frequency_count_the_answer_alone() -> None:
    options = SamplingOptions(presence_penalty=0.6, frequency_penalty=0.5)
    sampler = Sampler(options, first=2)
    chosen = [sampler.choose([0, 0, *answer], LOGITS.clone()) for answer in ([], [0], [0, 1], [0, 1, 0])]
    assert chosen == [0, 1, 0, 2]  # 2.0 and 1.0; 0.9 and 1.0; 0.9, -0.1 and 0.5; 0.4, -0.1 and 0.5


def test_a_bias_forces_and_bans() -> None:
    forced = Sampler(SamplingOptions(logit_bias={4: 100.0, 99: 100.0}))
    assert forced.choose([], LOGITS.clone()) == 4
    banned = SamplingOptions(temperature=5.0, seed=1, logit_bias={0: -100, 2: -100.0})
    assert seen(banned) == {1, 3, 4, 5}


def test_what_reads_the_tokens_before_is_not_left_to_the_last_hop() -> None:
    for plain in ({}, {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "min_p": 0.1, "seed": 3}):
        assert Sampler(SamplingOptions(**plain)).by_logits_alone is not None
    for name, value in {
        "presence_penalty": 1.0,
        "frequency_penalty": -1.0,
        "repetition_penalty": 1.1,
        "logit_bias": {1: 1.0},
    }.items():
        assert Sampler(SamplingOptions(**{name: value})).by_logits_alone is None
    assert Sampler(SamplingOptions(), constraint=Anything()).by_logits_alone is None


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1, "top_k": 10**30},
        {"temperature": 1e38, "top_p": 1, "min_p": 0},
        {"temperature": 0.7, "top_k": 40, "top_p": 5e-324, "min_p": 1.0, "seed": 2**63 - 1},
    ],
)
def test_a_hop_that_is_told_how_chooses_the_same(options: dict[str, Any]) -> None:
    sampler = Sampler(SamplingOptions(**options))
    told = msgspec.msgpack.decode(msgspec.msgpack.encode(sampler.by_logits_alone), type=Sampling)
    rows = torch.randn(200, 50, generator=torch.Generator().manual_seed(3))
    for at, logits in enumerate(rows):
        assert choose(logits, told, at) == sampler.choose([5] * at, logits)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_strangers_ask_for_is_bounded_or_harmless(number: float) -> None:
    key = bytes(16)
    for asked in ((number, None, None, None, key), (1.0, 0, None, None, key), (1.0, None, number, None, key)):
        with suppress(msgspec.ValidationError):
            told = msgspec.msgpack.decode(msgspec.msgpack.encode(asked), type=Sampling)
            assert 0 <= choose(LOGITS, told, 7) < len(LOGITS)


def test_additions_leave_the_models_logits_as_they_are() -> None:
    logits = LOGITS.clone()
    options = SamplingOptions(presence_penalty=1.0, logit_bias={1: 1.0})
    Sampler(options).choose([0, 1], logits)
    assert torch.equal(logits, LOGITS)


def test_seeds() -> None:
    def draw(seed: int | None) -> list[int]:
        return drawn(Sampler(SamplingOptions(temperature=9.0, seed=seed)), LOGITS, 30)

    assert draw(3) == draw(3) != draw(4)
    assert draw(None) != draw(None)


def test_a_number_belongs_to_its_position_however_often_and_in_whatever_order() -> None:
    logits = torch.zeros(50)
    options = SamplingOptions(temperature=1.0, seed=3)
    sampler = Sampler(options, first=2)
    in_order = [sampler.choose([0] * length, logits) for length in range(2, 12)]
    assert len(set(in_order)) > 4
    assert [sampler.choose([0] * length, logits) for length in range(2, 12)] == in_order
    other = Sampler(options, first=2)
    assert [other.choose([0] * length, logits) for length in reversed(range(2, 12))] == in_order[::-1]
    later = Sampler(options, first=6)
    assert [later.choose([0] * length, logits) for length in range(6, 12)] == in_order[4:]


def test_own_generator_leaves_the_global_one_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    Sampler(SamplingOptions(temperature=1.0, seed=5)).choose([1], LOGITS.clone())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.8, "repetition_penalty": 1.4},
        {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1},
    ],
)
def test_scores_are_those_of_transformers_generate(options: dict[str, Any]) -> None:
    model = tiny_model("Llama")
    prompt = [5, 9, 9, 30, 77]
    ids = torch.tensor([prompt])
    theirs = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=1,
        do_sample=True,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **{"top_k": 0, **options},
    ).scores[0]
    with torch.inference_mode():
        logits = model(ids).logits[0, -1]
    torch.testing.assert_close(scores(SamplingOptions(**options), prompt, logits), theirs[0])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("nan")),
        ("seed", -1),
        ("presence_penalty", 2.5),
        ("frequency_penalty", float("nan")),
        ("seed", 2**63),
    ],
)
def test_values_out_of_range_are_refused_in_a_sentence(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"^{name} is {value}\. Choose a value ") as caught:
        SamplingOptions(**{name: value})
    assert caught.value.exit_code == 2


def test_options_are_sorted_and_unknown_ones_refused() -> None:
    options = generation_options({"temperature": 0.5, "stop": "END", "max_new_tokens": 3})
    assert options == GenerationOptions(3, SamplingOptions(temperature=0.5), ("END",))
    assert generation_options({"stop": ["a", "b"]}).stop == ("a", "b")
    with pytest.raises(TypeError, match="temprature"):
        generation_options({"temprature": 1.0})  # type: ignore[typeddict-unknown-key]
