"""The simulation's own sums: what it takes to be true of the world, of servers and of the best placement."""

import asyncio
from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest

from benchmarks import simulated_dht, simulated_parts, whole_swarm
from benchmarks.allocators import Server, optimum
from benchmarks.crowd import Counted, Crowd
from benchmarks.population import MEAN_STAY, STRONGEST, WEAKEST, Member, members
from benchmarks.simulate import PARTS, PROCESSOR_TIMES, size
from benchmarks.simulate_report import growth
from benchmarks.simulated_parts import Row, Scale
from benchmarks.simulated_traffic import routing, town, traffic, waiting
from benchmarks.whole_swarm import Answers
from benchmarks.world import DETOUR, EARTH_RADIUS, FIBRE, World, on_sphere
from swarm.client import costs
from swarm.net.virtual_time import run
from swarm.server.capacity import Layout
from swarm.spans import Span


def rng(seed: int = 1) -> np.random.Generator:
    return np.random.default_rng(seed)


def distances(world: World, count: int) -> np.ndarray:
    return np.array([world.seconds(one, np.arange(count)) for one in range(count)])


class TestWorld:
    def test_distances_are_the_same_both_ways_and_no_detour_is_shorter(self) -> None:
        ways = distances(World(40, rng()), 40)
        assert np.allclose(ways, ways.T)
        assert (np.diag(ways) == 0).all()
        by_others = (ways[:, :, None] + ways[None, :, :]).min(1)
        assert (ways <= by_others + 1e-12).all()

    def test_it_is_as_large_as_the_earth(self) -> None:
        ways = distances(World(300, rng()), 300)[np.triu_indices(300, 1)]
        assert ways.min() > 0.001
        assert 0.04 < np.median(ways) < 0.1
        assert ways.max() < 0.25
        across = np.arccos(on_sphere(51.5, -0.1) @ on_sphere(40.7, -74.0)) * EARTH_RADIUS
        assert across == pytest.approx(5570, rel=0.01), "London to New York, in kilometres"
        assert across * DETOUR / FIBRE == pytest.approx(0.042, abs=0.001)

    def test_a_seed_makes_one_world(self) -> None:
        assert (distances(World(9, rng(3)), 9) == distances(World(9, rng(3)), 9)).all()
        assert (distances(World(9, rng(3)), 9) != distances(World(9, rng(4)), 9)).any()


def test_servers_are_as_many_as_asked_for_and_stay_an_hour() -> None:
    some = members(rng(), 2000, 100, 3 * MEAN_STAY)
    assert [one.comes for one in some] == sorted(one.comes for one in some)
    assert np.mean([one.goes - one.comes for one in some]) == pytest.approx(MEAN_STAY, rel=0.1)
    there = sum(one.comes <= 2 * MEAN_STAY < one.goes for one in some)
    assert there == pytest.approx(2000, rel=0.1)
    strengths = [one.strength / WEAKEST for one in some]
    assert min(strengths) >= 1
    assert max(strengths) <= STRONGEST
    assert {one.size for one in some} == set(range(5, 41))


def best_of(sizes: Sequence[int], strengths: Sequence[float], num_blocks: int) -> float:
    servers = [Server(str(at), *one) for at, one in enumerate(zip(sizes, strengths, strict=True))]
    return optimum(servers, num_blocks)


class TestOptimum:
    @pytest.mark.parametrize(
        ("sizes", "strengths", "num_blocks", "best"),
        [
            ((2, 2), (2.0, 4.0), 2, 3.0),
            ((1, 1), (2.0, 4.0), 2, 2.0),
            ((1, 2), (2.0, 4.0), 2, 3.0),
            ((1, 1, 1), (1.0, 1.0, 5.0), 2, 2.0),
            ((2,), (4.0,), 4, 0.0),
            ((4,), (4.0,), 4, 1.0),
        ],
    )
    def test_cases_solved_by_hand(
        self, sizes: tuple[int, ...], strengths: tuple[float, ...], num_blocks: int, best: float
    ) -> None:
        assert best_of(sizes, strengths, num_blocks) == pytest.approx(best, abs=1e-6)

    @pytest.mark.parametrize("seed", range(4))
    def test_no_placement_carries_more_and_one_as_much(self, seed: int) -> None:
        draw = rng(seed)
        sizes, strengths = draw.integers(1, 4, 4).tolist(), draw.uniform(1, 9, 4)
        found = [
            Layout(5, np.array(starts), np.array(starts) + sizes, strengths).tight().throughput
            for starts in product(*(range(5 - size + 1) for size in sizes))
        ]
        assert best_of(sizes, strengths.tolist(), 5) == pytest.approx(max(found), rel=1e-6)


def crowd(seed: int, seconds: int, *, churns: bool = True) -> Counted:
    counted = Crowd(members(rng(seed), 12, 30, seconds, churns=churns), 30, seed).run(seconds)
    counted.placing, counted.planning = [], []
    return counted


