"""How many tokens are drafted: the chooser, the pace of steps, acceptance; and what prompt lookup finds."""

import random
from collections.abc import Sequence

import pytest

from swarm.client.__main__ import parser
from swarm.client.drafting import PRIORS, SIZES, PromptLookup
from swarm.client.speculation import MAX_DRAFT, Acceptance, StepPace, draft_count
from swarm.client.terminal import answer_options


def pace(fixed: float, per_row: float, steps: int = 40, noise: float = 0.0) -> StepPace:
    """Learned from steps of one to eight rows, of which the first takes `fixed` seconds."""
    learned, rng = StepPace(), random.Random(1)
    for step in range(steps):
        rows = 1 + step % 8
        learned.learn(rows, (fixed + per_row * (rows - 1)) * (1 + noise * rng.uniform(-1, 1)))
    return learned


def odds(rate: float) -> list[float]:
    return [rate] * MAX_DRAFT


def test_drafts_must_be_faster_than_hops_that_go_by_themselves() -> None:
    learned = pace(0.3, 0.005)
    assert draft_count(odds(0.6), learned) > 0
    learned.learn_round(0.05)
    assert learned.plain == pytest.approx(0.05)
    assert draft_count(odds(0.6), learned) == 0
    assert draft_count(odds(0.97), learned) == MAX_DRAFT
    for _ in range(100):
        learned.learn_round(0.4)
    assert learned.plain == learned.seconds(1)


def test_slow_links_and_good_drafts_draft_many() -> None:
    assert draft_count(odds(0.8), pace(0.3, 0.005)) >= 8
    assert draft_count(odds(0.97), pace(0.3, 0.005)) == MAX_DRAFT
    assert draft_count(odds(0.99), pace(0.1, 0.002)) == MAX_DRAFT


def test_costly_rows_on_a_fast_link_draft_none() -> None:
    assert draft_count(odds(0.8), pace(0.0005, 0.0005)) == 0
    assert draft_count(odds(0.3), pace(0.015, 0.005)) == 0


def test_in_between_drafts_some() -> None:
    assert 1 <= draft_count(odds(0.8), pace(0.015, 0.003)) <= 5
    assert 1 <= draft_count(odds(0.4), pace(0.3, 0.01)) <= 4


def test_more_is_drafted_the_slower_the_link_and_the_better_the_drafts() -> None:
    by_link = [draft_count(odds(0.8), pace(fixed, 0.005)) for fixed in (0.005, 0.02, 0.1, 0.3)]
    by_odds = [draft_count(odds(rate), pace(0.2, 0.005)) for rate in (0.02, 0.3, 0.6, 0.9)]
    assert by_link == sorted(by_link)
    assert by_odds == sorted(by_odds)
    assert by_link[0] < by_link[-1]
    assert by_odds[0] == 0


def test_drafting_that_takes_long_is_not_worth_it() -> None:
    assert draft_count(odds(0.7), pace(0.1, 0.002), seconds_each=0.005) > 1
    assert draft_count(odds(0.7), pace(0.1, 0.002), seconds_each=0.2) == 0


def test_nothing_is_drafted_without_odds_or_before_a_step_was_seen() -> None:
    assert draft_count([], pace(0.3, 0.001)) == 0
    assert draft_count(odds(0.99), StepPace()) == 0
    timeless = StepPace()
    timeless.learn(1, 0.0)
    assert draft_count(odds(0.99), timeless) == 0


def test_one_plain_step_is_enough_to_begin() -> None:
    fresh = StepPace()
    fresh.learn(1, 0.3)
    assert draft_count(odds(0.8), fresh) >= 3
    assert draft_count(odds(0.15), fresh) <= 1


def test_pace_is_the_line_through_noisy_steps() -> None:
    learned = pace(0.1, 0.01, steps=200, noise=0.05)
    assert learned.seconds(1) == pytest.approx(0.1, rel=0.1)
    assert learned.seconds(16) == pytest.approx(0.25, rel=0.1)


def test_pace_follows_a_route_that_changes() -> None:
    learned = pace(0.1, 0.01)
    for rows in (1, 4, 2, 6) * 12:
        learned.learn(rows, 0.02 + 0.002 * (rows - 1))
    assert learned.seconds(1) == pytest.approx(0.02, rel=0.15)
    assert learned.seconds(8) == pytest.approx(0.034, rel=0.2)


