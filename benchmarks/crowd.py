"""Thousands of servers that arrange themselves, as events by the second: the real decisions, no messages.

Where servers go is decided by `swarm.server.placement` from what a directory would show: what was announced
a moment ago, at most as many servers as a directory lists, drawn at random, and those that have vanished for
as long as their records hold, or until they are missed where blocks are thin. A server looks around every ten
seconds, each at its own time, says so when it means to go, and looks again before it does. Servers see the
same list where they look at the same time, so that what they decide is computed once for all of them.
"""

import heapq
import random
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks.population import Member
from swarm.dht.announcer import PERIOD
from swarm.dht.directory import MAX_PEERS
from swarm.server.arranging import CALM, REST
from swarm.server.capacity import Layout
from swarm.server.placement import Holder, Move, choose, may_leave, plan, turn
from swarm.server.server import DIRECTORY_PERIOD
from swarm.server.watching import MISSED, THIN
from swarm.server.watching import PERIOD as PING_PERIOD
from swarm.spans import Span

BESIDE = 0.5
"""The part of servers that have memory for the blocks they go to beside those that they hold."""

LOOKS = int(DIRECTORY_PERIOD)
SAMPLED = 30
"""Seconds between two computations of what the swarm carries."""


def serves_on(name: str) -> bool:
    """Whether it is one of them: it serves on while it loads."""
    return turn(f"memory of {name}") < BESIDE


@dataclass
class Place:
    """Where a server is: it serves `serves`, and holds, or loads, `span` from `ready` on."""

    member: Member
    span: Span
    ready: float
    serves: Span | None = None
    goes_to: Span | None = None
    rests_until: float = 0.0
    wished_since: float | None = None
    shown: Holder | None = None

    def holder(self, now: float) -> Holder:
        """The server as a directory shows it."""
        may_move = self.serves == self.span and self.goes_to is None
        span, may_improve = self.goes_to or self.span, may_move and now >= self.rests_until
        one = self.shown
        if one is None or (one.span, one.serves, one.may_improve) != (span, may_move, may_improve):
            keeps = serves_on(self.member.name)
            one = Holder(self.member.name, span, self.member.strength, may_move, may_move, may_improve, keeps)
            self.shown = one
        return one


@dataclass
class Counted:
    """What a run has seen. Shares are of the seconds since all blocks were served for the first time.

    Blocks are `open` while nobody serves them; that is `unavoidable` where all servers there could not hold
    them all. `placing` are milliseconds of the processor for one newcomer, `planning` for one look.
    """

    covered_at: float | None = None
    seconds: int = 0
    open: int = 0
    unavoidable: int = 0
    moves: int = 0
    urgent: int = 0
    server_hours: float = 0.0
    carried: list[float] = field(default_factory=list)
    servers: list[int] = field(default_factory=list)
    placing: list[float] = field(default_factory=list)
    planning: list[float] = field(default_factory=list)


