"""How many tokens a second the servers of a model can carry together, from where their spans lie.

A route may enter and leave a span at any block, and different sessions take different routes. So a server
that computes `c` (token, block) pairs a second can spread them over its blocks as the others leave them to
do: the most that the swarm carries is a maximum flow from servers to the blocks that they hold. Knows
numbers alone: nothing of peers, nor of who should move.
"""

from dataclasses import dataclass
from functools import cached_property
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
        """What these servers carry together, and where it is limited."""
        throughput, blocks = _tightest(self._within(), self.bound, None)
        return Tight(float(throughput[0]), blocks[0])

    def throughputs_with(self, strength: float, size: int, starts: Indices) -> Floats:
        """What they would carry with one more server of `size` blocks, at each of `starts`."""
        bound = self.bound + strength / self.num_blocks
        return _tightest(self._within(), bound, _Another(strength, size, starts))[0]

    def edges_with(self, start: int, size: int) -> int:
        """At how many places spans begin or end if there is one more of them."""
        return len(self._edges | {start, start + size})

    @cached_property
    def _edges(self) -> set[int]:
        return {0, self.num_blocks, *self.starts.tolist(), *self.ends.tolist()}

    def without(self, index: int) -> "Layout":
        """The same without one server."""
        starts, ends = np.delete(self.starts, index), np.delete(self.ends, index)
        return Layout(self.num_blocks, starts, ends, np.delete(self.strengths, index))

    def moved(self, index: int, start: int) -> "Layout":
        """The same with one server moved."""
        starts, ends = self.starts.copy(), self.ends.copy()
        starts[index], ends[index] = start, start + self.ends[index] - self.starts[index]
        return Layout(self.num_blocks, starts, ends, self.strengths)

    def _within(self) -> Floats:
        """[from, to]: the strength of all servers whose whole span lies in blocks `[from, to)`."""
        at = np.zeros((self.num_blocks + 1, self.num_blocks + 1))
        np.add.at(at, (self.starts, self.ends), self.strengths)
        return at[::-1].cumsum(0)[::-1].cumsum(1)


class _Another(NamedTuple):
    """One more server, in as many cases as there are `starts`."""

    strength: float
    size: int
    starts: Indices


def _tightest(within: Floats, bound: float, another: _Another | None) -> tuple[Floats, Flags]:
    """In each case the throughput, and the blocks that limit it: arrays [cases] and [cases, blocks].

    By the max-flow min-cut theorem it is the least, over all sets of blocks, of the strength that holds any
    of them by their number. Those who hold none of a set lie in the gaps between its blocks, so a set is
    found by its gaps, in one pass over the blocks (`_gaps`); the ratio is minimised by Dinkelbach's method
    (Management Science 13, 1967), from above.
    """
    num_blocks = len(within) - 1
    cases = 1 if another is None else len(another.starts)
    total = within[0, -1] + (0.0 if another is None else another.strength)
    throughput, blocks = np.full(cases, bound), np.ones((cases, num_blocks), np.bool_)
    open_cases = np.arange(cases)
    while len(open_cases):
        some = None if another is None else another._replace(starts=another.starts[open_cases])
        idle, outside, gaps = _gaps(within, throughput[open_cases], some)
        lower = np.maximum(total - idle, 0.0) / (num_blocks - outside)
        is_lower = lower < throughput[open_cases] * (1 - ROUNDING)
        open_cases = open_cases[is_lower]
        throughput[open_cases] = lower[is_lower]
        blocks[open_cases] = ~gaps[is_lower]
    return throughput, blocks


def _gaps(within: Floats, throughput: Floats, another: _Another | None) -> tuple[Floats, Indices, Flags]:
    """In each case the gaps in which servers have most to give beyond `throughput`, at least a block apart.

    Returns the strength in them, their blocks' number, and which they are: [cases], [cases], [cases, blocks].
    """
    cases, num_blocks = len(throughput), len(within) - 1
    best = np.zeros((cases, num_blocks + 2))  # by where the last gap ends at the latest, from one before 0 on
    begins = np.full((cases, num_blocks + 1), -1)
    for end in range(1, num_blocks + 1):
        froms = np.arange(int(end == num_blocks), end)  # not all blocks are a gap
        strength = within[froms, end]
        given = best[:, froms] + strength - throughput[:, None] * (end - froms)
        if another is not None:
            given += another.strength * (
                (froms <= another.starts[:, None]) & (another.starts[:, None] + another.size <= end)
            )
        best[:, end + 1] = np.maximum(best[:, end], given.max(1, initial=0.0))
        is_better = best[:, end + 1] > best[:, end]
        if is_better.any():
            begins[is_better, end] = froms[given[is_better].argmax(1)]
    return _traced(within, begins, another)


def _traced(within: Floats, begins: Indices, another: _Another | None) -> tuple[Floats, Indices, Flags]:
    """The gaps that `begins`, [cases, ends], leads to from the last block back."""
    cases, num_blocks = len(begins), len(within) - 1
    idle, outside = np.zeros(cases), np.zeros(cases, np.int64)
    gaps = np.zeros((cases, num_blocks), np.bool_)
    for case in range(cases):
        end = num_blocks
        while end > 0:
            begin = int(begins[case, end])
            if begin < 0:
                end -= 1
                continue
            idle[case] += within[begin, end]
            if another is not None:
                start = another.starts[case]
                idle[case] += another.strength * (begin <= start and start + another.size <= end)
            outside[case] += end - begin
            gaps[case, begin:end] = True
            end = begin - 1
    return idle, outside, gaps
