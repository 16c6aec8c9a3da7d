"""Moves of a few servers, one after the other, that let the swarm carry more where no single one does.

After each of them it carries no less than before, so nothing is lost if the others never come. A server moves
once in a chain at most: it rests then. Knows servers by number, and nothing of who they are.
"""

from dataclasses import dataclass, replace
from math import sqrt
from typing import NamedTuple

import numpy as np

from swarm.server.capacity import Flags, Floats, Indices, where_carried

MOST_MOVES = 3

EQUAL = 0.01
"""Relative difference up to which the swarm counts as carrying as much."""

MOST_CELLS, CELLS_AT_ONCE = 20_000_000, 300_000
"""Floats that one look at all next moves may take, about half a second, and how many are in memory at once.
Longer chains are not looked for if that is too little."""


@dataclass(frozen=True)
class Crew:
    """Servers of `sizes` and `strengths`, of which those that `serve` count as holding their blocks.

    The `movers` may move, [movers] by number, and have to be among those. One that does not serve on while it
    loads, as `serves_on` [movers] says, has to leave all its blocks to others.
    """

    num_blocks: int
    sizes: Indices
    strengths: Floats
    serve: Flags
    movers: Indices
    serves_on: Flags


class Chained(NamedTuple):
    """What the best chains let the swarm carry, and their first moves: who goes, and where it begins then."""

    throughput: float
    first: list[tuple[int, int]]


def best_chains(crew: Crew, starts: Indices, throughput: float, goal: float) -> Chained | None:
    """The shortest chains of two moves or more that raise `throughput` to `goal`, for servers at `starts`.

    Those that come as far as any as short do. Once the first move is made, the rest is a shorter chain; so
    moves come to an end.
    """
    none = np.zeros((1, len(crew.movers)), np.bool_)
    reached = _Reached(crew, starts[None], np.zeros((1, 2), np.int64), none)
    for _ in range(MOST_MOVES - 1):
        if reached.cells > MOST_CELLS:
            return None
        reached = reached.after(throughput)
        if reached.cells <= MOST_CELLS and (found := reached.best(goal)):
            return found
    return None


@dataclass(frozen=True)
class _Reached:
    """Where some chains lead: `starts` [chains, servers], `first` moves [chains, 2], and who `moved`
    [chains, movers]."""

    crew: Crew
    starts: Indices
    first: Indices
    moved: Flags

    @property
    def cells(self) -> int:
        return self.moved.size * (self.crew.num_blocks + 1) ** 2

    def after(self, throughput: float) -> "_Reached":
        """Where they lead with one more move after which the swarm carries `throughput`."""
        chains, movers, begins = np.nonzero(self._carry(throughput) & self._is_open())
        starts, moved, first = self.starts[chains], self.moved[chains], self.first[chains]
        row = np.arange(len(chains))
        starts[row, self.crew.movers[movers]] = begins
        is_first = ~moved.any(1)
        first[is_first] = np.stack((self.crew.movers[movers], begins), axis=1)[is_first]
        moved[row, movers] = True
        _, kept = np.unique(starts, axis=0, return_index=True)
        return _Reached(self.crew, starts[kept], first[kept], moved[kept])

    def best(self, goal: float) -> Chained | None:
        """Those that one more move can raise to `goal`, and as far above that as any."""
        best, level = self._where_one_more_reaches(goal), goal
        if not len(best.starts):
            return None
        beyond = float(self.crew.strengths.sum()) / self.crew.num_blocks * (1 + EQUAL)
        while beyond > level * (1 + EQUAL):
            middle = sqrt(level * beyond)
            better = best._where_one_more_reaches(middle)
            if len(better.starts):
                best, level = better, middle
            else:
                beyond = middle
        return Chained(level, [(who, start) for who, start in np.unique(best.first, axis=0).tolist()])

    def _where_one_more_reaches(self, throughput: float) -> "_Reached":
        rows = (self._carry(throughput) & self._is_open()).any((1, 2))
        return replace(self, starts=self.starts[rows], first=self.first[rows], moved=self.moved[rows])

    def _carry(self, throughput: float) -> Flags:
        """Whether the swarm carries that once each of the movers begins at each block.

        By chain, mover and block, [chains, movers, num_blocks].
        """
        crew, at_once = self.crew, max(1, CELLS_AT_ONCE * len(self.starts) // max(1, self.cells))
        found = np.zeros((*self.moved.shape, crew.num_blocks), np.bool_)
        for begin in range(0, len(self.starts), at_once):
            some = slice(begin, begin + at_once)
            found[some] = where_carried(
                crew.num_blocks, self.starts[some], crew.sizes, crew.strengths, crew.movers, throughput
            )
        return found

    def _is_open(self) -> Flags:
        """Whether each of the movers may begin at each block, [chains, movers, num_blocks]: it has not moved
        yet, and others serve what it leaves."""
        crew, at = self.crew, np.arange(self.crew.num_blocks)
        served = np.zeros((len(self.starts), crew.num_blocks + 1), np.int64)
        row = np.arange(len(self.starts))[:, None]
        np.add.at(served, (row, self.starts[:, crew.serve]), 1)
        np.add.at(served, (row, (self.starts + crew.sizes)[:, crew.serve]), -1)
        served = served.cumsum(1)
        is_open = np.zeros((*self.moved.shape, crew.num_blocks), np.bool_)
        for index, mover in enumerate(crew.movers):
            start, size = self.starts[:, mover, None], int(crew.sizes[mover])
            alone = served[row, start + np.arange(size)] <= 1
            is_needed = alone.any(1, keepdims=True)
            first = start + alone.argmax(1, keepdims=True)
            last = start + size - 1 - alone[:, ::-1].argmax(1, keepdims=True)
            holds_on = (at <= first) & (at + size > last) & crew.serves_on[index]
            is_place = (at + size <= crew.num_blocks) & (at != start)
            is_open[:, index] = is_place & (~is_needed | holds_on) & ~self.moved[:, index, None]
        return is_open
