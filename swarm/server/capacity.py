"""How many tokens a second the servers of a model can carry together, from where their spans lie.

A route may enter and leave a span at any block, and different sessions take different routes. So a server
that computes `c` (token, block) pairs a second can spread them over its blocks as the others leave them to
do: the most that the swarm carries is a maximum flow from servers to the blocks that they hold. Knows
numbers alone: nothing of peers, nor of who should move.
"""

from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float64]
Indices: TypeAlias = npt.NDArray[np.int64]
Flags: TypeAlias = npt.NDArray[np.bool_]

ROUNDING = 1e-9
"""Relative error of sums below which two throughputs count as equal."""


class Tight(NamedTuple):
    """The most tokens a second, and the blocks [num_blocks] whose holders have no more to give."""

    throughput: float
    blocks: Flags


@dataclass(frozen=True)
class Layout:
    """Servers that compute `strengths` (token, block) pairs a second on blocks `[starts, ends)`: arrays."""

    num_blocks: int
    starts: Indices
    ends: Indices
    strengths: Floats

    @cached_property
    def held(self) -> Indices:
        """How many servers hold each block."""
        edges = np.zeros(self.num_blocks + 1, np.int64)
        np.add.at(edges, self.starts, 1)
        np.add.at(edges, self.ends, -1)
        return edges.cumsum()[:-1]

    @cached_property
    def even(self) -> Floats:
        """Tokens a second at each block if every server shared itself out evenly over its span."""
        shares = self.strengths / (self.ends - self.starts)
        edges = np.zeros(self.num_blocks + 1)
        np.add.at(edges, self.starts, shares)
        np.add.at(edges, self.ends, -shares)
        return np.where(self.held > 0, np.maximum(edges.cumsum()[:-1], 0.0), 0.0)

    @cached_property
    def bound(self) -> float:
        """What no layout of these servers exceeds."""
        return float(self.strengths.sum()) / self.num_blocks

    def tight(self) -> Tight:
        """What these servers carry together, and where it is limited.

        By the max-flow min-cut theorem it is the least, over all sets of blocks, of the strength that holds
        any of them by their number. Those who hold none of a set lie in the gaps between its blocks, so a set
        is found by its gaps; the ratio is minimised by Dinkelbach's method (Management Science 13, 1967),
        from above.
        """
        throughput, blocks = self.bound, np.ones(self.num_blocks, np.bool_)
        while True:
            gaps = _best_gaps(self._within, throughput)
            lower = float(self._limit(gaps.idle[-1], gaps.outside[-1]))
            if lower >= throughput * (1 - ROUNDING):
                return Tight(throughput, blocks)
            throughput, blocks = lower, gaps.others()

    def most_with(self, strength: float, size: int, starts: Indices) -> float:
        """What they would carry with one more server of `size` blocks at the best of `starts`."""
        throughput = self.bound + strength / self.num_blocks
        while True:
            lower = float(self._limits_with(strength, size, starts, throughput).max())
            if lower >= throughput * (1 - ROUNDING):
                return throughput
            throughput = lower

    def carries_with(self, strength: float, size: int, starts: Indices, throughput: float) -> Flags:
        """At which of `starts` one more server of `size` blocks would let them carry `throughput`."""
        limits = self._limits_with(strength, size, starts, throughput)
        return np.asarray(limits >= throughput * (1 - ROUNDING), np.bool_)

    def edges_with(self, size: int, starts: Indices) -> Indices:
        """At how many places spans begin or end if there is one more of them, at each of `starts`."""
        is_edge = self._is_edge
        return np.asarray(is_edge.sum() + ~is_edge[starts] + ~is_edge[starts + size], np.int64)

    def without(self, index: int) -> "Layout":
        """The same without one server."""
        starts, ends = np.delete(self.starts, index), np.delete(self.ends, index)
        return Layout(self.num_blocks, starts, ends, np.delete(self.strengths, index))

    def moved(self, index: int, start: int) -> "Layout":
        """The same with one server moved."""
        starts, ends = self.starts.copy(), self.ends.copy()
        starts[index], ends[index] = start, start + self.ends[index] - self.starts[index]
        return Layout(self.num_blocks, starts, ends, self.strengths)

    @cached_property
    def _is_edge(self) -> Flags:
        is_edge = np.zeros(self.num_blocks + 1, np.bool_)
        is_edge[[0, self.num_blocks]] = True
        is_edge[self.starts] = is_edge[self.ends] = True
        return is_edge

    @cached_property
    def _within(self) -> Floats:
        """[from, to]: the strength of all servers whose whole span lies in blocks `[from, to)`."""
        at = np.zeros((self.num_blocks + 1, self.num_blocks + 1))
        np.add.at(at, (self.starts, self.ends), self.strengths)
        return at[::-1].cumsum(0)[::-1].cumsum(1)

    def _limits_with(self, strength: float, size: int, starts: Indices, throughput: float) -> Floats:
        """By where one more server begins, what some set of blocks limits them to.

        That is below `throughput` wherever less is carried: among the sets is the one that lacks most at
        `throughput`. The other server holds a block of it, or lies in one of its gaps.
        """
        before = _best_gaps(self._within, throughput)
        after = _best_gaps(self._within[::-1, ::-1].T, throughput)  # the same from the last block back
        held = self._limit(before.idle[-1], before.outside[-1], strength)
        idle = before.idle[:-1, None] + self._within + after.idle[-2::-1]
        outside = before.outside[:-1, None] + _lengths(self.num_blocks) + after.outside[-2::-1]
        in_gap = np.where(_is_gap(self.num_blocks), self._limit(idle, outside), np.inf)
        around = np.minimum.accumulate(np.minimum.accumulate(in_gap)[:, ::-1], axis=1)[:, ::-1]
        return np.minimum(held, around[starts, starts + size])

    def _limit(self, idle: npt.ArrayLike, outside: npt.ArrayLike, more: float = 0.0) -> Floats:
        """What the blocks around some gaps limit the throughput to: the strength on them by their number."""
        total = self._within[0, -1] + more
        strength = total - np.asarray(idle)
        others = np.maximum(self.num_blocks - np.asarray(outside), 1)
        return np.where(strength > ROUNDING * total, strength, 0.0) / others


