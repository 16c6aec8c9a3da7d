"""What can be told of an answer while it is written: who computes it, how long that takes, who was lost."""

from dataclasses import dataclass
from typing import Self

from swarm.client.changes import Change
from swarm.client.leg import HopTimes
from swarm.client.route import Hop
from swarm.client.speculation import SpeculationReport
from swarm.spans import Span


@dataclass(frozen=True)
class HopReport:
    """What one hop did for an answer: mean milliseconds a step on the network, in its queue, computing.

    The means are of `steps` steps.
    """

    peer: str
    name: str
    blocks: Span
    rtt_ms: float
    compute_ms: float
    queue_ms: float
    steps: int = 0

    @property
    def label(self) -> str:
        """How people see the hop: the peer's name, or the end of its id, and its blocks."""
        return f"{self.name or '…' + self.peer[-6:]} [{self.blocks}]"

    @classmethod
    def of(cls, hop: Hop, times: HopTimes) -> Self:
        """Of a hop and the mean of its times."""
        return cls(
            hop.peer,
            hop.announcement.name,
            hop.span,
            times.rtt_ms,
            times.compute_ms,
            times.queue_ms,
            times.steps,
        )


@dataclass(frozen=True)
class Progress:
    """An answer at one moment. `changes` are those of its hops since it began.

    `new_tokens` is their number; all else is as in `Generation`.
    """

    route: tuple[HopReport, ...]
    changes: tuple[Change, ...]
    prompt_tokens: int
    new_tokens: int
    cached_tokens: int
    recoveries: int
    replayed_tokens: int
    ttft_ms: float
    tokens_per_s: float
    speculation: SpeculationReport
