"""Where servers go, as properties: no gap is opened, it comes to an end, and everybody finds the same."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.server.capacity import Layout
from swarm.server.chains import EQUAL, MOST_MOVES
from swarm.server.placement import (
    MIN_GAIN,
    SIMILAR,
    STRONGEST,
    Holder,
    Move,
    choose,
    choose_in_turn,
    in_turn,
    lot,
    may_leave,
    plan,
)
from swarm.spans import Span

BLOCKS = 12


@st.composite
def swarms(draw: st.DrawFn, most: int = 7) -> list[Holder]:
    """Servers of any size, place and strength, some of which may move."""
    sizes = draw(st.lists(st.integers(1, BLOCKS), min_size=1, max_size=most))
    return [
        Holder(
            peer=f"peer {number}",
            span=span_at(draw(st.integers(0, BLOCKS - size)), size),
            strength=draw(st.sampled_from([0.0, 1.0, 2.0, 7.0, 50.0])),
            serves=draw(st.sampled_from([True, True, True, False])),
            may_fill=(may_fill := draw(st.sampled_from([True, True, False]))),
            may_improve=may_fill and draw(st.booleans()),
            serves_on=draw(st.booleans()),
        )
        for number, size in enumerate(sizes)
    ]


def span_at(start: int, size: int) -> Span:
    return Span(start, start + size)


def newcomer(size: int, peer: str = "newcomer", strength: float = 3.0) -> Holder:
    return Holder(peer, Span(0, size), strength)


def covered(holders: Sequence[Holder]) -> set[int]:
    return {block for one in holders for block in one.span.blocks}


def served(holders: Sequence[Holder]) -> set[int]:
    return covered([one for one in holders if one.serves])


def moved(holders: Sequence[Holder], move: Move) -> list[Holder]:
    """Once the server has moved, and serves there."""
    return [replace(one, span=move.span) if one.peer == move.peer else one for one in holders]


def carried(holders: Sequence[Holder]) -> float:
    """Where all strengths are known and no one is far stronger than the others."""
    starts, ends = np.array([one.span for one in holders], np.int64).T
    return Layout(BLOCKS, starts, ends, np.array([one.strength for one in holders])).tight().throughput


@given(swarms(), st.integers(1, BLOCKS))
def test_a_newcomer_leaves_as_few_blocks_uncovered_as_it_can(holders: list[Holder], size: int) -> None:
    span = choose(holders, BLOCKS, newcomer(size))
    assert span.size == size
    assert Span(0, BLOCKS).covers(span)
    best = max(len(covered(holders) | set(span_at(start, size).blocks)) for start in range(BLOCKS - size + 1))
    assert len(covered(holders) | set(span.blocks)) == best


@given(swarms(), st.integers(1, BLOCKS))
def test_a_newcomer_to_a_whole_swarm_goes_where_most_is_carried(holders: list[Holder], size: int) -> None:
    holders = [replace(one, strength=one.strength or 1.0, serves=True) for one in holders]
    holders = [replace(one, strength=min(one.strength, 7.0)) for one in holders]
    if len(covered(holders)) < BLOCKS:
        holders.append(Holder("whole", Span(0, BLOCKS), 1.0))
    one = newcomer(size, strength=2.0)
    found = carried([*holders, replace(one, span=choose(holders, BLOCKS, one))])
    best = max(
        carried([*holders, replace(one, span=span_at(start, size))]) for start in range(BLOCKS - size + 1)
    )
    assert found >= best * (1 - EQUAL) - 1e-9


@given(swarms(), st.integers(1, BLOCKS))
def test_a_newcomer_goes_where_the_plain_form_of_the_rule_sends_it(holders: list[Holder], size: int) -> None:
    """One place after the other, by what the swarm then carries, how thin blocks are, and where spans end."""
    holders = [replace(one, strength=one.strength or 3.0) for one in holders]
    holders.append(Holder("whole", Span(0, BLOCKS), 3.0))
    one = newcomer(size)
    middle = float(np.median([other.strength for other in [*holders, one]]))
    believed = [replace(other, strength=min(other.strength, STRONGEST * middle)) for other in holders]
    ways = [replace(one, span=span_at(start, size)) for start in range(BLOCKS - size + 1)]
    amounts = [carried([*believed, way]) for way in ways]
    ways = [way for way, amount in zip(ways, amounts, strict=True) if amount >= max(amounts) * (1 - EQUAL)]
    saved = [seconds(believed) - seconds([*believed, way]) for way in ways]
    ways = [way for way, each in zip(ways, saved, strict=True) if each >= max(saved) * (1 - SIMILAR)]
    edges = [len({edge for other in [*holders, way] for edge in other.span}) for way in ways]
    ways = [way for way, each in zip(ways, edges, strict=True) if each == min(edges)]
    assert choose(holders, BLOCKS, one) == min(ways, key=lambda way: lot(one.peer, way.span.start)).span


def seconds(holders: Sequence[Holder]) -> float:
    """What a token takes in all blocks, if all holders share themselves out evenly."""
    return sum(
        1 / sum(one.strength / one.span.size for one in holders if block in one.span.blocks)
        for block in range(BLOCKS)
    )


@given(swarms(), st.randoms(use_true_random=False))
def test_no_move_opens_a_gap_and_all_find_the_same(holders: list[Holder], rng: random.Random) -> None:
    moves = plan(holders, BLOCKS)
    shuffled = list(holders)
    rng.shuffle(shuffled)
    assert plan(shuffled, BLOCKS) == moves
    may_move = {one.peer: one for one in holders if one.may_fill and one.serves}
    for move in moves:
        before = holders
        assert may_leave(before, move.peer, move.span)
        assert move.is_urgent or may_move[move.peer].serves_on or may_leave(before, move.peer)
        holders = moved(before, move)
        assert served(before) <= served(holders)
        assert covered(before) <= covered(holders)


@given(swarms())
def test_it_comes_to_an_end(holders: list[Holder]) -> None:
    """Each fill covers a block more, but for first ones of two. No other move lowers the throughput, and of
    `MOST_MOVES` in a row one raises it."""
    holders = [replace(one, strength=min(one.strength or 1.0, 7.0)) for one in holders]
    holes = BLOCKS - len(covered(holders))
    moves, gains, reached = 0, 0, [carried(holders)]
    while planned := plan(holders, BLOCKS):
        for move in planned:
            holders = moved(holders, move)
            moves += move.is_urgent
            gains += not move.is_urgent
            reached.append(carried(holders))
            assert move.is_urgent or reached[-1] >= reached[-2] * (1 - 1e-6)
    assert moves <= 2 * holes
    weakest, bound = 1.0 / BLOCKS, 7 * 7.0 / BLOCKS
    assert gains <= MOST_MOVES * math.log(bound / weakest, 1 + MIN_GAIN)
    for at in range(moves, len(reached) - MOST_MOVES):
        assert reached[at + MOST_MOVES] > reached[at] * (1 + 1e-6)


@given(swarms())
def test_holes_are_filled_where_a_single_server_can(holders: list[Holder]) -> None:
    holes = set(range(BLOCKS)) - covered(holders)
    can = [
        move
        for one in holders
        if one.may_fill and one.serves
        for start in range(BLOCKS - one.span.size + 1)
        if may_leave(holders, one.peer, (move := Move(one.peer, span_at(start, one.span.size))).span)
        and holes & set(move.span.blocks)
    ]
    moves = plan(holders, BLOCKS)
    if can:
        assert moves[0].is_urgent
        most = max(len(holes & set(move.span.blocks)) for move in can)
        assert len(holes & set(moves[0].span.blocks)) == most
    elif holes:
        assert all(move.is_urgent for move in moves)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_who_comes_at_once_chooses_as_if_one_came_after_the_other(
    sizes: list[int], rng: random.Random
) -> None:
    """Each sees the others' first wishes, which are of no account: their turns are."""
    coming = [newcomer(size, f"peer {number}") for number, size in enumerate(sizes)]
    one_by_one: list[Holder] = []
    for one in in_turn(coming):
        one_by_one.append(replace(one, span=choose(one_by_one, BLOCKS, one), serves=False))
    rng.shuffle(coming)
    for one in one_by_one:
        others = [other for other in coming if other.peer != one.peer]
        assert choose_in_turn([], others, BLOCKS, replace(one, span=Span(0, one.span.size))) == one.span


