"""Blame and what was observed of peers: strikes, suspicion, rest and forgiveness on a clock that is given."""

import msgspec
import pytest

from swarm.client.blame import LIGHT, Blame
from swarm.client.costs import MOST_WAITED, ONE_TOKEN, WAITED, Costs, Demand, Prices, Seen, prices, rates
from swarm.client.observed import MEMORY, Observed
from swarm.dht.announcement import Announcement, Throughput
from swarm.net.transport import PeerId
from swarm.spans import Span

A, B = PeerId("a"), PeerId("b")


def suspect_for(blame: Blame, since: float) -> float:
    """Seconds, to the tenth, for which A is suspect from `since` on."""
    tenths = 0
    while A in blame.suspects(since + tenths / 10):
        tenths += 1
    return tenths / 10


def test_suspicion_doubles_with_each_fault_up_to_ten_minutes() -> None:
    blame, now, lengths = Blame(), 0.0, []
    for _ in range(9):
        blame.fault(A, now)
        lengths.append(suspect_for(blame, now))
        now += lengths[-1]
    assert lengths[:7] == [10, 20, 40, 80, 160, 320, 600]
    assert lengths[7:] == [600, 600]
    assert B not in blame.suspects(0.0)


def test_one_event_that_many_sessions_see_is_one_strike() -> None:
    blame = Blame()
    for _ in range(8):
        blame.fault(A, 0.0)
        blame.fault(A, 0.5, LIGHT)
    assert blame.suspects(0.5) == {A: 1.0}
    blame.fault(A, 2.0)
    assert blame.suspects(2.0) == {A: 2.0}


def test_a_light_strike_is_short_and_lets_the_peer_be_tried_at_once() -> None:
    blame = Blame()
    blame.fault(A, 0.0, LIGHT)
    assert suspect_for(blame, 0.0) == 2.5
    assert blame.rests_until(A) <= 0.0
    for _ in range(3):
        blame.fault(A, 0.0, LIGHT)
    assert blame.suspects(0.0) == {A: 1.0}
    assert blame.rests_until(A) == 1.0


def test_who_failed_again_is_given_longer_rests() -> None:
    blame, rests, now = Blame(), [], 0.0
    for _ in range(7):
        blame.fault(A, now)
        rests.append(blame.rests_until(A) - now)
        now += max(rests[-1], 1.0)
    assert rests == [1, 2, 4, 8, 15, 15, 15]
    assert blame.rests_until(B) == 0.0


def test_time_without_faults_forgives() -> None:
    blame = Blame()
    blame.fault(A, 0.0)
    blame.fault(A, 10.0)
    assert suspect_for(blame, 10.0) == 20.0
    blame.fault(A, 330.0)  # two strikes, halved five minutes after the suspicion
    assert blame.suspects(330.0) == {A: 2.0}
    blame.forget(330.0 + 20.0 + 3000.0)
    blame.fault(A, 4000.0)
    assert blame.suspects(4000.0) == {A: 1.0}


def test_successes_forgive_and_end_the_suspicion() -> None:
    blame = Blame()
    blame.fault(A, 0.0)
    blame.fault(A, 5.0)
    for _ in range(8):
        blame.success(A, 6.0)
    assert A not in blame.suspects(14.5)
    for _ in range(60):
        blame.success(A, 6.0)
    assert A not in blame.suspects(6.0)
    blame.fault(A, 7.0)
    assert blame.suspects(7.0)[A] == pytest.approx(1.0)
    blame.success(B, 0.0)
    assert B not in blame.suspects(0.0)


def priced(*servers: Announcement, costs: Costs, demand: Demand = ONE_TOKEN) -> Prices:
    return prices([one.peer_id for one in servers], rates(servers), costs, demand)


SERVER = Announcement(
    peer="a",
    model_id="m",
    start=0,
    end=4,
    state="serving",
    queue=2,
    throughput=Throughput(decode=100, prefill=1000),
)


