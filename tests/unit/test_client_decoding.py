"""Decoding several tokens a step: the answers of one at a time, their distribution, and fewer steps."""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import Any

import pytest

from swarm.client.conversation import Superseded
from swarm.client.decoding import agreed, own_tokens
from swarm.client.generation import Generation
from swarm.client.options import GenerationOptions, SamplingOptions, generation_options
from swarm.client.sampling import Sampler
from swarm.net.virtual_time import in_virtual_time
from tests.fake_session import EOS, VOCABULARY, FakeEnds, talk

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 3, 1, 4]

CHOICES: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.3},
    {"temperature": 0.3},
    {"temperature": 0.9, "top_k": 3},
    {"temperature": 0.9, "top_p": 0.7},
    {"temperature": 0.7, "min_p": 0.2},
    {"temperature": 0.6, "repetition_penalty": 1.1, "top_k": 6, "top_p": 0.95, "min_p": 0.01},
    {"temperature": 0.4, "stop": ["ab", "fc", "dd"]},
    {"temperature": 0.3, "ignore_eos": True, "max_new_tokens": 50},
    {"temperature": 0.3, "max_new_tokens": 16},
]


class Guesses:
    """Drafts at random, always as much as it may: mostly wrong, sometimes right."""

    seconds_each = 0.0

    def __init__(self, tokens: Sequence[int], sampler: object):
        self._random = random.Random(sum(tokens))
        self.pushed = list(tokens)

    def push(self, token: int) -> None:
        self.pushed.append(token)

    def odds(self) -> Sequence[float]:
        return [0.9] * 15

    async def draft(self, count: int) -> list[int]:
        return [self._random.randrange(VOCABULARY) for _ in range(count)]

    def close(self) -> None:
        pass


def essence(answer: Generation) -> tuple[Any, ...]:
    return answer.token_ids, answer.text, answer.finish_reason


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("drafter", [None, Guesses])
@in_virtual_time
async def test_answers_are_the_same_with_and_without(choice: dict[str, Any], drafter: Any) -> None:
    drafted = accepted = 0
    for seed in range(8):
        options: Any = {"seed": seed, "max_new_tokens": 25, **choice}
        ends = FakeEnds(seed, sharpness=3.0, eos=-0.2)
        more = {"drafter": drafter} if drafter else {}
        shapes = {"takes_token_ids": seed % 2 == 0, "gives_token_ids": seed % 3 == 0}
        async with talk(ends, **shapes) as plain:
            expected = await plain.answer(PROMPT, generation_options({**options, "speculate": False}))
        async with talk(ends, **shapes) as quick:
            found = await quick.answer(PROMPT, generation_options(options), **more)
        assert essence(found) == essence(expected)
        assert expected.speculation.drafted == 0
        drafted += found.speculation.drafted
        accepted += found.speculation.accepted
    assert drafted > 0 or "stop" in choice, "these answers are short"
    if drafter is Guesses:
        assert accepted < drafted
    if drafter is Guesses or not choice:
        assert accepted > 0 or "stop" in choice


@in_virtual_time
async def test_ends_of_all_kinds_fall_within_accepted_drafts() -> None:
    """End-of-text, stop strings and the last token allowed are each met behind an accepted draft."""
    ended: Counter[str] = Counter()
    for seed, choice in product(range(90), ({}, {"stop": ["fa", "bc", "ed"]}, {"max_new_tokens": 9})):
        async with talk(FakeEnds(seed, sharpness=2.0, eos=0.0)) as quick:
            options: Any = {"temperature": 0.8, "seed": seed, "max_new_tokens": 60, **choice}
            answer = await quick.answer(PROMPT, generation_options(options), drafter=Guesses)
            held = quick.sessions[0].tokens
        whole = [*PROMPT, *answer.token_ids]
        if held[: len(whole)] == whole:  # the last token too was stepped: as a draft
            ended[f"{answer.finish_reason} {sorted(choice)}"] += 1
    assert set(ended) >= {"stop []", "stop ['stop']"}, ended
    # an answer that fills its room never drafts what it cannot use
    assert "length ['max_new_tokens']" not in ended


