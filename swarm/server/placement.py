"""Which blocks a server should hold, decided from what all servers hold: pure functions, which give everybody
who sees the same directory the same answer.

Holes come first: a block that nobody holds stops every session. Then what the swarm can carry, then the
blocks whose holders have least to give. Knows servers by name, span and strength; it must not know how they
are listed, how a server moves, nor what time it is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import groupby
from typing import NamedTuple

import numpy as np

from swarm.server.capacity import Flags, Floats, Indices, Layout
from swarm.server.chains import EQUAL, Crew, best_chains
from swarm.spans import Span

MIN_GAIN = 0.1
"""The part by which a move, or a few of them together, must raise what the swarm carries."""

SIMILAR = 0.1
"""The same for the thinness of blocks: where it is similar, a span that begins and ends where others do is
better. Routes through such spans have fewer hops, and one server can take over from another."""

STRONGEST = 16.0
"""How many times stronger than the one in the middle a server is taken to be at most, whatever it says."""

MOST_MOVERS = 16
"""Servers that are tried in other places, the strongest first."""

MOST_PAIRED, MOST_TRIES = 32, 64
"""Servers, and pairs of moves, that are tried where no single move fills a hole."""


@dataclass(frozen=True)
class Holder:
    """A server that holds the blocks of `span`, or is about to.

    It computes `strength` (token, block) pairs a second; 0 if that is not known. `serves` is false while it
    still loads them. It can be asked to go elsewhere if it `may_fill` holes, or also `may_improve` the whole;
    it `serves_on` meanwhile if it has memory for other blocks beside its own.
    """

    peer: str
    span: Span
    strength: float = 0.0
    serves: bool = True
    may_fill: bool = False
    may_improve: bool = False
    serves_on: bool = False


class Move(NamedTuple):
    """`peer` is to hold `span` instead.

    That fills holes, or raises what the swarm carries to `gain` times what it was; then there are no holes.
    It may take another move or two of other servers until it does so. The swarm carries no less meanwhile.
    """

    peer: str
    span: Span
    gain: float | None = None

    @property
    def is_urgent(self) -> bool:
        return self.gain is None


class State(NamedTuple):
    """How many blocks nobody holds, and how many tokens a second the swarm carries; 0 if any are missing."""

    missing: int
    carried: float

    @property
    def is_whole(self) -> bool:
        return self.missing == 0


def state(holders: Sequence[Holder], num_blocks: int) -> State:
    """What all holders carry together."""
    layout = _Claims.of(holders).layout(num_blocks)
    missing = int((layout.held == 0).sum())
    return State(missing, 0.0 if missing else layout.tight().throughput)


def choose(holders: Sequence[Holder], num_blocks: int, newcomer: Holder) -> Span:
    """The best place for `newcomer`, for a span as large as the one that it names.

    If that leaves blocks uncovered, best is where these are fewest, and fewest more of its size could cover
    them; else where the swarm then carries most, where blocks are thinnest, and where other spans begin and
    end. The rest is drawn by the newcomer's name, so that many who come to an empty swarm at once spread.
    """
    return _choose(_Claims.of(holders), num_blocks, newcomer)


def _choose(claims: "_Claims", num_blocks: int, newcomer: Holder) -> Span:
    size = min(newcomer.span.size, num_blocks)
    layout, strength = claims.layout_and(num_blocks, newcomer.strength)
    is_hole = layout.held == 0
    uncovered = is_hole.sum() - _sums(is_hole, size)
    starts = np.flatnonzero(uncovered == uncovered.min())
    if uncovered.min():
        costs = np.array([_pieces(is_hole, start, size) for start in starts.tolist()])
    else:
        starts = starts[_is_most_with(layout, strength, size, starts)]
        starts = starts[_is_most(_relief(layout.even, strength / size, size)[starts], SIMILAR)]
        costs = layout.edges_with(size, starts)
    best = starts[costs == costs.min()].tolist()
    start = min(best, key=lambda start: (lot(newcomer.peer, start), start))
    return Span(start, start + size)


def choose_in_turn(
    holders: Sequence[Holder], undecided: Sequence[Holder], num_blocks: int, newcomer: Holder
) -> Span:
    """The best place for `newcomer` where `undecided` newcomers choose at the same time."""
    return choose(settled(holders, undecided, num_blocks, newcomer.peer), num_blocks, newcomer)


def settled(
    holders: Sequence[Holder], undecided: Sequence[Holder], num_blocks: int, peer: str
) -> list[Holder]:
    """All whom `peer` has to reckon with: of the `undecided` those whose turn is before, where they will be.

    They are taken in the order that their names draw, as each of them does.
    """
    found, claims = list(holders), _Claims.of(holders)
    for other in in_turn(undecided):
        if turn(other.peer) < turn(peer):
            span = _choose(claims, num_blocks, other)
            claims = claims.and_one(span, other.strength)
            found.append(replace(other, span=span, serves=False))
    return found


def plan(holders: Sequence[Holder], num_blocks: int) -> tuple[Move, ...]:
    """The moves that the swarm is better off with, one after the other; none if all is well as it is.

    Either they fill holes, or it is one that lets the swarm carry at least `MIN_GAIN` more, or that makes
    way for such a one. Each block that a server leaves is held by others who serve it and stay.
    """
    holders = in_turn(holders)
    layout = _Claims.of(holders).layout(num_blocks)
    if (layout.held == 0).any():
        return tuple(_fill(holders, layout))
    return _improve(holders, layout)


def may_leave(holders: Sequence[Holder], peer: str, to: Span | None = None) -> bool:
    """Whether others serve all blocks of `peer`, or all that it leaves if it moves to the span `to`."""
    mine = next(one for one in holders if one.peer == peer)
    others = [one.span for one in holders if one.serves and one.peer != peer]
    left = (block for block in mine.span.blocks if to is None or block not in to.blocks)
    return all(any(block in span.blocks for span in others) for block in left)


def turn(peer: str) -> float:
    """The lower it is, the earlier is `peer`'s turn where several want the same; from 0 to 1."""
    return lot(peer)