class TestCrowd:
    def test_a_seed_makes_one_run(self) -> None:
        assert crowd(1, 400) == crowd(1, 400)
        assert crowd(1, 100) != crowd(2, 100)

    def test_while_nobody_leaves_all_blocks_are_served(self) -> None:
        counted = crowd(3, 300, churns=False)
        assert counted.covered_at is not None
        assert counted.open == 0
        assert counted.server_hours == pytest.approx(12 * 300 / 3600, rel=0.15)

    def test_what_cannot_be_covered_is_open(self) -> None:
        one = Member(0, size=20, strength=10.0, comes=0.0, goes=200.0, is_polite=True)
        two = Member(1, size=20, strength=10.0, comes=0.0, goes=500.0, is_polite=True)
        counted = Crowd([one, two], 30, 1).run(400)
        assert counted.covered_at == 40
        assert counted.open == counted.unavoidable == 200


def test_queues_are_those_of_m_d_1() -> None:
    assert waiting(np.array([0.0, 0.5, 0.8])).tolist() == pytest.approx([0.0, 0.5, 2.0])


def test_traffic_through_a_town() -> None:
    placed = [(Span(0, 6), 100.0), (Span(6, 12), 100.0), (Span(0, 12), 50.0), (Span(4, 10), 20.0)]
    small = town(placed, 12, seed=1)
    calm, busy = traffic(small, 0.1, seed=1), traffic(small, 0.9, seed=1)
    assert calm == traffic(small, 0.1, seed=1)
    assert calm is not None
    assert busy is not None
    assert calm["capacity"] == pytest.approx(270 / 12)
    assert calm["token_ms"] < busy["token_ms"]
    assert calm["given"] < busy["given"] < busy["capacity"]
    assert routing(small)["servers"] == 4


def test_who_alone_holds_a_block_is_not_used_up_by_others(monkeypatch: pytest.MonkeyPatch) -> None:
    scarce = town([(Span(0, 12), 60.0), (Span(0, 6), 400.0), (Span(5, 11), 400.0)], 12, seed=2)
    given = traffic(scarce, 0.9, seed=1)
    monkeypatch.setattr(costs, "WAITED", 0.0)
    if_each_for_itself = traffic(scarce, 0.9, seed=1)
    assert given is not None
    assert if_each_for_itself is not None
    assert given["given"] > 3 * if_each_for_itself["given"]
    assert given["token_ms_p95"] < if_each_for_itself["token_ms_p95"] / 2


def test_growth_is_fitted() -> None:
    rows = [{"peers": peers, "calls_a_second": 3 + 2 * np.log2(peers)} for peers in (10, 100, 1000)]
    assert growth(rows) == pytest.approx((3, 2, 1))


def test_a_whole_swarm_covers_its_model_and_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_swarm, "CLIENTS", 1)

    async def talked() -> tuple[float | None, float, Answers]:
        answers = Answers()
        some = members(rng(2), 4, 4, 0.0, churns=False, joining=3.0)
        async with whole_swarm.whole_swarm(some, 4, 2, "dht") as swarm:
            await asyncio.sleep(24)
            await swarm.talk(swarm.clients[0], answers)
            assert swarm.post.calls["DHTProtocol.rpc_find"] > 100
            swarm.coverage.count()
            return swarm.coverage.covered_at, swarm.coverage.open, answers

    covered_at, left_open, answers = run(talked())
    assert covered_at is not None
    assert covered_at < 24
    assert left_open == 0
    assert (answers.done, len(answers.tokens), answers.failed.total()) == (1, 8, 0)


def test_the_dht_is_asked_more_where_more_blocks_are_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulated_dht, "ACTING", 2)
    few, many = simulated_dht.measure(12, 4, 1), simulated_dht.measure(12, 16, 1)
    assert 0 < few["calls_a_second"] < many["calls_a_second"]
    assert 0.01 < few["reading_s"] < 3


@pytest.mark.parametrize("part", PARTS)
def test_the_same_seed_gives_the_same_figures(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for where, name, value in (
        (simulated_parts, "SMALL", ((4, 5),)),
        (simulated_parts, "SETTLED", 70.0),
        (simulated_parts, "blocks_of", lambda servers: 4),
        (simulated_parts, "DHT_MOST", 0),
        (simulated_parts, "DHT_BLOCKS", 4),
        (simulated_dht, "ACTING", 2),
        (simulated_dht, "MEASURED", 20.0),
        (whole_swarm, "CLIENTS", 2),
        (whole_swarm, "WINDOW", 20.0),
        (whole_swarm, "MEASURED", 10.0),
    ):
        monkeypatch.setattr(where, name, value)
    scale = Scale((6,), hours=1 / 40, seed=1, small=1, whole_minutes=10.0, loads=(0.1,))
    first, again = ([told(row) for row in PARTS[part](scale)] for _ in range(2))
    assert first == again
    assert len({size(row) for row in first}) == len(first) > 0


def told(row: Row) -> Row:
    return {name: value for name, value in row.items() if name not in PROCESSOR_TIMES}