@in_virtual_time
async def test_drafts_fit_the_session_and_the_context() -> None:
    for context, most in ((20, 100), (40, 7), (500, 30)):
        async with talk(FakeEnds(sharpness=9.0), context=context) as quick:
            options = GenerationOptions(max_new_tokens=most, ignore_eos=True)
            answer = await quick.answer(PROMPT, options, drafter=Guesses)
            assert len(answer.token_ids) == min(most, context - len(PROMPT))
            assert answer.finish_reason == "length"


@in_virtual_time
async def test_next_turn_continues_behind_refused_drafts() -> None:
    options = GenerationOptions(max_new_tokens=12, ignore_eos=True)
    async with talk(room=200) as quick:
        first = await quick.answer(PROMPT, options, drafter=Guesses)
        longer = [*PROMPT, *first.token_ids, 1, 2, 3]
        second = await quick.answer(longer, options, drafter=Guesses)
        assert second.cached_tokens >= len(PROMPT) + 11
        assert len(quick.sessions) == 1
    async with talk() as plain:
        expected = await plain.answer(longer, GenerationOptions(max_new_tokens=12, ignore_eos=True))
    assert second.token_ids == expected.token_ids


@in_virtual_time
async def test_drafter_hears_every_token_of_the_answer_once() -> None:
    made: list[Guesses] = []

    def drafter(tokens: Sequence[int], sampler: object) -> Guesses:
        made.append(Guesses(tokens, sampler))
        return made[-1]

    async with talk() as quick:
        answer = await quick.answer(PROMPT, GenerationOptions(max_new_tokens=20), drafter=drafter)
    assert made[0].pushed[: len(PROMPT) + len(answer.token_ids)] == [*PROMPT, *answer.token_ids]


@in_virtual_time
async def test_report_counts_steps_and_recoveries_of_this_answer() -> None:
    options = GenerationOptions(max_new_tokens=10, ignore_eos=True)
    async with talk(room=200) as quick:
        first = await quick.answer(PROMPT, options)
        session = quick.sessions[0]
        assert first.recoveries == 0
        assert first.speculation.steps == len(session.steps) - 1
        assert 1 + first.speculation.steps + first.speculation.accepted == 10
        assert first.speculation.drafted == sum(count - 1 for _, count in session.steps[1:])
        session.recoveries, session.replayed_tokens, session.journal_bytes = 2, 50, 4096
        stream = quick.stream([*PROMPT, *first.token_ids, 1], options)
        async for _ in stream:
            session.recoveries, session.replayed_tokens = 3, 90
        second = stream.generation
    assert second is not None
    said = second.as_json()
    assert (said["recoveries"], said["replayed_tokens"], said["journal_bytes"]) == (1, 40, 4096)
    assert said["speculation"] == {
        "drafted": second.speculation.drafted,
        "accepted": second.speculation.accepted,
        "steps": second.speculation.steps,
    }


@in_virtual_time
async def test_ended_session_is_replaced_at_the_next_turn() -> None:
    options = GenerationOptions(max_new_tokens=4, ignore_eos=True)
    async with talk(room=100) as quick:
        first = await quick.answer(PROMPT, options)
        quick.sessions[0].recoveries = 7
        await quick.sessions[0].close()
        again = await quick.answer(PROMPT, options)
        assert again.token_ids == first.token_ids
        assert again.recoveries == 0
        assert len(quick.sessions) == 2


@in_virtual_time
async def test_stopped_answer_shows_no_more_of_an_accepted_draft() -> None:
    async with talk(FakeEnds(sharpness=9.0)) as quick:
        stream = quick.stream(PROMPT, GenerationOptions(max_new_tokens=100, ignore_eos=True))
        pieces = []
        async for piece in stream:
            pieces.append(piece)
            if len(quick.sessions[0].steps) > 4:
                stream.stop()
    assert stream.generation is not None
    assert stream.generation.finish_reason == "cancelled"
    assert stream.generation.text == "".join(pieces)
    assert stream.generation.speculation.accepted > len(pieces) - 6


@in_virtual_time
async def test_superseded_answer_is_given_up() -> None:
    options = GenerationOptions(max_new_tokens=50, ignore_eos=True)
    async with talk(room=200) as quick:
        older = quick.stream(PROMPT, options)
        await anext(aiter(older))
        newer = await quick.answer(PROMPT[:5], options)
        assert len(newer.token_ids) == 50
        with pytest.raises(Superseded):
            await older.result()