def test_the_first_step_counts_whole_and_later_ones_pull() -> None:
    observed = Observed()
    observed.step(SERVER, Span(0, 4), 1, queue=0.1, compute=0.08, now=0.0)
    assert observed.at(0.0) == {A: Seen(0.1, pytest.approx(2.0), 1.0)}
    observed.step(SERVER, Span(0, 4), 1, queue=0.2, compute=0.04, now=0.0)
    seen = observed.at(0.0)[A]
    assert seen.queue == pytest.approx(0.12)
    assert seen.pace == pytest.approx(1.8)


def test_a_step_of_several_rows_is_held_against_what_is_announced_of_it() -> None:
    observed = Observed()
    observed.step(SERVER, Span(1, 3), 6, queue=0.0, compute=2 * (0.01 + 5 * 0.001), now=0.0)
    assert observed.at(0.0)[A].pace == pytest.approx(1.0)
    observed.step(SERVER, Span(1, 3), 128, queue=0.0, compute=50.0, now=0.0)
    assert observed.at(0.0)[A].pace == pytest.approx(1.0)


def test_what_was_seen_ages_and_is_forgotten() -> None:
    observed = Observed()
    observed.step(SERVER, Span(0, 4), 1, queue=0.1, compute=0.04, now=0.0)
    assert observed.at(MEMORY)[A].trust == pytest.approx(1 / 2.718, rel=1e-3)
    assert observed.at(10 * MEMORY) == {}
    observed.step(SERVER, Span(0, 4), 1, queue=0.5, compute=0.04, now=11 * MEMORY)
    assert observed.at(11 * MEMORY)[A].queue == 0.5


def test_fresh_sight_stands_in_for_the_announcement_and_old_sight_does_not() -> None:
    def met(*seen: Seen) -> tuple[float, float]:
        known = Costs(rtt=lambda peer: 0.1, seen=dict.fromkeys((A,), *seen) if seen else {})
        found = priced(SERVER, costs=known)
        return float(found.queue[0]), float(found.block[0])

    assert met() == pytest.approx((2 * 4 * 0.01, 0.01))
    assert met(Seen(0.3, 2.0, 1.0)) == pytest.approx((0.3, 0.02))
    assert met(Seen(0.3, 2.0, 0.5)) == pytest.approx((0.19, 0.015))


def test_others_wait_as_the_queue_says_and_no_announcement_makes_that_endless() -> None:
    def toll(queue: int, *seen: Seen) -> float:
        known = Costs(rtt=lambda peer: 0.1, seen=dict.fromkeys((A,), *seen) if seen else {})
        return float(priced(msgspec.structs.replace(SERVER, queue=queue), costs=known).toll[0])

    assert toll(0) == 0
    assert toll(2) == pytest.approx(2 * WAITED)
    assert toll(2, Seen(0.02, 1.0, 1.0)) == pytest.approx(WAITED * 0.02 / 0.04)
    assert toll(2, Seen(0.0, 1.0, 1.0)) == 0
    assert toll(2**40) == MOST_WAITED


def test_prices_follow_rows_context_prompt_and_network() -> None:
    def block(demand: Demand) -> float:
        return float(priced(SERVER, costs=Costs(rtt=lambda peer: None), demand=demand).block[0])

    assert block(Demand(rows=5)) == pytest.approx(0.01 + 4 * 0.001)
    assert block(Demand(16_384, 1)) == pytest.approx(0.02)
    assert block(Demand(0, 16_385)) == pytest.approx(0.015)
    unknown = Announcement(peer="b", model_id="m", start=0, end=1, state="serving")
    wide = Announcement(
        peer="c", model_id="m", start=0, end=1, state="serving", throughput=Throughput(network=1e6)
    )
    found = priced(unknown, wide, costs=Costs(rtt=lambda peer: None), demand=Demand(1000, 1))
    assert list(found.byte) == [0.0, 1e-6]
    assert list(found.way) == [0.05, 0.05]
    assert found.block[0] == pytest.approx((1 + 1000 / 16_384) / 50)
    assert found.prompt[0] == pytest.approx(1000 / 500 * (1 + 500 / 16_384))