def test_a_step_that_waited_for_a_new_hop_hardly_counts() -> None:
    learned = pace(0.1, 0.01)
    learned.learn(1, 30.0)
    assert learned.seconds(1) < 0.2


def test_pace_never_says_that_more_rows_take_less() -> None:
    learned = StepPace()
    for _ in range(10):
        learned.learn(1, 0.3)
        learned.learn(9, 0.1)
    assert learned.seconds(16) >= learned.seconds(1) > 0


def test_rows_once_found_costly_are_tried_again_in_time() -> None:
    learned = StepPace()
    for rows, seconds in ((1, 0.02), (5, 0.12), (3, 0.07), (1, 0.02), (5, 0.12)):
        learned.learn(rows, seconds)
    assert draft_count(odds(0.7), learned) == 0
    for _ in range(60):
        learned.learn(1, 0.02)
    assert draft_count(odds(0.7), learned) > 0


def test_acceptance_begins_with_its_prior_and_follows_the_newest() -> None:
    kind = Acceptance(0.5)
    assert kind.rate == 0.5
    for _ in range(60):
        kind.learn(True)
    assert kind.rate > 0.85
    for _ in range(60):
        kind.learn(False)
    assert kind.rate < 0.15
    for _ in range(200):
        kind.fade()
    assert kind.rate == pytest.approx(0.5, abs=0.01)


async def drafted(tokens: Sequence[int], count: int) -> list[int]:
    lookup = PromptLookup(tokens[:3])
    for token in tokens[3:]:
        lookup.push(token)
    return await lookup.draft(count)


async def test_lookup_continues_as_the_same_run_did_last() -> None:
    text = [1, 2, 3, 4, 5, 6, 7, 1, 2, 9, 9, 1, 2]
    assert await drafted(text, 3) == [9, 9, 1]  # most recent
    assert await drafted([*text, 3], 3) == [4, 5, 6]  # the longer run tells better
    assert await drafted([1, 2, 3, 4], 3) == []


async def test_lookup_goes_on_in_circles() -> None:
    assert await drafted([5, 6, 7, 5, 6, 7, 5], 8) == [6, 7, 5, 6, 7, 5, 6, 7]
    assert await drafted([4, 4, 4], 5) == [4] * 5


async def test_lookup_is_what_a_search_of_the_whole_sequence_finds() -> None:
    rng = random.Random(5)
    tokens = [rng.randrange(4) for _ in range(400)]
    lookup = PromptLookup(tokens[:50])
    for end in range(50, 400):
        expected: list[int] = []
        for size in SIZES:
            ends = [at for at in range(size, end) if tokens[at - size : at] == tokens[end - size : end]]
            if ends:
                expected = tokens[ends[-1] : min(ends[-1] + 4, end)]
        assert (await lookup.draft(4))[: len(expected)] == expected
        assert bool(lookup.odds()) == bool(expected)
        lookup.push(tokens[end])


def test_lookup_learns_without_being_asked() -> None:
    random_text, rng = PromptLookup([0, 1, 2]), random.Random(2)
    circle = PromptLookup([0, 1, 2])
    for step in range(400):
        random_text.push(rng.randrange(20))
        circle.push(step % 20)
    assert circle.odds()[0] > 0.9
    for _ in range(200):  # until a run of two comes up
        if random_text.odds():
            break
        random_text.push(rng.randrange(20))
    assert random_text.odds()[0] < PRIORS[0]


def test_longer_runs_have_better_odds_further_on() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 1, 2])
    assert lookup.odds()[0] == PRIORS[0]
    assert lookup.odds()[-1] == PRIORS[-1]
    assert len(lookup.odds()) == MAX_DRAFT
    assert PromptLookup([1, 2, 3, 4]).odds() == ()
    assert PromptLookup([]).odds() == ()


def test_the_command_line_speculates_unless_told_not_to() -> None:
    for arguments, speculates, model in (
        (["generate", "hi"], True, None),
        (["chat", "--no-speculation"], False, None),
        (["generate", "hi", "--draft-model", "small"], True, "small"),
    ):
        args = parser().parse_args(arguments)
        assert answer_options(args)["speculate"] is speculates
        assert args.draft_model == model
