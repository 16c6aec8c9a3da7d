"""Ways to place servers, to compare ours with: what others publish of theirs, and the best there is.

Each is written from the description, not from the code. All see the same servers: a size, the most blocks
that one can hold, and a strength, the (token, block) pairs that it computes a second.

- Petals (`block_selection` in its repository): a newcomer takes the run of blocks whose rates, sorted, are
  the least; now and then each server imagines what all would do by that rule, and takes another place
  if the least rate now is under 0.75 of the least rate then.
- Parallax (arXiv 2509.26182, and the README of its scheduler): pipelines of servers that together hold all
  blocks, as many as possible of few stages each, made greedily, or by a dynamic programme that maximises
  k² / (stages of k pipelines). Within a pipeline blocks are shared out in proportion to strength, as far as
  sizes allow (water-filling). Who is left over, or comes later, begins at the lightest block.
- The optimum: a mixed integer programme over all places of all servers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from swarm.server.capacity import Layout
from swarm.spans import Span

EPSILON = 1e-3
QUALITY = 0.75
"""Both as Petals has them by default."""

MOST_STATES = 200
"""States that the dynamic programme keeps after each server; it grows exponentially otherwise."""


@dataclass(frozen=True)
class Server:
    name: str
    size: int
    strength: float


Places = dict[str, Span]
"""Where servers are, by their names."""


def layout_of(servers: Sequence[Server], places: Places, num_blocks: int) -> Layout:
    """Of those servers that have a place."""
    there = [one for one in servers if one.name in places]
    spans = np.array([places[one.name] for one in there], np.int64).reshape(-1, 2)
    strengths = np.array([one.strength for one in there], np.float64)
    return Layout(num_blocks, spans[:, 0], spans[:, 1], strengths)


def carried(servers: Sequence[Server], places: Places, num_blocks: int) -> float:
    """Tokens a second that routes can get, which may enter and leave a span at any block."""
    return layout_of(servers, places, num_blocks).tight().throughput


class Petals:
    """Rates by block: each server counts with its strength over its size at each block that it holds."""

    def __init__(self, num_blocks: int, rng: np.random.Generator):
        self._num_blocks = num_blocks
        self._rng = rng

    def join(self, servers: Sequence[Server], places: Places, newcomer: Server) -> Span:
        return self._best(self._rates(servers, places), newcomer.size)

    def should_move(self, servers: Sequence[Server], places: Places, mine: Server) -> bool:
        rates = self._rates(servers, places)
        before = rates.min()
        self._add(rates, places[mine.name], -mine.strength / mine.size * (1 + EPSILON))
        if before > EPSILON and rates.min() <= 0:
            return False
        best = self._best(rates, mine.size)
        if best == places[mine.name]:
            return False
        imagined = self._all_by_the_rule(servers, {**places, mine.name: best})
        after = self._rates(servers, imagined).min()
        return bool(after >= max(before, EPSILON) and before / after < QUALITY - EPSILON)

    def move(self, servers: Sequence[Server], places: Places, mine: Server) -> Span:
        others = {name: span for name, span in places.items() if name != mine.name}
        return self._best(self._rates(servers, others), mine.size)

    def _all_by_the_rule(self, servers: Sequence[Server], places: Places) -> Places:
        places, rates = dict(places), self._rates(servers, places)
        for _ in range(50):
            has_moved = False
            for index in self._rng.permutation(len(servers)).tolist():
                one = servers[index]
                if one.name not in places:
                    continue
                share = one.strength / one.size
                self._add(rates, places[one.name], -share * (1 + EPSILON))
                best = self._best(rates, one.size)
                self._add(rates, places[one.name], share * EPSILON)
                has_moved = has_moved or best != places[one.name]
                places[one.name] = best
                self._add(rates, best, share)
            if not has_moved:
                break
        return places

    def _rates(self, servers: Sequence[Server], places: Places) -> np.ndarray:
        return layout_of(servers, places, self._num_blocks).even.copy()

    def _add(self, rates: np.ndarray, span: Span, share: float) -> None:
        rates[span.start : span.end] += share

    def _best(self, rates: np.ndarray, size: int) -> Span:
        windows = np.sort(np.lib.stride_tricks.sliding_window_view(rates, size), axis=1)
        start = int(np.lexsort(windows.T[::-1])[0])
        return Span(start, start + size)


class Parallax:
    """`by_programme` makes the pipelines by dynamic programming, else greedily."""

    def __init__(self, num_blocks: int, *, by_programme: bool):
        self._num_blocks = num_blocks
        self._by_programme = by_programme

    def allocate(self, servers: Sequence[Server]) -> Places:
        """All servers anew; nobody has a place where they cannot hold all blocks."""
        ordered = sorted(servers, key=lambda one: -one.size)
        places: Places = {}
        for pipeline in self._programmed(ordered) if self._by_programme else self._greedy(ordered):
            places |= self._filled(pipeline)
        if places:
            for one in ordered:
                if one.name not in places:
                    places[one.name] = self.join(servers, places, one)
        return places

    def join(self, servers: Sequence[Server], places: Places, newcomer: Server) -> Span:
        start = int(layout_of(servers, places, self._num_blocks).even.argmin())
        return Span(start, min(start + newcomer.size, self._num_blocks))

    def has_pipeline(self, places: Places) -> bool:
        """Whether some spans follow each other from the first block to the last."""
        reached = {0}
        for span in sorted(places.values()):
            if span.start in reached:
                reached.add(span.end)
        return self._num_blocks in reached

    def _greedy(self, ordered: Sequence[Server]) -> list[list[Server]]:
        """The largest first; the last of each is the smallest that will do if enough is left for another."""
        left, pipelines = list(ordered), []
        while sum(one.size for one in left) >= self._num_blocks:
            pipeline, missing = [], self._num_blocks
            while missing > 0:
                spare = sum(one.size for one in left) - missing >= self._num_blocks
                ending = [one for one in left if one.size >= missing]
                one = ending[-1] if spare and ending else left[0]
                left.remove(one)
                pipeline.append(one)
                missing -= one.size
            pipelines.append(pipeline)
        return pipelines

    def _programmed(self, ordered: Sequence[Server]) -> list[list[Server]]:
        """The pipelines of the k that maximises k² / s(k), s being the least stages of k pipelines."""
        most = min(len(ordered), sum(one.size for one in ordered) // self._num_blocks)
        found = [made for k in range(1, most + 1) if (made := self._fewest_stages(ordered, k))]
        return max(found, key=lambda made: len(made) ** 2 / sum(map(len, made)), default=[])

    def _fewest_stages(self, ordered: Sequence[Server], k: int) -> list[list[Server]] | None:
        """A state is how many blocks each of `k` pipelines still lacks, and its value who is in them."""
        states: dict[tuple[int, ...], tuple[tuple[int, ...], ...]] = {(self._num_blocks,) * k: ((),) * k}
        for index, one in enumerate(ordered):
            following = dict(states)
            for lacking, members in states.items():
                for at in range(k):
                    if lacking[at] <= 0 or (at and lacking[at] == lacking[at - 1]):
                        continue
                    pairs = [*zip(lacking, members, strict=True)]
                    pairs[at] = (max(lacking[at] - one.size, 0), (*members[at], index))
                    key, value = zip(*sorted(pairs), strict=True)
                    if key not in following or sum(map(len, value)) < sum(map(len, following[key])):
                        following[key] = value
            kept = sorted(following.items(), key=lambda state: (sum(state[0]), sum(map(len, state[1]))))
            states = dict(kept[:MOST_STATES])
        done = states.get((0,) * k)
        return None if done is None else [[ordered[index] for index in members] for members in done]

    def _filled(self, pipeline: Sequence[Server]) -> Places:
        """Blocks in proportion to strength, up to sizes: the level is found by bisection, then rounded."""
        low, high = 0.0, max(one.size / one.strength for one in pipeline)
        for _ in range(40):
            level = (low + high) / 2
            if sum(min(one.size, level * one.strength) for one in pipeline) >= self._num_blocks:
                high = level
            else:
                low = level
        wanted = [min(one.size, high * one.strength) for one in pipeline]
        counts = [int(share) for share in wanted]
        by_rest = sorted(range(len(wanted)), key=lambda at: counts[at] - wanted[at])
        while sum(counts) < self._num_blocks:
            at = next(at for at in by_rest if counts[at] < pipeline[at].size)
            counts[at] += 1
            by_rest.remove(at)
            by_rest.append(at)
        places, start = {}, 0
        for one, count in zip(pipeline, counts, strict=True):
            if count:
                places[one.name] = Span(start, start + count)
                start += count
        return places


def optimum(servers: Sequence[Server], num_blocks: int) -> float:
    """The most that any places of these servers carry. Takes seconds for eight servers and twelve blocks.

    Its columns: whether a server takes a place, what it gives to each block there, and the throughput.
    """
    options = [(one, start) for one in servers for start in range(num_blocks - one.size + 1)]
    flows = [(option, block) for option in options for block in range(option[1], option[1] + option[0].size)]
    columns = [*options, *flows, None]
    place_of = {column: at for at, column in enumerate(columns)}

    def row(*terms: tuple[object, float]) -> np.ndarray:
        found = np.zeros(len(columns))
        for column, factor in terms:
            found[place_of[column]] = factor  # type: ignore[index]
        return found

    once = [row(*((option, 1.0) for option in options if option[0] is one)) for one in servers]
    given = [
        row((option, option[0].strength), *((flow, -1.0) for flow in flows if flow[0] == option))
        for option in options
    ]
    enough = [
        row((None, -1.0), *((flow, 1.0) for flow in flows if flow[1] == block)) for block in range(num_blocks)
    ]
    are_whole = np.array([1.0] * len(options) + [0.0] * (len(flows) + 1))
    most = np.array([1.0] * len(options) + [np.inf] * (len(flows) + 1))
    found = milp(
        row((None, -1.0)),
        constraints=[
            LinearConstraint(np.array(once), 1.0, 1.0),
            LinearConstraint(np.array([*given, *enough]), 0.0, np.inf),
        ],
        integrality=are_whole,
        bounds=Bounds(0.0, most),
    )
    return float(-found.fun)
