"""An engine without a model: it adds one to each value, and takes as long as the test says."""

import asyncio
from array import array
from dataclasses import dataclass, field

from swarm.blocks.errors import NoCapacity, StepError
from swarm.net.messages import Codec, Dtype
from swarm.spans import Span


@dataclass(frozen=True)
class FakePrecision:
    name: str = "float16"
    wire_dtype: Dtype = "float32"
    codec: Codec = "raw"


@dataclass(frozen=True)
class FakeResult:
    data: memoryview
    shape: tuple[int, ...]
    dtype: Dtype = "float32"
    codec: Codec = "raw"
    queue_ms: float = 1.0
    compute_ms: float = 2.0


@dataclass
class FakeEngine:
    """Implements `SpanEngine`. `seconds` is what a step takes; `failure` is raised by the next step."""

    kv_tokens: int = 1000
    max_step_tokens: int = 16
    seconds: float = 0.0
    failure: Exception | None = None
    precision: FakePrecision = FakePrecision()
    queue: int = 0
    is_closed: bool = False
    sessions: dict[str, int] = field(default_factory=dict)
    steps: list[tuple[str, int, int]] = field(default_factory=list)

    @property
    def kv_tokens_left(self) -> int:
        return self.kv_tokens - sum(self.sessions.values())

    def open_session(self, session_id: str, span: Span, max_tokens: int) -> None:
        if session_id in self.sessions:
            raise StepError("bad_request", "open already")
        if max_tokens > self.kv_tokens_left:
            raise NoCapacity("full", 5.0 if max_tokens <= self.kv_tokens else None)
        self.sessions[session_id] = max_tokens

    async def step(
        self, session_id: str, seq_pos: int, data: memoryview, shape: tuple[int, ...], dtype: str, codec: str
    ) -> FakeResult:
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure
        self.steps.append((session_id, seq_pos, shape[0]))
        await asyncio.sleep(self.seconds)
        values = array("f", data.tobytes())
        return FakeResult(memoryview(array("f", (value + 1 for value in values))).cast("B"), shape)

    def close_session(self, session_id: str) -> None:
        self.sessions.pop(session_id, None)

    async def measure(self) -> tuple[float, float]:
        return 100.0, 1000.0

    def close(self) -> None:
        self.is_closed = True
