"""How long a hop's silence is no wonder, from how long its answers took.

Phi accrual (Hayashibara et al., "The phi accrual failure detector", SRDS 2004), where the logarithms of the
seconds are taken for normally distributed, since no answer takes less than none and some take several times
as long. Knows no clock: it is told how long answers took, and says how long to wait for the next.
"""

from collections import deque
from collections.abc import Sequence
from math import exp, fsum, log, sqrt
from statistics import NormalDist

PHI = 8
"""An answer that is still to come is called missing with a probability of 10 to the minus PHI."""

DEVIATIONS = NormalDist().inv_cdf(1 - 10.0**-PHI)

DECODE_TOKENS = 16
"""Steps of up to so many tokens take about as long as one of a single token."""

WINDOW = 64
"""The newest samples, which count; older ones are forgotten."""

LEAST_SPREAD = log(1 + 0.25 * DEVIATIONS) / DEVIATIONS
"""Of the logarithm, its least standard deviation: as if the seconds deviated by a quarter of their mean."""

MOST_SPREAD = 0.5
"""What it is taken for before there is any sample, which counts as one, and at most."""

SHORTEST = 1e-6
"""Seconds that an answer takes at least, whatever a coarse clock says."""

LEAST_MARGIN = 0.3
"""Seconds beyond the median that are always granted."""

LEAST_PATIENCE = 1.0
"""Seconds that are always granted: what a busy machine may do something else for."""

UNSEEN_FACTOR = 5.0
"""How often the expected seconds are granted before any sample."""

UNSEEN_PATIENCE = 6.0
"""Seconds that are granted at least before any sample."""


class LogNormal:
    """A positive quantity's distribution by its newest samples, without the one furthest from the others."""

    def __init__(self) -> None:
        self._logarithms: deque[float] = deque(maxlen=WINDOW)
        self._quantiles: tuple[float, float] | None = None

    @property
    def is_unknown(self) -> bool:
        return not self._logarithms

    def add(self, value: float) -> None:
        self._logarithms.append(log(max(value, SHORTEST)))
        self._quantiles = None

    @property
    def quantiles(self) -> tuple[float, float]:
        """The median, and what hardly any value is above."""
        if self._quantiles is None:
            usual = _without_furthest(sorted(self._logarithms))
            mean = fsum(usual) / len(usual)
            squares = fsum((one - mean) ** 2 for one in usual)
            spread = sqrt((MOST_SPREAD**2 + squares) / (1 + len(usual)))
            spread = min(max(spread, LEAST_SPREAD), MOST_SPREAD)
            self._quantiles = exp(mean), exp(mean + DEVIATIONS * spread)
        return self._quantiles


class ResponseTimes:
    """How long one hop takes for its steps: each of the decoding ones, each token of the others."""

    def __init__(self) -> None:
        self._decode = LogNormal()
        self._prefill = LogNormal()

    def add(self, tokens: int, seconds: float) -> None:
        """Learn that the answer to a step of `tokens` took `seconds`."""
        if tokens <= DECODE_TOKENS:
            self._decode.add(seconds)
        else:
            self._prefill.add(seconds / tokens)

    def patience(self, tokens: int, expected: float = 0.0) -> float:
        """Seconds after which it is suspicious that a step of `tokens` has no answer.

        `expected` are the seconds it should take by what is announced, which counts as long as no such step
        was seen.
        """
        if tokens <= DECODE_TOKENS:
            return _patience(self._decode, 1, expected)
        patience = _patience(self._prefill, tokens, expected)
        return patience if self._decode.is_unknown else max(patience, _patience(self._decode, 1))


def _patience(times: LogNormal, count: int, expected: float = 0.0) -> float:
    if times.is_unknown:
        return max(UNSEEN_FACTOR * expected, UNSEEN_PATIENCE)
    median, bound = times.quantiles
    return max(count * bound, count * median + LEAST_MARGIN, LEAST_PATIENCE)


def _without_furthest(ordered: Sequence[float]) -> Sequence[float]:
    """All but the one furthest from the middle, where there are enough to tell."""
    if len(ordered) < 3:
        return ordered
    middle = ordered[len(ordered) // 2]
    return ordered[:-1] if ordered[-1] - middle >= middle - ordered[0] else ordered[1:]