def test_three_thirds_that_come_at_once_cover_everything() -> None:
    for attempt in range(20):
        coming = [newcomer(4, f"peer {attempt} {number}") for number in range(3)]
        spans = {
            choose_in_turn([], [other for other in coming if other is not one], BLOCKS, one) for one in coming
        }
        assert spans == {Span(0, 4), Span(4, 8), Span(8, 12)}


def test_who_comes_alone_to_an_empty_swarm_lies_where_the_rest_is_covered_easily() -> None:
    spans = {choose([], BLOCKS, newcomer(4, f"peer {number}")) for number in range(40)}
    assert spans == {Span(0, 4), Span(4, 8), Span(8, 12)}


def test_the_thin_blocks_are_reinforced_where_all_places_carry_as_much() -> None:
    holders = [
        Holder("whole", Span(0, 12), 20.0),
        Holder("first", Span(0, 6), 10.0),
        Holder("second", Span(6, 12), 4.0),
    ]
    assert choose(holders, BLOCKS, newcomer(6)) == Span(6, 12)


def test_the_one_whose_leaving_costs_least_fills_a_hole() -> None:
    holders = [
        Holder("strong", Span(0, 6), 50.0, True, True, True),
        Holder("weak", Span(0, 6), 5.0, True, True, True),
        Holder("weaker", Span(0, 6), 1.0, True, True, True),
    ]
    (move,) = plan(holders, BLOCKS)
    assert (move.span, move.gain) == (Span(6, 12), None)
    assert carried(moved(holders, move)) == pytest.approx(1.0)  # what is left of the strong and the weak
    assert move.peer == "strong" or move.peer == "weak"


