"""The cheapest way: the same as by Dijkstra's algorithm, written plainly, on hundreds of random graphs."""

import random
from heapq import heappop, heappush
from itertools import pairwise
from math import inf

import numpy as np
import pytest

from swarm.client.search import CLIENT, Graph, Links, Visit, cheapest

SEEDS = 600


def dijkstra(graph: Graph) -> tuple[float, int]:
    """The cost of the cheapest way, and its fewest visits; vertices are (server or client, blocks done)."""
    best: dict[tuple[int, int], tuple[float, int]] = {}
    queue: list[tuple[float, int, int, int]] = []

    def offer(cost: float, visits: int, place: int, done: int) -> None:
        if cost < inf and (cost, visits) < best.get((place, done), (inf, 0)):
            best[place, done] = cost, visits
            heappush(queue, (cost, visits, place, done))

    def holds(server: int, block: int) -> bool:
        return bool(graph.start[server] <= block < graph.end[server])

    servers = range(len(graph.start))
    offer(0.0, 0, CLIENT, 0)
    while True:
        cost, visits, place, done = heappop(queue)
        if (cost, visits) != best[place, done]:
            continue
        if place == CLIENT:
            if done == graph.num_blocks:
                return cost, visits
            way = graph.come if done else graph.first
            for server in servers:
                if holds(server, done):
                    arrived = cost + way[server] + graph.enter[server]
                    offer(arrived + graph.block[server], visits + 1, server, done + 1)
            continue
        offer(cost + (graph.last if done == graph.num_blocks else graph.leave)[place], visits, CLIENT, done)
        if holds(place, done):
            offer(cost + graph.block[place], visits, place, done + 1)
        for target, seconds in zip(*(some[place] for some in graph.links or ()), strict=False):
            if target != place and holds(target, done):
                arrived = cost + seconds + graph.enter[target]
                offer(arrived + graph.block[target], visits + 1, target, done + 1)


def price(graph: Graph, visits: list[Visit]) -> float:
    """What those visits cost, each change of server by the cheaper way."""
    total, before = 0.0, CLIENT
    for server, start, end in visits:
        way = graph.come if start else graph.first
        arriving = way[server] if before == CLIENT else graph.leave[before] + way[server]
        if before != CLIENT and graph.links is not None:
            targets, seconds = graph.links
            arriving = min(
                arriving,
                *(s for t, s in zip(targets[before], seconds[before], strict=True) if t == server),
                inf,
            )
        total += arriving + graph.enter[server] + (end - start) * graph.block[server]
        before = server
    return float(total + graph.last[before])


def random_graph(seed: int, *, coarse: bool = False) -> Graph:
    """Any graph that has a way. `coarse` costs are few whole numbers, so that many ways cost the same."""
    rng = np.random.default_rng(seed)
    num_blocks, count, edges = (int(rng.integers(1, top)) for top in (14, 25, 6))

    def costs(*shape: int) -> np.ndarray:
        if coarse:
            return rng.integers(0, 3, shape).astype(float)
        return rng.exponential(rng.choice([0.01, 1.0, 100.0]), shape)

    start = rng.integers(0, num_blocks, count)
    end = np.minimum(start + rng.integers(1, num_blocks + 1, count), num_blocks)
    start[-1], end[-1] = 0, num_blocks
    targets = rng.integers(0, count, (count, edges))
    seconds = np.where(rng.random((count, edges)) < 0.3, np.inf, costs(count, edges))
    seconds[targets == np.arange(count)[:, None]] = np.inf
    come, leave = costs(count), costs(count)
    ends = (come, leave) if rng.random() < 0.5 else (costs(count), costs(count))
    links = Links(targets, seconds) if rng.random() < 0.8 else None
    return Graph(num_blocks, start, end, costs(count), costs(count), come, leave, *ends, links)


@pytest.mark.parametrize("coarse", [False, True])
def test_is_as_cheap_as_by_dijkstra_and_takes_as_few_visits(coarse: bool) -> None:
    for seed in range(SEEDS):
        graph = random_graph(seed, coarse=coarse)
        visits = cheapest(graph)
        cost, count = dijkstra(graph)
        assert price(graph, visits) == pytest.approx(cost, rel=1e-12), f"seed {seed}"
        assert len(visits) == count, f"seed {seed}"


def test_the_visits_run_each_block_once_where_it_is_held() -> None:
    for seed in range(200):
        graph = random_graph(seed)
        visits = cheapest(graph)
        assert [block for visit in visits for block in range(visit.start, visit.end)] == list(
            range(graph.num_blocks)
        )
        for server, start, end in visits:
            assert graph.start[server] <= start < end <= graph.end[server]


def test_edges_that_lead_nowhere_change_nothing() -> None:
    """Servers that hold nothing, as those that may not be used, and edges to and from them."""
    for seed in range(100):
        graph = random_graph(seed)
        count = len(graph.start)
        start, end = np.append(graph.start, 0), np.append(graph.end, 0)
        more = [
            np.append(each, 0.0)
            for each in (graph.enter, graph.block, graph.come, graph.leave, graph.first, graph.last)
        ]
        targets, seconds = graph.links or (np.zeros((count, 0), int), np.zeros((count, 0)))
        wide = np.pad(targets, ((0, 1), (0, 1)), constant_values=count)
        free = np.pad(seconds, ((0, 1), (0, 1)))
        assert cheapest(Graph(graph.num_blocks, start, end, *more, Links(wide, free))) == cheapest(graph), (
            f"seed {seed}"
        )


def test_equal_ways_go_to_fewer_visits_then_to_lower_indices() -> None:
    free = np.zeros(5)
    start, end = np.array([0, 2, 0, 0, 1]), np.array([2, 4, 4, 4, 4])
    assert cheapest(Graph(4, start, end, *[free] * 6)) == [Visit(2, 0, 4)]


def test_a_way_back_to_the_same_server_is_one_visit() -> None:
    rng = random.Random(3)
    for _ in range(50):
        graph = random_graph(rng.randrange(10**6), coarse=True)
        visits = cheapest(graph)
        assert all(one.server != other.server for one, other in pairwise(visits))