class Crowd:
    """The servers of one model of `num_blocks` blocks, second by second."""

    def __init__(self, members: Iterable[Member], num_blocks: int, seed: int):
        self.num_blocks = num_blocks
        self.counted = Counted()
        self.alive: dict[str, Place] = {}
        self.whole: list[tuple[Span, float]] = []
        """What was served when all blocks were, of late, and how strong those were who did."""
        self._rng = random.Random(seed)
        self._coming = deque(members)
        self._listed: dict[str, Place] = {}
        self._gone: list[tuple[float, str]] = []
        self._going: list[tuple[float, str]] = []
        self._loading: list[tuple[float, str]] = []
        self._meant: list[tuple[float, Move]] = []
        self._held = np.zeros(num_blocks, np.int64)
        self._planned_for: list[Holder] = []
        self._moves: tuple[Move, ...] = ()

    def run(self, seconds: int) -> Counted:
        for now in range(seconds):
            self._leave(now)
            self._arrive(now)
            self._join(now)
            self._go(now)
            self._look(now)
            self._count(now)
        return self.counted

    def _leave(self, now: float) -> None:
        while self._going and self._going[0][0] <= now:
            name = heapq.heappop(self._going)[1]
            place = self.alive.pop(name)
            if place.member.is_polite:
                self._listed.pop(name, None)
            else:  # it is listed as it was until that is noticed
                heapq.heappush(self._gone, (now + self._noticed_after(place), name))
            self._hold(place.serves, -1)
        while self._gone and self._gone[0][0] <= now:
            self._listed.pop(heapq.heappop(self._gone)[1], None)

    def _noticed_after(self, place: Place) -> float:
        """Seconds until one that has vanished is not counted with any more."""
        if self._held[place.span.start : place.span.end].min() <= THIN:
            return MISSED * PING_PERIOD
        return self._rng.uniform(PERIOD, 2 * PERIOD)

    def _arrive(self, now: float) -> None:
        """Those who have loaded their blocks serve them."""
        while self._loading and self._loading[0][0] <= now:
            ready, name = heapq.heappop(self._loading)
            place = self.alive.get(name)
            if place is not None and place.ready == ready:
                self._serve(place, place.span)

    def _join(self, now: float) -> None:
        """Who comes in the same second hears of each other, and they choose in turn."""
        newcomers = []
        while self._coming and self._coming[0].comes <= now:
            newcomers.append(self._coming.popleft())
        for member in sorted(newcomers, key=lambda one: turn(one.name)):
            size = min(member.size, self.num_blocks)
            began = time.process_time()
            mine = Holder(member.name, Span(0, size), member.strength)
            span = choose(self._view(now), self.num_blocks, mine)
            self.counted.placing.append(1000 * (time.process_time() - began))
            place = Place(member, span, now + member.loading)
            self.alive[member.name] = self._listed[member.name] = place
            heapq.heappush(self._going, (member.goes, member.name))
            heapq.heappush(self._loading, (place.ready, member.name))

    def _look(self, now: float) -> None:
        """Those whose time it is to look see what could be better, and say so if they are to do it."""
        moves = self._plan(self._view(now))
        wished = {move.peer for move in moves}
        lookers = [one for one in self.alive.values() if one.member.number % LOOKS == now % LOOKS]
        for place in lookers:
            if place.member.name not in wished:
                place.wished_since = None
        for move in moves:
            place = self.alive.get(move.peer)
            if place is None or place not in lookers or place.goes_to is not None:
                continue
            if place.wished_since is None:
                place.wished_since = now
            first, last = CALM
            calm = 0.0 if move.is_urgent else first + (last - first) * turn(move.peer)
            if now >= place.wished_since + calm:
                place.goes_to = move.span
                self._meant.append((now, move))

    def _go(self, now: float) -> None:
        """Those who said so a second ago look again, and go if it is still for them to do."""
        meant, self._meant = self._meant, []
        for _, move in sorted(meant, key=lambda one: turn(one[1].peer)):
            place = self.alive.get(move.peer)
            if place is None:
                continue
            place.goes_to = place.wished_since = None
            holders = self._view(now, move.peer)
            keeps = serves_on(move.peer)
            leaves = may_leave(holders, move.peer, move.span if keeps or move.is_urgent else None)
            if move not in self._plan(holders) or not leaves:
                continue
            self._serve(place, place.serves if keeps else None)
            place.span, place.ready = move.span, now + place.member.loading
            place.rests_until = place.ready + REST
            heapq.heappush(self._loading, (place.ready, move.peer))
            self.counted.moves += 1
            self.counted.urgent += move.is_urgent

    def _plan(self, holders: list[Holder]) -> tuple[Move, ...]:
        """The moves that are to be made; as servers do, thought out anew only where something has changed."""
        if holders != self._planned_for:
            began = time.process_time()
            self._moves, self._planned_for = plan(holders, self.num_blocks), holders
            self.counted.planning.append(1000 * (time.process_time() - began))
        return self._moves

    def _view(self, now: float, mine: str | None = None) -> list[Holder]:
        """What a directory lists, with the server that is called `mine` if one is."""
        listed: Sequence[Place] = list(self._listed.values())
        if len(listed) > MAX_PEERS:
            listed = self._rng.sample(listed, MAX_PEERS)
            if mine is not None and self.alive[mine] not in listed:
                listed = [*listed, self.alive[mine]]
        return [one.holder(now) for one in listed]

    def _serve(self, place: Place, span: Span | None) -> None:
        self._hold(place.serves, -1)
        self._hold(span, 1)
        place.serves = span

    def _hold(self, span: Span | None, more: int) -> None:
        if span is not None:
            self._held[span.start : span.end] += more

    def _count(self, now: int) -> None:
        counted, is_whole = self.counted, bool(self._held.all())
        counted.server_hours += len(self.alive) / 3600
        if counted.covered_at is None:
            if is_whole:
                counted.covered_at = now
            return
        counted.seconds += 1
        if not is_whole:
            counted.open += 1
            counted.unavoidable += sum(one.member.size for one in self.alive.values()) < self.num_blocks
        if now % SAMPLED == 0:
            counted.servers.append(len(self.alive))
            counted.carried.append(self._carried() if is_whole else 0.0)

    def _carried(self) -> float:
        """The part that the swarm carries of all strength there."""
        self.whole = [(one.serves, one.member.strength) for one in self.alive.values() if one.serves]
        spans = np.array([span for span, _ in self.whole], np.int64)
        strengths = np.array([strength for _, strength in self.whole], np.float64)
        layout = Layout(self.num_blocks, spans[:, 0], spans[:, 1], strengths)
        return layout.tight().throughput / layout.bound
