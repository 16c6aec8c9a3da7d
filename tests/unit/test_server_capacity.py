"""What a layout of servers carries: against the definition, and against every set of blocks."""

from itertools import chain, combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.server.capacity import Layout, where_carried

MOST_BLOCKS = 7


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Some servers of any strength on up to `MOST_BLOCKS` blocks."""
    num_blocks = draw(st.integers(1, MOST_BLOCKS))
    edges = st.lists(st.integers(0, num_blocks), min_size=2, max_size=2, unique=True).map(sorted)
    spans = draw(st.lists(edges, max_size=6))
    strengths = draw(st.lists(st.floats(0.5, 50.0), min_size=len(spans), max_size=len(spans)))
    return layout(num_blocks, spans, strengths)


def layout(num_blocks: int, spans: list[list[int]], strengths: list[float]) -> Layout:
    starts, ends = np.array(spans, np.int64).reshape(-1, 2).T
    return Layout(num_blocks, starts, ends, np.array(strengths, np.float64))


def with_one(layout: Layout, start: int, size: int, strength: float) -> Layout:
    return Layout(
        layout.num_blocks,
        np.append(layout.starts, start),
        np.append(layout.ends, start + size),
        np.append(layout.strengths, strength),
    )


def least_over_sets(layout: Layout) -> float:
    """The strength that holds any of a set of blocks, by their number: the least over all sets."""
    blocks = range(layout.num_blocks)
    sets = chain.from_iterable(combinations(blocks, size) for size in range(1, layout.num_blocks + 1))
    return min(strength_on(layout, some) / len(some) for some in sets)


def strength_on(layout: Layout, blocks: tuple[int, ...]) -> float:
    spans = zip(layout.starts, layout.ends, layout.strengths, strict=True)
    return sum(strength for start, end, strength in spans if any(start <= block < end for block in blocks))


@given(layouts())
def test_the_throughput_is_limited_by_the_weakest_set_of_blocks(layout: Layout) -> None:
    tight = layout.tight()
    assert tight.throughput == pytest.approx(least_over_sets(layout), rel=1e-6, abs=1e-9)
    limiting = tuple(np.flatnonzero(tight.blocks).tolist())
    assert strength_on(layout, limiting) / len(limiting) == pytest.approx(tight.throughput, abs=1e-9)


@given(layouts(), st.integers(1, MOST_BLOCKS), st.floats(0.5, 50.0), st.floats(0.0, 2.0))
def test_one_more_server_is_counted_as_if_it_were_there(
    layout: Layout, size: int, strength: float, share: float
) -> None:
    size = min(size, layout.num_blocks)
    starts = np.arange(layout.num_blocks - size + 1)
    carried = [with_one(layout, start, size, strength).tight().throughput for start in starts]
    most = layout.most_with(strength, size, starts)
    assert most == pytest.approx(max(carried), rel=1e-6, abs=1e-9)
    wanted = share * most
    for start, enough in zip(carried, layout.carries_with(strength, size, starts, wanted), strict=True):
        assert enough == (start >= wanted) or start == pytest.approx(wanted, rel=1e-6, abs=1e-9)


@given(layouts(), st.floats(0.0, 2.0))
def test_who_moves_is_counted_where_it_is_then(layout: Layout, share: float) -> None:
    sizes = layout.ends - layout.starts
    wanted = share * layout.tight().throughput
    movers = np.arange(len(sizes))[::-1]
    (found,) = where_carried(layout.num_blocks, layout.starts[None], sizes, layout.strengths, movers, wanted)
    for mover, enough in zip(movers.tolist(), found, strict=True):
        last = layout.num_blocks - int(sizes[mover])
        assert not enough[last + 1 :].any()
        for start in range(last + 1):
            carried = layout.moved(mover, start).tight().throughput
            assert enough[start] == (carried >= wanted) or carried == pytest.approx(
                wanted, rel=1e-6, abs=1e-9
            )


@given(layouts(), st.integers(1, MOST_BLOCKS))
def test_one_more_span_may_begin_or_end_where_others_do(layout: Layout, size: int) -> None:
    size = min(size, layout.num_blocks)
    starts = np.arange(layout.num_blocks - size + 1)
    for start, edges in zip(starts, layout.edges_with(size, starts), strict=True):
        more = with_one(layout, start, size, 1.0)
        assert edges == len({0, layout.num_blocks, *more.starts.tolist(), *more.ends.tolist()})


@given(layouts())
def test_it_lies_between_sharing_evenly_and_sharing_everything(layout: Layout) -> None:
    throughput = layout.tight().throughput
    assert layout.even.min() * (1 - 1e-6) <= throughput <= layout.bound * (1 + 1e-6)


def test_a_strong_server_gives_to_the_blocks_that_others_leave_to_it() -> None:
    shared = layout(4, [[0, 4], [0, 2]], [6.0, 2.0])
    assert shared.even.tolist() == [2.5, 2.5, 1.5, 1.5]
    assert shared.tight().throughput == pytest.approx(2.0)


def test_what_holds_a_block_is_taken_out_and_put_elsewhere() -> None:
    three = layout(4, [[0, 2], [1, 3], [2, 4]], [1.0, 2.0, 3.0])
    assert three.held.tolist() == [1, 2, 2, 1]
    assert three.without(1).held.tolist() == [1, 1, 1, 1]
    assert three.moved(0, 2).held.tolist() == [0, 1, 3, 2]
    assert three.moved(0, 2).tight().throughput == 0.0
