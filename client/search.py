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

NOWHERE = -1
"""Stands for a place among holders where a server is none."""

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
        for block, holders in enumerate(_holders(graph)):
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
        sources, at, offered = links.offers(self._active, self._cost, client, holders)
        visits = self._visits[sources] + 1
        wins = ((offered < costs[at]) | ((offered == costs[at]) & (visits < counts[at]))).nonzero()[0]
        best_last = wins[np.argsort(visits[wins], kind="stable")[::-1]]
        at = at[best_last]  # where a place is written to twice, what comes last stays
        costs[at], counts[at], before[at] = offered[best_last], visits[best_last], sources[best_last]

    def _leave(self, holders: Indices, way: Floats) -> None:
        """The client may take over from the one who brings it to the present boundary at the least cost."""
        costs = self._cost[holders] + way[holders]
        nearest = (costs == costs.min()).nonzero()[0]
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
        self._at = np.full(len(come), NOWHERE)
        """Where the holders of the present block stand among themselves."""

    def offers(
        self, active: Indices, cost: Floats, client: float, holders: Indices
    ) -> tuple[Indices, Indices, Floats]:
        """The lowest offer to each of `holders`, all of them where some are equal: sources, ascending, places
        among `holders`, costs.

        `active` may hand over, at their `cost`; what leads to a holder no cheaper than from a client that
        has come for `client` may be missing.
        """
        behind = cost[active] - (client + ROUNDING)
        useful = (behind <= self._most[active]).nonzero()[0]
        sources = active[useful]
        kept = (self._saved.take(sources, 0) >= behind[useful, None]).ravel().nonzero()[0]
        rows = kept // self._width
        edges = kept + ((sources - np.arange(len(sources))) * self._width)[rows]
        self._at[holders] = np.arange(len(holders))
        at = self._at[self._targets[edges]]
        self._at[holders] = NOWHERE
        held = (at != NOWHERE).nonzero()[0]
        sources, at = sources[rows[held]], at[held]
        offered = cost[sources] + self._seconds[edges[held]]
        least = np.full(len(holders), np.inf)
        np.minimum.at(least, at, offered)
        lowest = (offered == least[at]).nonzero()[0]
        return sources[lowest], at[lowest], offered[lowest]


def _holders(graph: Graph) -> list[Indices]:
    """Who holds each block."""
    blocks = np.arange(graph.num_blocks)[:, None]
    at, servers = ((graph.start <= blocks) & (blocks < graph.end)).nonzero()
    return np.split(servers, np.searchsorted(at, blocks[1:, 0]))