def where_carried(
    num_blocks: int, starts: Indices, sizes: Indices, strengths: Floats, movers: Indices, throughput: float
) -> Flags:
    """Whether servers at `starts` [layouts, servers] carry `throughput` once one of the `movers` has moved.

    By layout, mover and the block where that begins then, [layouts, movers, num_blocks].

    They do if no set of blocks lacks anything at that: who moves holds a block of the set, or lies in one of
    its gaps.
    """
    throughput *= 1 - ROUNDING
    ends, at = starts + sizes, np.arange(num_blocks + 1)[:, None, None]
    within = np.zeros((num_blocks + 1, num_blocks + 1, len(starts)))  # [from, to, layouts], movers last
    np.add.at(within, (starts, ends, np.arange(len(starts))[:, None]), strengths)
    within = within[::-1].cumsum(0)[::-1].cumsum(1)
    costs = np.where(_is_gap(num_blocks), throughput * _lengths(num_blocks), np.inf)
    gains = (within - costs[..., None])[..., None].repeat(len(movers), axis=3)
    lies_in = (at <= starts[:, movers])[:, None] & (at >= ends[:, movers])
    np.subtract(gains, strengths[movers], out=gains, where=lies_in)
    before = _most_idle(gains)
    after = _most_idle(gains[::-1, ::-1].swapaxes(0, 1))
    around = gains
    around += before[:-1, None]
    around += after[-2::-1]
    for begin in range(1, num_blocks + 1):
        np.maximum(around[begin], around[begin - 1], out=around[begin])
    for end in range(num_blocks - 1, -1, -1):
        np.maximum(around[:, end], around[:, end + 1], out=around[:, end])
    spare = strengths.sum() * (1 + ROUNDING) - throughput * num_blocks
    found = np.zeros((len(starts), len(movers), num_blocks), np.bool_)
    for index, mover in enumerate(movers):
        begins = np.arange(num_blocks - sizes[mover] + 1)
        lacks = around[begins, begins + sizes[mover], :, index] + strengths[mover]
        found[:, index, begins] = (np.maximum(lacks, before[-1, :, index]) <= spare).T
    return found


class _Gaps(NamedTuple):
    """Gaps in which servers have most to give beyond a throughput, at least a block apart.

    By where the last of them ends at the latest, from one before block 0 on: their `idle` strength and how
    many blocks are `outside`, [blocks + 2]; and by where it ends, where it `begins`, or -1, [blocks + 1].
    """

    idle: Floats
    outside: Indices
    begins: Indices

    def others(self) -> Flags:
        """The blocks between all gaps."""
        blocks = np.ones(len(self.begins) - 1, np.bool_)
        end = len(blocks)
        while end > 0:
            begin = int(self.begins[end])
            if begin >= 0:
                blocks[begin:end] = False
            end = (begin if begin >= 0 else end) - 1
        return blocks


def _best_gaps(within: Floats, throughput: float) -> _Gaps:
    num_blocks = len(within) - 1
    gains = np.where(_is_gap(num_blocks), within - throughput * _lengths(num_blocks), -np.inf)
    best, idle = np.zeros(num_blocks + 2), np.zeros(num_blocks + 2)
    outside, begins = np.zeros(num_blocks + 2, np.int64), np.full(num_blocks + 1, -1)
    for end in np.flatnonzero((gains > 0).any(0)).tolist():
        given = best[:end] + gains[:end, end]
        begin = int(given.argmax())
        if given[begin] > best[end]:
            best[end + 1 :] = given[begin]
            idle[end + 1 :] = idle[begin] + within[begin, end]
            outside[end + 1 :] = outside[begin] + end - begin
            begins[end] = begin
    return _Gaps(idle, outside, begins)


def _most_idle(gains: Floats) -> Floats:
    """What the best gaps gain that end at the latest at each block, from one before block 0 on, in many
    layouts at once: `gains` are [from, to, ...]."""
    best = np.zeros((len(gains) + 1, *gains.shape[2:]))
    for end in range(1, len(gains)):
        np.maximum(best[end], (best[:end] + gains[:end, end]).max(0), out=best[end + 1])
    return best


@cache
def _lengths(num_blocks: int) -> Indices:
    """[from, to]: how many blocks lie between."""
    at = np.arange(num_blocks + 1)
    return at - at[:, None]


@cache
def _is_gap(num_blocks: int) -> Flags:
    """[from, to]: whether these blocks can be a gap; all of them cannot."""
    return (_lengths(num_blocks) > 0) & (_lengths(num_blocks) < num_blocks)
