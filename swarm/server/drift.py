"""Whether a server is as fast as it says, judged by what its sessions see. Pure: told of what ran."""

from collections import deque
from collections.abc import Iterable
from statistics import median

from swarm.dht.announcement import Throughput
from swarm.server.span_engine import BatchReport

FACTOR = 1.5
"""How many times faster or slower sessions must find a server for it to be measured again."""

SAMPLES, ENOUGH = 64, 16
"""Iterations that are remembered, and that it takes to tell."""

PROMPT_ROWS = 64
"""Rows from which on prefill alone tells the rate that long prompts get."""


class Seen:
    """The rates of the last iterations that had one session alone, in (token, block) pairs a second."""

    def __init__(self) -> None:
        self._decode: deque[float] = deque(maxlen=SAMPLES)
        self._prefill: deque[float] = deque(maxlen=SAMPLES)

    def add(self, report: BatchReport) -> None:
        """An iteration was run."""
        if report.steps != 1 or report.seconds <= 0 or not report.pairs:
            return
        rate = report.pairs / report.seconds
        if report.decode_tokens == 1:
            self._decode.append(rate)
        elif report.prefill_tokens >= PROMPT_ROWS:
            self._prefill.append(rate)

    def differs(self, announced: Throughput) -> bool:
        """Whether sessions find another speed than is `announced`."""
        pairs = ((announced.decode, self._decode), (announced.prefill, self._prefill))
        return any(has_drifted(rate, seen) for rate, seen in pairs)

    def forget(self) -> None:
        self._decode.clear()
        self._prefill.clear()


def has_drifted(announced: float, seen: Iterable[float]) -> bool:
    """Whether half of the rates that were `seen`, if there are enough, are far from the one `announced`."""
    rates = list(seen)
    if len(rates) < ENOUGH:
        return False
    return not announced / FACTOR <= median(rates) <= announced * FACTOR
