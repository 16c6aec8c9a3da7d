"""The steps of an engine's sessions: what each was asked for, how far it is, and where its time went."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from swarm.baton import Baton
from swarm.blocks.batch import DECODE_ROWS
from swarm.blocks.kv import SessionKV
from swarm.blocks.precision import WireForm
from swarm.sampling import Sampling


@dataclass(eq=False, slots=True)
class Session:
    """One session: its KV, what it was promised, and whether something runs on it now.

    Its activations travel as `wire`. `came_at` and `decoded_at` are when its last decode step, which had
    `decode_rows`, came and was done.
    """

    kv: SessionKV
    is_bulk: bool
    wire: WireForm
    state: Any = None
    step: "PendingStep | None" = None
    is_running: bool = False
    is_closed: bool = False
    came_at: float = float("-inf")
    decoded_at: float = float("-inf")
    decode_rows: int = 1


@dataclass(slots=True)
class StepTimes:
    """Seconds that a step took: waiting, making tensors of bytes, computing, making bytes of tensors."""

    queue: float = 0.0
    deserialise: float = 0.0
    forward: float = 0.0
    serialise: float = 0.0


@dataclass(eq=False, slots=True)
class PendingStep:
    """A step that was admitted and has no result yet. Times in seconds of a monotonic clock.

    `data` are hidden states as they came, or token ids. The answer is for its last `asked` tokens: hidden
    states, or the likeliest tokens if it wants these. With `sampling` a `token` is sampled besides. `done` of
    its rows were run and gave `outputs`, as far as those are asked for; `since` is when it began to wait for
    the next ones.
    """

    session: Session
    seq_pos: int
    tokens: int
    data: memoryview | bytes | list[int]
    asked: int
    arrived: float
    result: "Baton[StepResult]"
    wants_tokens: bool = False
    sampling: Sampling | None = None
    token: int | None = None
    is_alone: bool = False
    done: int = 0
    since: float = 0.0
    times: StepTimes = field(default_factory=StepTimes)
    hidden: Tensor | None = None
    outputs: list[Tensor] = field(default_factory=list)
    finished: "StepResult | None" = None

    @property
    def rows(self) -> int:
        return self.tokens - self.done

    @property
    def client(self) -> str:
        return self.session.kv.client

    @property
    def is_decode(self) -> bool:
        return self.tokens <= DECODE_ROWS

    @property
    def is_bulk(self) -> bool:
        return self.session.is_bulk


@dataclass(frozen=True, slots=True)
class StepResult:
    """Hidden states after the span as wire bytes [rows, hidden], or token ids [rows], and the time they took.

    `token` is what was sampled after the last row, None if that was not asked for.
    `compute_ms` is the sum of the three parts after the queue.
    """

    data: memoryview
    shape: tuple[int, ...]
    dtype: str
    codec: str
    queue_ms: float
    deserialise_ms: float
    forward_ms: float
    serialise_ms: float
    token: int | None = None

    @property
    def compute_ms(self) -> float:
        return self.deserialise_ms + self.forward_ms + self.serialise_ms


@dataclass(frozen=True)
class BatchReport:
    """One iteration: how many steps took part, their rows, the seconds it took, and how many (token, block)
    pairs were computed."""

    steps: int
    decode_tokens: int
    prefill_tokens: int
    seconds: float
    pairs: int


@dataclass
class EngineStats:
    """Counters since the engine was made, and gauges as of this moment."""

    sessions: int = 0
    kv_pages: int = 0
    kv_pages_used: int = 0
    kv_pages_cached: int = 0
    prefix_tokens_asked: int = 0
    prefix_tokens_held: int = 0
    admitted: int = 0
    refused: int = 0
    decode_tokens: int = 0
    prefill_tokens: int = 0
