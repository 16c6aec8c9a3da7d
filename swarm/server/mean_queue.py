"""How many steps are in an engine's queue, on average of late.

What is there at one moment says little: steps come and go many times a second, and clients choose by what was
announced some seconds ago. Pure with `now` passed in, in seconds of any clock.
"""

from math import exp, inf

MEMORY = 5.0
"""Seconds in which what was seen loses all but a third of its weight."""


class MeanQueue:
    """The mean of the `steps` in the queue, the latest counting most."""

    def __init__(self) -> None:
        self.steps = 0.0
        self._at = -inf

    def see(self, steps: float, now: float) -> None:
        """So many `steps` are in the queue, and are taken to have been since the last look."""
        kept = exp((self._at - now) / MEMORY)
        self.steps = steps + kept * (self.steps - steps)
        self._at = now