async def seconds_for(
    ends: FakeEnds, speculate: bool, *, fixed: float, per_row: float, sampled: bool
) -> float:
    sampling = SamplingOptions(temperature=1.0, seed=1) if sampled else SamplingOptions()
    options = GenerationOptions(max_new_tokens=200, ignore_eos=True, speculate=speculate, sampling=sampling)
    async with talk(ends, fixed=fixed, per_row=per_row) as one:
        answer = await one.answer(PROMPT, options)
    return 1 / answer.tokens_per_s


@in_virtual_time
async def test_text_that_repeats_is_much_faster_where_links_are_slow() -> None:
    ends = FakeEnds(sharpness=9.0)  # greedy, so it runs in a circle before long
    plain = await seconds_for(ends, False, fixed=0.36, per_row=0.006, sampled=False)
    quick = await seconds_for(ends, True, fixed=0.36, per_row=0.006, sampled=False)
    assert plain / quick > 4


@pytest.mark.parametrize(("fixed", "per_row"), [(0.36, 0.006), (0.015, 0.004), (0.002, 0.002)])
@in_virtual_time
async def test_text_that_does_not_repeat_is_not_slower(fixed: float, per_row: float) -> None:
    ends = FakeEnds(sharpness=0.0, eos=0.0)  # every token is as likely as every other
    plain = await seconds_for(ends, False, fixed=fixed, per_row=per_row, sampled=True)
    quick = await seconds_for(ends, True, fixed=fixed, per_row=per_row, sampled=True)
    assert plain / quick > 0.95


def test_agreed_takes_the_models_own_tokens_up_to_the_first_difference() -> None:
    def own(*tokens: int) -> Iterable[int]:
        yield from tokens
        raise AssertionError("what lies behind the difference was computed for another sequence")

    assert agreed([], own(7)) == [7]
    assert agreed([7, 8], own(9)) == [9]
    assert agreed([7, 8, 9], own(7, 1)) == [7, 1]
    assert agreed([7, 8], iter([7, 8, 3])) == [7, 8, 3]


Agree = Callable[[Sequence[int], Iterable[int]], list[int]]


def surprise(agree: Agree, drafted: Sequence[int], draws: int = 2000) -> float:
    """Chi-square of the first two tokens after a prompt, drafted as told, against what the model gives them.

    Two tokens of the vocabulary's twelve have 143 degrees of freedom: above 201 in one of a thousand cases.
    """
    ends = FakeEnds(seed=4, sharpness=0.7, eos=0.0)
    counts: Counter[tuple[int, ...]] = Counter()
    for seed in range(draws):
        sampler = Sampler(SamplingOptions(temperature=1.0, seed=seed), first=len(PROMPT))
        chosen: list[int] = []
        while len(chosen) < 2:
            tokens = [*PROMPT, *chosen]
            draft = drafted[len(chosen) : 2]
            rows = [ends.after([*tokens, *draft[:count]]) for count in range(len(draft) + 1)]
            chosen += agree(draft, own_tokens(sampler, tokens, draft, rows))
        counts[tuple(chosen[:2])] += 1
    first = ends.after(PROMPT).softmax(-1)
    total = 0.0
    for one, two in product(range(VOCABULARY), repeat=2):
        expected = draws * float(first[one] * ends.after([*PROMPT, one]).softmax(-1)[two])
        total += (counts[one, two] - expected) ** 2 / expected
    return total


@pytest.mark.parametrize("drafted", [[], [5, 2], [0, EOS]])
def test_sampled_tokens_keep_the_models_distribution(drafted: list[int]) -> None:
    assert surprise(agreed, drafted) < 201


def test_a_biased_acceptance_would_be_noticed() -> None:
    lenient = random.Random(1)

    def biased(drafted: Sequence[int], own: Iterable[int]) -> list[int]:
        """Lets a wrong draft pass one time in ten."""
        chosen = agreed(drafted, own)
        if len(chosen) <= len(drafted) and lenient.random() < 0.1:
            chosen[-1] = drafted[len(chosen) - 1]
        return chosen

    assert surprise(biased, [5, 2]) > 201
