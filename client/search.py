"""The cheapest way through blocks that many servers hold in overlapping spans.

A graph whose vertices are (server, boundary between blocks) and (client, boundary). Its edges lead to the
same boundary or to the next one, so it is relaxed boundary by boundary, with arrays over servers. Knows
numbers alone: nothing of peers, announcements or what a cost means.
"""

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float64]
Indices: TypeAlias = npt.NDArray[np.int64]

CLIENT = -1
"""Stands for the client where a server would have its index."""

ROUNDING = 1e-9
"""Seconds by which sums of the same edges may differ: what may cost as little is not left out early."""


class Visit(NamedTuple):
    """A server of that index runs the blocks `[start, end)`."""

    server: int
    start: int
    end: int


class Links(NamedTuple):
    """Edges from each server straight to the servers `targets`: arrays [servers, edges].

    They cost `seconds`, infinity where there is no edge.
    """

    targets: Indices
    seconds: Floats


@dataclass(frozen=True)
class Graph:
    """The servers of blocks `[0, num_blocks)` and what it costs to use them: arrays [servers].

    A server holds `[start, end)`. `enter` is paid whenever it takes over, `block` for each block; `come` and
    `leave` for the way from and to the client, `first` and `last` in their place at the two ends.
    """

    num_blocks: int
    start: Indices
    end: Indices
    enter: Floats
    block: Floats
    come: Floats
    leave: Floats
    first: Floats
    last: Floats
    links: Links | None = None


def cheapest(graph: Graph) -> list[Visit]:
    """The visits of the cheapest way through all blocks; each must be held by some server.

    Where two ways cost the same, the one with fewer visits is taken, then servers of lower indices.
    """
    return Relaxation(graph).run()


class _Reached(NamedTuple):
    """How servers come to have run one block: their indices, ascending, and who ran the one before."""

    servers: Indices
    before: Indices


class Relaxation:
    """The costs and visits with which each server and the client reach the present boundary."""

    def __init__(self, graph: Graph):
        self._graph = graph
        count = len(graph.start)
        self._cost = np.full(count, np.inf)
        self._visits = np.zeros(count, np.int64)
        self._client = (0.0, 0)
        self._active = np.zeros(0, np.int64)
        self._shortcuts = None if graph.links is None else _Shortcuts(graph.links, graph.come)
        self._reached: list[_Reached] = []
        self._left_by: list[int] = []
        """Of each boundary but the first, the server that brings the client there."""

    def run(self) -> list[Visit]:
        graph = self._graph
        for block in range(graph.num_blocks):
            holders = np.flatnonzero((graph.start <= block) & (block < graph.end))
            self._run_block(block, holders)
            self._leave(holders, graph.last if block + 1 == graph.num_blocks else graph.leave)
        return self._visited()

    def _run_block(self, block: int, holders: Indices) -> None:
        """Cross to the next boundary: `holders` go on, or take over from the client or from one another."""
        graph, (cost, visits) = self._graph, self._client
        costs = (graph.come if block else graph.first)[holders] + cost
        counts = np.full(len(holders), visits + 1)
        before = np.full(len(holders), CLIENT)
        if block and self._shortcuts is not None:
            self._shortcut(self._shortcuts, holders, costs, counts, before, cost)
        costs += graph.enter[holders]
        stay, stay_counts = self._cost[holders], self._visits[holders]
        stays = (stay < costs) | ((stay == costs) & (stay_counts < counts))
        self._cost[self._active] = np.inf
        self._cost[holders] = np.where(stays, stay, costs) + graph.block[holders]
        self._visits[holders] = np.where(stays, stay_counts, counts)
        self._reached.append(_Reached(holders, np.where(stays, holders, before)))
        self._active = holders

    def _shortcut(
        self,
        links: "_Shortcuts",
        holders: Indices,
        costs: Floats,
        counts: Indices,
        before: Indices,
        client: float,
    ) -> None:
        """Lower what it takes `holders` to take over, where a server reaches them cheaper than the client.

        That has come for `client` at most.
        """
        sources, targets, offered = links.offers(self._active, self._cost, client, holders)
        at = np.searchsorted(holders, targets)
        visits = self._visits[sources] + 1
        wins = np.flatnonzero((offered < costs[at]) | ((offered == costs[at]) & (visits < counts[at])))
        order = wins[np.lexsort((sources[wins], visits[wins], at[wins]))]
        best = order[_firsts(at[order])]
        at = at[best]
        costs[at], counts[at], before[at] = offered[best], visits[best], sources[best]

    def _leave(self, holders: Indices, way: Floats) -> None:
        """The client may take over from the one who brings it to the present boundary at the least cost."""
        costs = self._cost[holders] + way[holders]
        nearest = np.flatnonzero(costs == costs.min())
        best = nearest[np.argmin(self._visits[holders[nearest]])]
        self._client = float(costs[best]), int(self._visits[holders[best]])
        self._left_by.append(int(holders[best]))

    def _visited(self) -> list[Visit]:
        """Follow the way back from the last block to the first."""
        visits: list[Visit] = []
        end, server = self._graph.num_blocks, self._left_by[-1]
        for block in range(end - 1, -1, -1):
            servers, before = self._reached[block]
            earlier = int(before[np.searchsorted(servers, server)])
            if earlier != server:
                visits.append(Visit(server, block, end))
                end, server = block, self._left_by[block - 1] if earlier == CLIENT else earlier
        return visits[::-1]


class _Shortcuts:
    """The edges between servers, each with what it would save if the client were already at its source.

    Only an edge that saves more than its source is behind the client is worth a look, which is few of them.
    """

    def __init__(self, links: Links, come: Floats):
        saved = come[links.targets] - links.seconds
        self._saved = saved
        self._most = saved.max(axis=1, initial=-np.inf)
        self._width = max(1, links.targets.shape[1])
        self._targets = links.targets.ravel()
        self._seconds = links.seconds.ravel()
        self._lowest = np.full(len(come), np.inf)
        self._is_holder = np.zeros(len(come), np.bool_)

    def offers(
        self, active: Indices, cost: Floats, client: float, holders: Indices
    ) -> tuple[Indices, Indices, Floats]:
        """The lowest offer to each of `holders`, all of them where some are equal: sources, targets, costs.

        `active` may hand over, at their `cost`; what leads to a holder no cheaper than from a client that
        has come for `client` may be missing.
        """
        behind = cost[active] - (client + ROUNDING)
        useful = np.flatnonzero(behind <= self._most[active])
        sources = active[useful]
        kept = np.flatnonzero(self._saved.take(sources, 0) >= behind[useful, None])
        rows = kept // self._width
        edges = kept + (sources * self._width - np.arange(len(sources)) * self._width)[rows]
        targets = self._targets[edges]
        self._is_holder[holders] = True
        held = np.flatnonzero(self._is_holder[targets])
        self._is_holder[holders] = False
        sources, targets = sources[rows[held]], targets[held]
        offered = cost[sources] + self._seconds[edges[held]]
        self._lowest[targets] = np.inf
        np.minimum.at(self._lowest, targets, offered)
        lowest = np.flatnonzero(offered == self._lowest[targets])
        return sources[lowest], targets[lowest], offered[lowest]


def _firsts(ascending: Indices) -> Indices:
    """Where each value stands first."""
    is_first = np.ones(len(ascending), np.bool_)
    np.not_equal(ascending[1:], ascending[:-1], out=is_first[1:])
    return np.flatnonzero(is_first)
