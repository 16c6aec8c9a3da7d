"""The cheapest way on which nobody runs more blocks than they may.

Where the cheapest way of all asks too much of somebody, blocks are counted along the way; who would come
back for more is then held to one stretch of blocks or the other, whichever is cheaper. Whether there is a way
at all is a matter of placing blocks, and always told rightly. Knows numbers alone, as `search`.
"""

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import replace
from heapq import heappop, heappush
from itertools import count, groupby
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from swarm.client.search import CLIENT, Floats, Graph, Indices, Links, Relaxation, Visit, cheapest

Flags: TypeAlias = npt.NDArray[np.bool_]

MAX_SEARCHES = 32
"""How many ways of holding owners to one stretch each are tried before any way that is allowed will do."""


class Quota(NamedTuple):
    """Whose each server is, and how many blocks all its owner's servers may run: arrays [servers]."""

    owner: Indices
    most: Indices


def cheapest_within(graph: Graph, quota: Quota) -> list[Visit] | None:
    """As `cheapest`, but with no owner above its quota; None where that cannot be.

    It is the cheapest such way where nobody gains by coming back; else one that is nearly as cheap.
    """
    graph = _without(graph, quota.most == 0)
    if not _is_covered(graph):
        return None
    visits = cheapest(graph)
    if _over(visits, quota) is None:
        return visits
    apart = replace(graph, links=_between_owners(graph.links, quota.owner))
    return _branched(apart, quota) or _placed(graph, quota)


def unplaced(graph: Graph, quota: Quota) -> list[int]:
    """Blocks that nobody is left for, whoever runs the others; empty where `cheapest_within` finds a way."""
    at = _placing(graph, quota)
    return [block for block in range(graph.num_blocks) if block not in at]


def _branched(graph: Graph, quota: Quota) -> list[Visit] | None:
    """The cheapest way on which who would run too much is held to one of the stretches that it would run."""
    order = count()
    waiting: list[tuple[float, int, Graph, list[Visit]]] = []

    def consider(narrowed: Graph) -> None:
        if _is_covered(narrowed) and (found := _Bounded(narrowed, quota).found()) is not None:
            heappush(waiting, (found[0], next(order), narrowed, found[1]))

    consider(graph)
    while waiting and next(order) < MAX_SEARCHES:
        _, _, narrowed, visits = heappop(waiting)
        owner = _over(visits, quota)
        if owner is None:
            return visits
        for window in _windows(visits, owner, quota, graph.num_blocks):
            consider(_held_to(narrowed, quota.owner == owner, *window))
    return None


def _over(visits: Sequence[Visit], quota: Quota) -> int | None:
    """An owner that runs more than its quota, if there is one."""
    blocks: defaultdict[int, int] = defaultdict(int)
    for server, start, end in visits:
        owner = int(quota.owner[server])
        blocks[owner] += end - start
        if blocks[owner] > quota.most[server]:
            return owner
    return None


def _windows(visits: Sequence[Visit], owner: int, quota: Quota, num_blocks: int) -> list[tuple[int, int]]:
    """Between which blocks each visit of an owner lies, up to its visits before and after."""
    own = [visit for visit in visits if quota.owner[visit.server] == owner]
    starts = [0, *(visit.end for visit in own[:-1])]
    return list(zip(starts, [*(visit.start for visit in own[1:]), num_blocks], strict=True))


def _without(graph: Graph, left_out: Flags) -> Graph:
    return _held_to(graph, left_out, 0, 0)


def _held_to(graph: Graph, who: Flags, first: int, end: int) -> Graph:
    """The graph in which the servers `who` hold blocks of `[first, end)` only."""
    return replace(
        graph,
        start=np.where(who, np.clip(graph.start, first, end), graph.start),
        end=np.where(who, np.clip(graph.end, first, end), graph.end),
    )


def _is_covered(graph: Graph) -> bool:
    held = graph.end > graph.start
    change = np.bincount(graph.start[held], minlength=graph.num_blocks + 1) - np.bincount(
        graph.end[held], minlength=graph.num_blocks + 1
    )
    return bool(change.cumsum()[: graph.num_blocks].all())


def _between_owners(links: Links | None, owner: Indices) -> Links | None:
    """Without the edges from one server to another of the same owner."""
    if links is None:
        return None
    is_own = owner[links.targets] == owner[:, None]
    return Links(links.targets, np.where(is_own, np.inf, links.seconds))


class _Ran(NamedTuple):
    """The servers that have run one block, ascending.

    With whom they took over from if it was their first one, and how many they have run without a break on the
    cheapest way to here.
    """

    servers: Indices
    before: Indices
    run: Indices

    def at(self, server: int) -> int:
        return int(np.searchsorted(self.servers, server))


