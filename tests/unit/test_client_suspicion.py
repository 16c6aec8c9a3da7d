"""How soon a missing answer is suspected, how seldom one that is only late, on synthetic response times."""

import random
from itertools import islice

import pytest

from swarm.client.suspicion import ResponseTimes

SAMPLES = 30_000


def seen(times: list[float], tokens: int = 1) -> ResponseTimes:
    response_times = ResponseTimes()
    for seconds in times:
        response_times.add(tokens, seconds)
    return response_times


def noisy(median: float, spread: float, count: int, seed: int = 0) -> list[float]:
    luck = random.Random(seed)
    return [median * luck.lognormvariate(0, spread) for _ in range(count)]


@pytest.mark.parametrize(
    ("median", "spread", "at_most"),
    [
        (0.02, 0.1, 1.0),
        (0.1, 0.3, 1.0),
        (0.3, 0.1, 1.0),
        (1.0, 0.0, 2.5),
        (1.0, 0.1, 2.8),
        (1.0, 0.3, 8.0),
        (5.0, 0.1, 14.0),
    ],
)
def test_a_missing_answer_is_soon_suspected(median: float, spread: float, at_most: float) -> None:
    for seed in range(20):
        patience = seen(noisy(median, spread, 200, seed)).patience(1)
        assert max(1.0, 1.25 * median, median + 0.3) <= patience <= at_most


@pytest.mark.parametrize("median", [0.5, 2.0])
@pytest.mark.parametrize("spread", [0.05, 0.2, 0.5])
def test_an_answer_that_is_only_late_is_hardly_ever_suspected(median: float, spread: float) -> None:
    times, alarms = ResponseTimes(), 0
    for seconds in noisy(median, spread, SAMPLES):
        alarms += seconds > times.patience(1, expected=median)
        times.add(1, seconds)
    assert alarms < 1e-4 * SAMPLES


def test_a_few_samples_do_not_make_it_sure() -> None:
    alarms = 0
    for seed in range(5_000):
        *few, last = noisy(2.0, 0.3, 4, seed)
        alarms += last > seen(few).patience(1)
    assert alarms <= 1


@pytest.mark.parametrize("tokens", [1, 128])
def test_one_outlier_changes_little(tokens: int) -> None:
    steady = noisy(2.0, 0.1, 100)
    before = seen(steady, tokens).patience(tokens)
    for outlier in (600.0, 0.0):
        assert seen([*steady, outlier], tokens).patience(tokens) == pytest.approx(before, rel=0.1)
        assert seen([*steady, outlier, *steady], tokens).patience(tokens) == pytest.approx(before, rel=0.1)


def test_a_first_sample_that_is_an_outlier_is_forgotten() -> None:
    assert seen([60.0, *noisy(0.5, 0.1, 40)]).patience(1) < 3.0


@pytest.mark.parametrize("factor", [3.0, 10.0])
def test_it_adapts_to_a_hop_that_becomes_slower(factor: float) -> None:
    times = seen(noisy(1.0, 0.1, 200))
    steps = 0
    slower = iter(noisy(factor, 0.1, 1_000, seed=1))
    for seconds in slower:
        steps += 1
        times.add(1, seconds)
        if seconds < times.patience(1):
            break
    assert steps <= 4
    for seconds in islice(slower, 300):
        times.add(1, seconds)
        assert factor < times.patience(1) < 20 * factor
    assert times.patience(1) < 3 * factor


def test_it_adapts_to_a_hop_that_becomes_faster() -> None:
    times = seen(noisy(10.0, 0.1, 200))
    for seconds in noisy(1.0, 0.1, 200, seed=1):
        times.add(1, seconds)
    assert times.patience(1) < 3.0


def test_prefill_is_learnt_for_each_token() -> None:
    times = seen(noisy(2.0, 0.05, 50), tokens=128)
    assert times.patience(256) == pytest.approx(2 * times.patience(128))
    assert 4.0 < times.patience(256) < 12.0


def test_decode_and_prefill_are_learnt_apart() -> None:
    times = seen([4.0] * 50, tokens=128)
    assert times.patience(1, expected=0.1) == 6.0
    times.add(1, 0.1)
    assert times.patience(1) < 1.5
    assert times.patience(128) > 4.0


def test_prefill_is_granted_what_decode_is() -> None:
    times = seen([0.5] * 50, tokens=512)
    for _ in range(50):
        times.add(1, 5.0)
    assert times.patience(20) == times.patience(1) > 5.0


def test_what_is_expected_counts_until_there_is_a_sample() -> None:
    times = ResponseTimes()
    assert times.patience(1) == times.patience(128) == 6.0
    assert times.patience(128, expected=4.0) == 20.0
    times.add(128, 1.0)
    assert times.patience(128, expected=4.0) < 20.0
    assert times.patience(1, expected=4.0) == 20.0


def test_an_answer_at_once_is_no_trouble() -> None:
    assert seen([0.0] * 10).patience(1) == 1.0