def in_turn(holders: Sequence[Holder]) -> list[Holder]:
    return sorted(holders, key=lambda one: turn(one.peer))


def lot(*parts: object) -> float:
    """A number from 0 to 1 that `parts` draw, the same for everybody."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=6).digest(), "big") / 2**48


class _Claims(NamedTuple):
    """Where servers are, and how strong they say that they are, by number."""

    starts: Indices
    ends: Indices
    strengths: Floats

    @classmethod
    def of(cls, holders: Sequence[Holder]) -> "_Claims":
        edges = np.fromiter((edge for one in holders for edge in one.span), np.int64, 2 * len(holders))
        starts, ends = edges.reshape(-1, 2).T
        return cls(starts, ends, np.array([one.strength for one in holders], np.float64))

    def and_one(self, span: Span, strength: float) -> "_Claims":
        return _Claims(
            np.append(self.starts, span.start),
            np.append(self.ends, span.end),
            np.append(self.strengths, strength),
        )

    def layout(self, num_blocks: int) -> Layout:
        return Layout(num_blocks, self.starts, self.ends, _believed(self.strengths))

    def layout_and(self, num_blocks: int, strength: float) -> tuple[Layout, float]:
        """The same where there is another one besides, and how strong that is taken to be."""
        believed = _believed(np.append(self.strengths, strength))
        return Layout(num_blocks, self.starts, self.ends, believed[:-1]), float(believed[-1])


def _believed(strengths: Floats) -> Floats:
    """What each is taken to compute: who does not know counts as the one in the middle."""
    known = strengths[strengths > 0]
    middle = float(np.median(known)) if known.size else 1.0
    return np.where(strengths > 0, np.minimum(strengths, STRONGEST * middle), middle)


def _sums(values: Floats | Indices | Flags, size: int) -> Floats | Indices:
    """The sums of all runs of `size` values, by where they start."""
    before = np.concatenate(([0], values.cumsum()))
    return before[size:] - before[:-size]


def _is_most(values: Floats, tolerance: float) -> Flags:
    return values >= values.max() * (1 - tolerance)


def _is_most_with(layout: Layout, strength: float, size: int, starts: Indices) -> Flags:
    """At which of `starts` one more server lets the swarm carry as much as at the best of them."""
    highest = layout.bound + strength / layout.num_blocks
    nearly = layout.carries_with(strength, size, starts, highest * (1 - EQUAL))
    if nearly.all():
        return nearly
    most = layout.most_with(strength, size, starts)
    return layout.carries_with(strength, size, starts, most * (1 - EQUAL))


def _pieces(is_hole: Flags, start: int, size: int) -> int:
    """How many more spans of `size` cover the rest of the holes if one lies at `start`."""
    rest = is_hole.copy()
    rest[start : start + size] = False
    return sum(-(-len(list(run)) // size) for is_one, run in groupby(rest) if is_one)


def _seconds(even: Floats) -> Floats:
    """How long each block that is held takes for a token if its holders share themselves out evenly."""
    return np.divide(1.0, even, out=np.zeros_like(even), where=even > 0)


def _relief(even: Floats, share: float, size: int) -> Floats:
    """By where one more span of `size` starts, how much less that is in all if it adds `share` to each block:
    most where blocks are thin."""
    saved: Floats = _seconds(even) - np.where(even > 0, _seconds(even + share), 0.0)
    return np.asarray(_sums(saved, size), np.float64)


def _improve(holders: Sequence[Holder], layout: Layout) -> tuple[Move, ...]:
    """The move after which the swarm carries most, if it is worth one; else the first of a few that are.

    Only who holds none of the blocks that limit the swarm has more to give to them.
    """
    now = layout.tight()
    goal = now.throughput * (1 + MIN_GAIN)
    if layout.bound < goal:
        return ()
    serving = _serving(holders, layout)
    movers = [index for index, one in enumerate(holders) if one.may_improve and one.serves]
    places = []
    for index in movers:
        one = holders[index]
        may_move = one.serves_on or not _alone(layout, serving, index).size
        if may_move and not now.blocks[one.span.start : one.span.end].any():
            starts = _open_starts(layout, serving, index)
            places.append((index, starts[_sums(now.blocks, one.span.size)[starts] > 0]))
    best = _best(holders, layout, [place for place in places if place[1].size])
    if best is not None:
        reached = layout.moved(best.holder, best.span.start).tight().throughput
        if reached >= goal:
            return (Move(holders[best.holder].peer, best.span, reached / now.throughput),)
    return _make_way(holders, layout, movers, now.throughput) if len(movers) > 1 else ()


def _make_way(
    holders: Sequence[Holder], layout: Layout, movers: Sequence[int], throughput: float
) -> tuple[Move, ...]:
    """The first of a few moves that together let the swarm carry more than the `throughput` of today."""
    movers = sorted(movers, key=lambda index: -layout.strengths[index])[:MOST_MOVERS]
    crew = Crew(
        layout.num_blocks,
        layout.ends - layout.starts,
        layout.strengths,
        np.array([one.serves for one in holders]),
        np.array(movers, np.int64),
        np.array([holders[index].serves_on for index in movers], np.bool_),
    )
    chains = best_chains(crew, layout.starts, throughput, throughput * (1 + MIN_GAIN))
    if chains is None:
        return ()
    index, start = min(chains.first, key=lambda move: lot(holders[move[0]].peer, move[1]))
    span = Span(start, start + holders[index].span.size)
    return (Move(holders[index].peer, span, chains.throughput / throughput),)


def _fill(holders: Sequence[Holder], layout: Layout) -> Iterator[Move]:
    """Moves that fill holes, each as many as one can; two that do so together where no single one does."""
    serving = _serving(holders, layout)
    movers = [index for index, one in enumerate(holders) if one.may_fill and one.serves]
    while (layout.held == 0).any():
        best = _best(holders, layout, _fillings(layout, serving, movers))
        found = (best.holder, best.span) if best else _first_of_two(layout, serving, movers)
        if found is None:
            return
        index, span = found
        yield Move(holders[index].peer, span)
        serving = _moved(serving, layout, index, span)
        layout = layout.moved(index, span.start)
        movers.remove(index)


class _Place(NamedTuple):
    """Somewhere else for a server: how long tokens then take, and at how many places spans begin or end."""

    holder: int
    span: Span
    seconds: float
    edges: int


def _best(holders: Sequence[Holder], layout: Layout, places: Sequence[tuple[int, Indices]]) -> _Place | None:
    """The best of some `places`, each a server and the starts that it could move to."""
    movers = sorted(places, key=lambda place: -layout.strengths[place[0]])[:MOST_MOVERS]
    if not movers:
        return None
    tried = [
        (index, layout.without(index), float(layout.strengths[index]), holders[index].span.size, starts)
        for index, starts in movers
    ]
    most = max(rest.most_with(strength, size, starts) for _, rest, strength, size, starts in tried)
    found: list[_Place] = []
    for index, rest, strength, size, starts in tried:
        good = starts[rest.carries_with(strength, size, starts, most * (1 - EQUAL))]
        seconds = _seconds(rest.even).sum() - _relief(rest.even, strength / size, size)[good]
        spans = (Span(start, start + size) for start in good.tolist())
        edges = layout.edges_with(size, good)
        found += map(_Place, [index] * len(good), spans, seconds.tolist(), edges.tolist())
    least = min(place.seconds for place in found) * (1 + EQUAL)
    return min(
        (place for place in found if place.seconds <= least),
        key=lambda place: (place.edges, lot(holders[place.holder].peer, place.span.start)),
    )


def _fillings(layout: Layout, serving: Indices, movers: Sequence[int]) -> list[tuple[int, Indices]]:
    """Where servers could move to, each alone, and fill as many blocks as any single one can."""
    is_hole = layout.held == 0
    ways = []
    for index in movers:
        size = int(layout.ends[index] - layout.starts[index])
        starts = _open_starts(layout, serving, index)
        ways.append((index, starts, _sums(is_hole, size)[starts]))
    most = max((filled.max() for _, _, filled in ways if filled.size), default=0)
    return [
        (index, starts[filled == most]) for index, starts, filled in ways if most and (filled == most).any()
    ]


def _open_starts(layout: Layout, serving: Indices, index: int) -> Indices:
    """Where a server could begin and still hold all blocks that it alone serves."""
    size = int(layout.ends[index] - layout.starts[index])
    first, last = 0, layout.num_blocks - size
    alone = _alone(layout, serving, index)
    if alone.size:
        first, last = max(first, int(alone[-1]) - size + 1), min(last, int(alone[0]))
    return np.arange(first, last + 1)


def _alone(layout: Layout, serving: Indices, index: int) -> Indices:
    """The blocks that a server alone serves."""
    start = int(layout.starts[index])
    return start + np.flatnonzero(serving[start : layout.ends[index]] <= 1)


def _first_of_two(layout: Layout, serving: Indices, movers: Sequence[int]) -> tuple[int, Span] | None:
    """A move that fills nothing by itself, and takes over what keeps another server from filling most."""
    is_hole = layout.held == 0
    movers = movers[:MOST_PAIRED]
    ways = []
    for other in movers:
        size, alone = int(layout.ends[other] - layout.starts[other]), _alone(layout, serving, other)
        filled = _sums(is_hole, size)
        for start in np.flatnonzero(filled).tolist():
            kept = alone[(alone < start) | (alone >= start + size)]
            ways += [
                (-int(filled[start]), index, other, start, taken)
                for index in movers
                if index != other and (taken := _start_over(layout, serving, index, kept)) is not None
            ]
    for _, index, other, start, taken in sorted(ways)[:MOST_TRIES]:
        span = Span(taken, taken + int(layout.ends[index] - layout.starts[index]))
        after = _moved(serving, layout, index, span)
        if start in _open_starts(layout.moved(index, taken), after, other):
            return index, span
    return None


def _start_over(layout: Layout, serving: Indices, index: int, blocks: Indices) -> int | None:
    """Where a server could begin to hold all `blocks` too; None if it can't."""
    starts = _open_starts(layout, serving, index)
    size = int(layout.ends[index] - layout.starts[index])
    starts = starts[(starts <= blocks[0]) & (starts + size > blocks[-1])]
    return int(starts[0]) if starts.size else None


def _serving(holders: Sequence[Holder], layout: Layout) -> Indices:
    """How many servers serve each block and stay."""
    return _Claims.of([one for one in holders if one.serves]).layout(layout.num_blocks).held


def _moved(serving: Indices, layout: Layout, index: int, to: Span) -> Indices:
    """`serving` once a server has moved."""
    serving = serving.copy()
    serving[layout.starts[index] : layout.ends[index]] -= 1
    serving[to.start : to.end] += 1
    return serving
