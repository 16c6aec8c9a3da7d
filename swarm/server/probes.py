"""How much strangers may ask of this peer in order to measure the way to it. Pure: told of times.

One peer may move `MAX_PROBE_BYTES` now and then, and all together not often: links are for sessions.
"""

from swarm.allowance import Allowance

PAUSE, PAUSE_OF_ALL = 600.0, 300.0
"""Seconds between two measurements by one peer, and between any two."""


class Probes:
    """Who has measured the way here, and when."""

    def __init__(self) -> None:
        self._of_peer = Allowance(rate=1 / PAUSE, burst=1)
        self._of_all = Allowance(rate=1 / PAUSE_OF_ALL, burst=1)

    def take(self, peer: str, now: float) -> float:
        """Let `peer` measure the way here: 0 if it may, else the seconds until it may ask again."""
        if self._of_peer.left(peer, now) >= 1:
            return self._of_all.take("", now) or self._of_peer.take(peer, now)
        return self._of_peer.take(peer, now)
