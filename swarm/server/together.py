"""How much steps gain from being run together: what one takes of an engine that runs many at once.

Pure: told of what ran.
"""

from swarm.server.span_engine import BatchReport

KEPT = 0.95
"""The weight that an iteration has left when the next one has run."""


class Together:
    """The iterations of late in which sessions decoded."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._blocks = 0.0

    def add(self, report: BatchReport) -> None:
        """An iteration was run. One that prefills says nothing of what a decode step takes."""
        if report.prefill_tokens or not report.decode_tokens or report.seconds <= 0 or not report.pairs:
            return
        rows = report.decode_tokens / report.steps  # more than one where a step verifies drafts
        self._seconds = report.seconds + KEPT * self._seconds
        self._blocks = report.pairs / rows + KEPT * self._blocks

    def part(self, decode: float) -> float:
        """The part that a step took of what one token takes alone, at `decode` blocks a second; 1 at most."""
        if not self._blocks or not decode:
            return 1.0
        return min(1.0, self._seconds / self._blocks * decode)
