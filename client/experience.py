"""What one client has learned of peers from how they answered it, and what that makes of their costs.

Owns faults, lack of room, edges that do not push, and how long steps took. Pure with `now` passed in, in
seconds of any clock. Must not know what is announced, nor of routes.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from swarm.client.blame import FAULT, LIGHT, Blame
from swarm.client.costs import Costs
from swarm.client.faults import (
    HopError,
    NoCapacity,
    RemoteFault,
    RequestRefused,
    SessionLost,
    WarmingUp,
)
from swarm.client.observed import Observed
from swarm.client.route import Hop
from swarm.dht.announcement import Announcement
from swarm.net.transport import PeerId
from swarm.spans import Span

logger = logging.getLogger(__name__)

BUSY_AVOIDED = 2.0
"""Seconds for which a peer is avoided after it had no room and gave no time."""

REFUSING_AVOIDED = 5.0
"""Seconds in which others are asked instead of who found a request wrong: others may understand it."""

PUSH_REST = 10.0
"""Seconds in which an edge that could not push is not asked to again; twice as many each time."""

MOST_PUSH_REST = 320.0
"""Seconds that an edge rests at most. One that has not failed for so long begins anew."""

LIED = "was caught giving wrong results"

SUSPECT_SECONDS = 1e5
"""What each strike against a suspect is taken to cost a session: more than all that a server announces."""

OTHER_FORM_SECONDS = SUSPECT_SECONDS / 2
"""What it is taken to cost that a server computes in another dtype or quantization than the one it replaces.

Answers may differ then: that is worse than a peer that may have been within its rights when it ended a
session, and better than one that has failed.
"""


@dataclass(frozen=True)
class Avoided:
    """Why a peer is avoided, and until when; at the longest as long as it announces that span, if any.

    One that is warming up is avoided only as long as it announces what it `said` then.
    """

    until: float
    reason: str
    span: Span | None
    said: Announcement | None = None


@dataclass(frozen=True)
class Rest:
    """An edge is not asked to push before `until`, which is `seconds` after it failed to."""

    until: float
    seconds: float


class Experience:
    """How peers have answered one client."""

    def __init__(self) -> None:
        self._blame = Blame()
        self._observed = Observed()
        self._avoided: dict[PeerId, Avoided] = {}
        self._rests: dict[tuple[PeerId, PeerId], Rest] = {}

    def failed(self, fault: HopError, now: float, *, was_open: bool) -> None:
        """A hop has failed. Faults count against it; lack of room, or finding a request wrong, does not.

        A session that ended after it `was_open` may have been idle for long, which hardly counts.
        """
        peer = fault.hop.peer
        if isinstance(fault, RemoteFault):
            logger.info("peer %s is suspect: it %s", peer, fault.reason)
            is_light = was_open and isinstance(fault, SessionLost)
            self._blame.fault(peer, now, LIGHT if is_light else FAULT)
        elif isinstance(fault, NoCapacity):
            said = fault.hop.announcement if isinstance(fault, WarmingUp) else None
            until = now + (fault.retry_after or BUSY_AVOIDED)
            self._avoided[peer] = Avoided(until, fault.reason, fault.hop.announcement.span, said)
        elif isinstance(fault, RequestRefused):
            self._avoided[peer] = Avoided(now + REFUSING_AVOIDED, fault.reason, fault.hop.announcement.span)

    def succeeded(self, hop: Hop, tokens: int, queue: float, compute: float, now: float) -> None:
        """`hop` ran `tokens` tokens in `compute` seconds, after `queue` seconds."""
        self._blame.success(hop.peer, now)
        self._observed.step(hop.announcement, hop.span, tokens, queue, compute, now)

    def caught(self, peer: PeerId, now: float) -> None:
        """`peer` has given wrong results."""
        logger.warning("peer %s was caught giving wrong results", peer)
        self._blame.lie(peer, now)

    def doubted(self, peer: PeerId, now: float) -> None:
        """`peer` may have given wrong results, or somebody else has."""
        self._blame.fault(peer, now)

    def push_failed(self, source: PeerId, target: PeerId, now: float) -> None:
        logger.info("peer %s cannot push to peer %s", source, target)
        before = self._rests.get((source, target))
        if before is not None and now < before.until:
            return  # other sessions find out as well
        seconds = min(2 * before.seconds, MOST_PUSH_REST) if before else PUSH_REST
        self._rests[source, target] = Rest(now + seconds, seconds)

    def may_push(self, source: PeerId, target: PeerId, now: float) -> bool:
        rest = self._rests.get((source, target))
        return source != target and (rest is None or rest.until <= now)

    def rest_until(self, peers: Iterable[PeerId]) -> float:
        """Before this time not all of `peers` are to be tried, even where there are no others."""
        return max(map(self._blame.rests_until, peers), default=0.0)

    def avoided(self, announcements: Iterable[Announcement], now: float) -> dict[PeerId, Avoided]:
        """Who is not to be asked at `now`, of peers of which these are the announcements."""
        said = {server.peer_id: server for server in announcements} if self._avoided else {}
        self._avoided = {
            peer: avoided
            for peer, avoided in self._avoided.items()
            if avoided.until > now and _is_as_before(avoided, said.get(peer))
        }
        liars = {peer: Avoided(until, LIED, span=None) for peer, until in self._blame.liars(now).items()}
        return self._avoided | liars

    def costs(
        self,
        rtt: Callable[[PeerId], float | None],
        now: float,
        *,
        others: Iterable[PeerId] = (),
        missing: Iterable[PeerId] = (),
    ) -> Costs:
        """What peers cost at `now`, at measured distances `rtt`.

        `others` compute in another form; `missing` could not be reached lately, which is like a fault.
        """
        self._blame.forget(now)
        self._rests = {edge: rest for edge, rest in self._rests.items() if now < rest.until + MOST_PUSH_REST}
        broken = frozenset(edge for edge, rest in self._rests.items() if now < rest.until)
        penalties = Counter(
            {peer: strikes * SUSPECT_SECONDS for peer, strikes in self._blame.suspects(now).items()}
        )
        penalties.update(dict.fromkeys(others, OTHER_FORM_SECONDS))
        penalties.update(dict.fromkeys(missing, SUSPECT_SECONDS))
        return Costs(rtt, broken=broken, seen=self._observed.at(now), penalties=penalties)


def _is_as_before(avoided: Avoided, announced: Announcement | None) -> bool:
    """Whether a peer still announces that for which it is avoided: it may have gone on to other blocks."""
    if avoided.said is not None:
        return announced == avoided.said
    return announced is None or announced.span == avoided.span