class _Bounded(Relaxation):
    """A relaxation that counts the blocks which each server runs without a break: no more than its quota.

    Nobody takes over from themselves to begin anew; whoever comes back later is not found out here.
    """

    def __init__(self, graph: Graph, quota: Quota):
        super().__init__(graph)
        self._quota = quota
        width = int(min(quota.most.max(initial=1), graph.num_blocks))
        self._may_run = np.arange(width) < quota.most[:, None]
        self._runs = np.full((len(graph.start), width), np.inf)
        self._run_visits = np.zeros_like(self._runs, np.int64)
        self._ran: list[_Ran] = []
        self._last = CLIENT
        self._other = (np.inf, 0, CLIENT)
        """The best way for the client to the present boundary that comes from another owner than the best."""

    def found(self) -> tuple[float, list[Visit]] | None:
        """The cost of the cheapest way, and its visits; None where there is none."""
        graph = self._graph
        for block in range(graph.num_blocks):
            holders = np.flatnonzero((graph.start <= block) & (block < graph.end))
            self._run_block(block, holders)
            self._leave(holders, graph.last if block + 1 == graph.num_blocks else graph.leave)
            if self._client[0] == np.inf:
                return None
        return self._client[0], self._visited()

    def _run_block(self, block: int, holders: Indices) -> None:
        graph, (cost, visits), owner = self._graph, self._client, self._quota.owner
        way = (graph.come if block else graph.first)[holders]
        costs, counts = way + cost, np.full(len(holders), visits + 1)
        before = np.full(len(holders), self._last)
        if block:
            is_own = owner[holders] == owner[self._last]
            other_cost, other_visits, other = self._other
            costs[is_own], counts[is_own] = way[is_own] + other_cost, other_visits + 1
            before[is_own] = other
            if self._shortcuts is not None:
                self._shortcut(self._shortcuts, holders, costs, counts, before, max(cost, other_cost))
        runs, run_visits = np.empty_like(self._runs[holders]), self._run_visits[holders]
        runs[:, 1:] = self._runs[holders][:, :-1]
        run_visits[:, 1:] = run_visits[:, :-1].copy()
        runs[:, 0], run_visits[:, 0] = costs + graph.enter[holders], counts
        runs += graph.block[holders][:, None]
        runs[~self._may_run[holders]] = np.inf
        least = runs.min(axis=1)
        at = np.where(runs == least[:, None], run_visits, np.iinfo(np.int64).max).argmin(axis=1)
        self._cost[self._active], self._runs[self._active] = np.inf, np.inf
        self._cost[holders], self._runs[holders] = least, runs
        self._visits[holders], self._run_visits[holders] = run_visits[np.arange(len(holders)), at], run_visits
        self._ran.append(_Ran(holders, before, at + 1))
        self._active = holders[least < np.inf]

    def _leave(self, holders: Indices, way: Floats) -> None:
        costs, visits = self._cost[holders] + way[holders], self._visits[holders]
        order = np.lexsort((visits, costs))
        best, owner = order[0], self._quota.owner[holders]
        self._client, self._last = (float(costs[best]), int(visits[best])), int(holders[best])
        others = order[owner[order] != owner[best]]
        if len(others):
            other = others[0]
            self._other = float(costs[other]), int(visits[other]), int(holders[other])
        else:
            self._other = np.inf, 0, CLIENT

    def _visited(self) -> list[Visit]:
        visits: list[Visit] = []
        end, server = self._graph.num_blocks, self._last
        while end:
            ran = self._ran[end - 1]
            start = end - int(ran.run[ran.at(server)])
            visits.append(Visit(server, start, end))
            first = self._ran[start]
            end, server = start, int(first.before[first.at(server)])
        return visits[::-1]


def _placed(graph: Graph, quota: Quota) -> list[Visit] | None:
    """Any way that is allowed; blocks next to each other are left to one server where that is easy."""
    at = _placing(graph, quota)
    if len(at) < graph.num_blocks:
        return None
    stretches = (list(blocks) for _, blocks in groupby(range(graph.num_blocks), at.__getitem__))
    return [Visit(at[blocks[0]], blocks[0], blocks[-1] + 1) for blocks in stretches]


def _placing(graph: Graph, quota: Quota) -> dict[int, int]:
    """A server for as many blocks as can have one: a largest matching, by augmenting paths."""
    owner, most = quota.owner.tolist(), quota.most.tolist()
    at: dict[int, int] = {}
    held: defaultdict[int, set[int]] = defaultdict(set)
    holders: list[list[int]] = []
    for block in range(graph.num_blocks):
        found = np.flatnonzero((graph.start <= block) & (block < graph.end) & (quota.most > 0))
        holders.append(found[np.argsort(graph.block[found], kind="stable")].tolist())

    def place(block: int) -> None:
        came: dict[int, tuple[int, int]] = {}
        waiting = deque([block])
        while waiting:
            asking = waiting.popleft()
            for server in _preferred(holders[asking], at.get(asking - 1)):
                own = owner[server]
                if own in came:
                    continue
                came[own] = asking, server
                if len(held[own]) < most[server]:
                    settle(block, own, came)
                    return
                waiting.extend(sorted(held[own]))

    def settle(block: int, own: int, came: dict[int, tuple[int, int]]) -> None:
        """Give `own` the block that asked it, whose place goes to the one that asked for that, and so on."""
        while True:
            moved, server = came[own]
            before = at.get(moved)
            at[moved] = server
            held[own].add(moved)
            if moved == block or before is None:
                return
            own = owner[before]
            held[own].discard(moved)

    for block in range(graph.num_blocks):
        place(block)
    return at


def _preferred(holders: list[int], before: int | None) -> list[int]:
    return [before, *holders] if before is not None and before in holders else holders
