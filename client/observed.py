"""What one client observed of peers: how long its own steps waited and ran there lately.

Pure with `now` passed in, in seconds of any clock. Must not know of routes.
"""

from dataclasses import dataclass
from math import exp

from swarm.client.costs import Seen, step_seconds
from swarm.dht.announcement import Announcement
from swarm.net.transport import PeerId
from swarm.spans import Span

WEIGHT = 0.2
"""How much a new step counts against all before it."""

MEMORY = 20.0
"""Seconds in which what was seen loses all but a third of its weight; servers announce about as often."""

MOST_ROWS = 32
"""Tokens of a step at most for it to tell how fast decode steps are."""

MOST_PACE = 16.0
FORGOTTEN = 0.01


@dataclass(frozen=True)
class _Average:
    """The newest steps counting most; `at` is the time of the last. `pace` is None before a decode step."""

    queue: float
    pace: float | None
    at: float

    def trust(self, now: float) -> float:
        return exp(min(0.0, self.at - now) / MEMORY)


class Observed:
    """Averages of the steps that peers ran for this client."""

    def __init__(self) -> None:
        self._averages: dict[PeerId, _Average] = {}

    def step(
        self, server: Announcement, span: Span, tokens: int, queue: float, compute: float, now: float
    ) -> None:
        """`server` ran `tokens` tokens through `span` in `compute` seconds, after waiting `queue` seconds."""
        before = self._averages.get(server.peer_id)
        kept = (1 - WEIGHT) * before.trust(now) if before else 0.0
        old_queue, old_pace = (before.queue, before.pace) if before else (queue, None)
        pace = old_pace
        if tokens <= MOST_ROWS:
            ratio = compute / (span.size * step_seconds(server, tokens))
            pace = _mixed(old_pace, min(max(ratio, 1 / MOST_PACE), MOST_PACE), kept)
        self._averages[server.peer_id] = _Average(_mixed(old_queue, queue, kept), pace, now)

    def at(self, now: float) -> dict[PeerId, Seen]:
        """What is remembered at `now`."""
        self._averages = {
            peer: average for peer, average in self._averages.items() if average.trust(now) >= FORGOTTEN
        }
        return {
            peer: Seen(average.queue, 1.0 if average.pace is None else average.pace, average.trust(now))
            for peer, average in self._averages.items()
        }


def _mixed(old: float | None, new: float, kept: float) -> float:
    """`new` drawn to `old`, of which the part `kept` is left."""
    return new if old is None else new + kept * (old - new)
