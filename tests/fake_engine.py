"""An engine without a model: it adds one to each value, and takes as long as the test says."""

import asyncio
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

from swarm.blocks.errors import NoCapacity, StepError
from swarm.net.messages import Codec, Dtype, Priority, ResponseType
from swarm.page_keys import KEY_BYTES, PAGE_TOKENS
from swarm.server.span_engine import BatchReport
from swarm.spans import Span

HIDDEN = 3


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
    deserialise_ms: float = 0.5
    forward_ms: float = 1.0
    serialise_ms: float = 0.5


@dataclass
class FakeStats:
    sessions: int = 0
    kv_pages: int = 0
    kv_pages_used: int = 0
    kv_pages_cached: int = 0


@dataclass
class FakeEngine:
    """Implements `SpanEngine`. `seconds` is what a step takes; `failure` is raised by the next step.

    Pages are kept by key as soon as a step names them, and by client. Token ids become hidden states of
    the value of each id.
    """

    kv_tokens: int = 1000
    max_step_tokens: int = 16
    seconds: float = 0.0
    closing_seconds: float = 0.0
    failure: Exception | None = None
    precision: FakePrecision = FakePrecision()
    takes_token_ids: bool = False
    gives_token_ids: bool = False
    shard_bytes: int = 1_000_000
    queue: int = 0
    is_closed: bool = False
    stats: FakeStats = field(default_factory=FakeStats)
    on_batch: Callable[[BatchReport], None] | None = None
    sessions: dict[str, int] = field(default_factory=dict)
    clients: dict[str, tuple[str, Priority]] = field(default_factory=dict)
    steps: list[tuple[str, int, int]] = field(default_factory=list)
    dropped: list[tuple[str, int]] = field(default_factory=list)
    kept: set[tuple[str, bytes]] = field(default_factory=set)

    @property
    def kv_tokens_left(self) -> int:
        return self.kv_tokens - sum(self.sessions.values())

    def open_session(
        self,
        session_id: str,
        span: Span,
        max_tokens: int,
        *,
        client: str = "",
        page_keys: bytes = b"",
        priority: Priority = "interactive",
    ) -> int:
        if session_id in self.sessions:
            raise StepError("bad_request", "open already")
        if max_tokens > self.kv_tokens_left:
            raise NoCapacity("full", 5.0 if max_tokens <= self.kv_tokens else None)
        self.sessions[session_id] = max_tokens
        self.clients[session_id] = (client, priority)
        pages = 0
        while (client, page_keys[pages * KEY_BYTES : (pages + 1) * KEY_BYTES]) in self.kept:
            pages += 1
        return pages * PAGE_TOKENS

    async def step(
        self,
        session_id: str,
        seq_pos: int,
        data: memoryview,
        shape: tuple[int, ...],
        dtype: str,
        codec: str,
        *,
        page_keys: bytes = b"",
        response_type: ResponseType = "hidden_states",
    ) -> FakeResult:
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure
        self.steps.append((session_id, seq_pos, shape[0]))
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.dropped.append((session_id, seq_pos))
            raise
        for at in range(0, len(page_keys), KEY_BYTES):
            self.kept.add((self.clients[session_id][0], page_keys[at : at + KEY_BYTES]))
        if dtype == "uint32":
            values = [float(id) for id in array("I", data.tobytes()) for _ in range(HIDDEN)]
            shape = (shape[0], HIDDEN)
        else:
            values = [value + 1 for value in array("f", data.tobytes())]
        if response_type == "token_ids":
            token = memoryview(array("I", [int(max(values[-HIDDEN:]))])).cast("B")
            return FakeResult(token, (1,), "uint32", "raw")
        return FakeResult(memoryview(array("f", values)).cast("B"), shape)

    def close_session(self, session_id: str) -> None:
        self.sessions.pop(session_id, None)

    async def measure(self) -> tuple[float, float]:
        return 100.0, 1000.0

    def close(self) -> None:
        self.is_closed = True

    async def wait_closed(self) -> None:
        assert self.is_closed
        await asyncio.sleep(self.closing_seconds)