def test_two_go_together_where_one_alone_fills_nothing() -> None:
    holders = [
        Holder("a", Span(0, 4), 1.0, True),
        Holder("b", Span(2, 6), 1.0, True, True),
        Holder("c", Span(6, 10), 1.0, True, True),
    ]
    first, second = plan(holders, BLOCKS)
    assert (first, second) == (Move("b", Span(4, 8)), Move("c", Span(8, 12)))


def test_a_swarm_that_carries_nearly_all_it_could_is_left_alone() -> None:
    free = [Holder(f"peer {at}", span_at(at, 6), 10.0 + at, True, True, True) for at in range(7)]
    assert plan(free, BLOCKS) == ()


def test_an_idle_server_goes_where_it_is_needed_and_a_fixed_one_does_not() -> None:
    holders = [Holder(f"left {at}", Span(0, 6), 10.0, True, True, True) for at in range(4)]
    holders.append(Holder("right", Span(6, 12), 1.0, True, True, True))
    (move,) = plan(holders, BLOCKS)
    assert move.span == Span(6, 12)
    assert move.gain == pytest.approx(11.0)
    assert plan([replace(one, may_improve=False) for one in holders], BLOCKS) == ()
    assert plan([replace(one, serves=False) for one in holders], BLOCKS) == ()


def test_one_makes_way_for_another_where_no_single_move_is_worth_it() -> None:
    """The first six blocks limit the swarm as much as the last two: to help some of them gains nothing."""
    holders = [
        Holder("middle", Span(6, 8), 48.0, True),
        Holder("start", Span(0, 8), 12.0, True),
        Holder("strong", Span(6, 10), 24.0, True, True, True),
        Holder("end", Span(8, 12), 4.0, True, True, True),
    ]
    (first,) = plan(holders, BLOCKS)
    assert (first.peer, first.span) == ("strong", Span(8, 12))
    assert carried(moved(holders, first)) == pytest.approx(carried(holders))
    (second,) = plan(moved(holders, first), BLOCKS)
    assert second.peer == "end"
    assert second.gain == pytest.approx(4 / 3)
    assert plan(moved(moved(holders, first), second), BLOCKS) == ()
    for peer in ("strong", "end"):
        assert plan([replace(one, may_improve=one.peer == peer) for one in holders], BLOCKS) == ()


def test_who_serves_on_while_it_loads_may_keep_blocks_that_it_alone_serves() -> None:
    holders = [
        Holder("strong", Span(0, 8), 50.0, True, True, True, serves_on=True),
        Holder("same", Span(0, 4), 20.0, True),
        Holder("end", Span(8, 12), 4.0, True),
    ]
    (move,) = plan(holders, BLOCKS)
    assert (move.peer, move.span) == ("strong", Span(4, 12))
    assert plan([replace(one, serves_on=False) for one in holders], BLOCKS) == ()


def test_a_lie_about_strength_does_not_go_far() -> None:
    honest = [Holder(f"peer {at}", span_at(4 * at, 4), 10.0) for at in range(3)]
    liar = Holder("liar", Span(0, 4), 1e12)
    chosen = choose([*honest, liar], BLOCKS, newcomer(4, strength=10.0))
    assert chosen.start >= 4
    assert plan([*honest, liar], BLOCKS) == ()


def test_blocks_may_be_left_to_others_who_serve_them() -> None:
    holders = [
        Holder("a", Span(0, 4)),
        Holder("b", Span(2, 6)),
        Holder("c", Span(4, 6), serves=False),
    ]
    assert not may_leave(holders, "a")
    assert may_leave(holders, "a", Span(0, 2))
    assert not may_leave(holders, "b", Span(0, 4))
