"""Chains of moves: against all chains there are, in swarms so small that these can be tried."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.server import chains
from swarm.server.capacity import Layout
from swarm.server.chains import EQUAL, MOST_MOVES, Crew, best_chains

BLOCKS = 5
Starts = tuple[int, ...]


@st.composite
def crews(draw: st.DrawFn) -> tuple[Crew, Starts]:
    """Servers that hold all blocks together, and where they are."""
    sizes = [*draw(st.lists(st.integers(1, BLOCKS), min_size=1, max_size=3)), 2, 3]
    starts = [draw(st.integers(0, BLOCKS - size)) for size in sizes[:-2]] + [0, 2]
    number = len(sizes)
    serve = np.array(draw(st.lists(st.booleans(), min_size=number, max_size=number)))
    may_move = draw(st.lists(st.booleans(), min_size=number, max_size=number))
    movers = np.flatnonzero(serve & np.array(may_move))
    strengths = draw(st.lists(st.sampled_from([1.0, 2.0, 5.0]), min_size=number, max_size=number))
    serves_on = draw(st.lists(st.booleans(), min_size=len(movers), max_size=len(movers)))
    crew = Crew(BLOCKS, np.array(sizes), np.array(strengths), serve, movers, np.array(serves_on, np.bool_))
    return crew, tuple(starts)


def carried(crew: Crew, starts: Starts) -> float:
    at = np.array(starts)
    return Layout(BLOCKS, at, at + crew.sizes, crew.strengths).tight().throughput


def served(crew: Crew, starts: Starts, without: int = -1) -> set[int]:
    return {
        block
        for index, start in enumerate(starts)
        if crew.serve[index] and index != without
        for block in range(start, start + crew.sizes[index])
    }


def steps(crew: Crew, starts: Starts, least: float, moved: frozenset[int]) -> Iterator[tuple[int, Starts]]:
    """Who may move next, and where all are then."""
    for mover, serves_on in zip(crew.movers.tolist(), crew.serves_on.tolist(), strict=True):
        for start in range(BLOCKS - int(crew.sizes[mover]) + 1):
            after = (*starts[:mover], start, *starts[mover + 1 :])
            others = served(crew, starts, mover)
            is_safe = served(crew, starts) <= (served(crew, after) if serves_on else others)
            if mover not in moved and after != starts and is_safe and carried(crew, after) >= least - 1e-9:
                yield mover, after


def all_chains(crew: Crew, starts: Starts, least: float) -> Iterator[list[Starts]]:
    """Every chain of at most `MOST_MOVES`, as the places after each move."""
    pending: list[tuple[list[Starts], frozenset[int]]] = [([starts], frozenset())]
    while pending:
        path, moved = pending.pop()
        if len(moved):
            yield path[1:]
        if len(moved) < MOST_MOVES:
            pending += [
                ([*path, after], moved | {mover}) for mover, after in steps(crew, path[-1], least, moved)
            ]


def first_move(starts: Starts, after: Starts) -> tuple[int, int]:
    return next(
        (mover, there) for mover, (here, there) in enumerate(zip(starts, after, strict=True)) if here != there
    )


@given(crews(), st.sampled_from([1.01, 1.1, 1.5]))
def test_the_best_of_the_shortest_chains_are_found(found: tuple[Crew, Starts], gain: float) -> None:
    crew, starts = found
    now = carried(crew, starts)
    goal = now * gain
    reaching = [
        (len(path), carried(crew, path[-1]), first_move(starts, path[0]))
        for path in all_chains(crew, starts, now)
        if len(path) > 1 and carried(crew, path[-1]) >= goal * (1 - 1e-9)
    ]
    best = best_chains(crew, np.array(starts), now, goal)
    if not reaching:
        assert best is None
        return
    assert best is not None
    shortest = [path for path in reaching if path[0] == min(reaching)[0]]
    most = max(reached for _, reached, _ in shortest)
    assert best.throughput * (1 - 1e-6) <= most <= best.throughput * (1 + EQUAL) ** 2
    good = {first for _, reached, first in shortest if reached >= best.throughput * (1 - 1e-6)}
    assert set(best.first) <= good


def test_servers_are_tried_part_by_part_where_they_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    crew = Crew(
        4,
        np.array([2, 2, 2]),
        np.array([1.0, 1.0, 3.0]),
        np.ones(3, np.bool_),
        np.array([0, 1, 2]),
        np.ones(3, np.bool_),
    )
    starts, goal = np.array([0, 1, 2]), 1.2
    expected = best_chains(crew, starts, 0.5, goal)
    monkeypatch.setattr(chains, "CELLS_AT_ONCE", 1)
    assert best_chains(crew, starts, 0.5, goal) == expected
    monkeypatch.setattr(chains, "MOST_CELLS", 1)
    assert best_chains(crew, starts, 0.5, goal) is None
