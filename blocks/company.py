"""Whether an iteration should wait a moment for company: a shared one costs hardly more than a lone one.

Waiting pays where what computes is wanted by many, and costs time where it is idle: so the wait follows from
how busy it is. Pure, but for asking the machine how busy its cores are.
"""

import psutil

SHARE = 0.5
"""The part of a session's cycle that the wait takes at most: half of the sessions are elsewhere meanwhile."""

ITERATIONS = 4
"""How many iterations' time the wait takes at most."""

LOOK_SECONDS = 0.5
LEARNING = 0.1
LONGEST_CYCLE = 2.0
"""Seconds between two steps of a session after which it counts as a pause."""


def wanted(decoding: int) -> int:
    """How many decode steps are company enough, of `decoding` sessions. One or two never wait."""
    return -(-decoding // 2) if decoding > 2 else 1


def patience(pressure: float, iteration: float, cycle: float) -> float:
    """Seconds to wait for company.

    `pressure` is how busy that is which computes, from 0 to 1; `iteration` what an iteration takes, and
    `cycle` what passes between two steps of a session, in seconds.
    """
    return pressure * min(SHARE * cycle, ITERATIONS * iteration)


class Pressure:
    """How busy that is which computes: this engine's thread, and on a CPU the cores that others want too."""

    def __init__(self, *, shares_cores: bool):
        self.cycle = 0.0
        self._shares_cores = shares_cores
        self._busy = 0.0
        self._value = 0.0
        self._looked_at = float("-inf")

    def came(self, gap: float) -> None:
        """A session's decode step came `gap` seconds after the one before."""
        if gap < LONGEST_CYCLE:
            self.cycle = gap if not self.cycle else (1 - LEARNING) * self.cycle + LEARNING * gap

    def ran(self, seconds: float) -> None:
        """An iteration took `seconds`."""
        self._busy += seconds

    def value(self, now: float) -> float:
        """From 0 to 1, as of the last look."""
        if now - self._looked_at > LOOK_SECONDS:
            cores = psutil.cpu_percent(None) / 100 if self._shares_cores else 0.0
            self._value = min(1.0, max(cores, self._busy / (now - self._looked_at)))
            self._busy, self._looked_at = 0.0, now
        return self._value
