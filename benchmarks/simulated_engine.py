"""An engine that computes nothing and takes the time for it: what fills the servers of a simulated swarm.

Steps are run one after the other in the order they came. Each block of a step takes what the server says that
it takes, as `swarm.client.costs` reckons: one token at the rate of decoding, further ones at that of prefill.
Steps do not gain from each other's company. Hidden states are zeros, and so are the tokens that it tells.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from swarm.blocks.errors import NoCapacity, StepError
from swarm.client.costs import PREFILL_GAIN
from swarm.net.forms import Codec, Dtype, Wire
from swarm.net.messages import Priority, ResponseType
from swarm.sampling import Sampling
from swarm.server.span_engine import BatchReport
from swarm.spans import Span

HIDDEN = 4
FLOAT32_BYTES = UINT32_BYTES = 4
KV_TOKENS = 50_000
MAX_STEP_TOKENS = 512


@dataclass(frozen=True)
class Form:
    """Implements `ShardForm`."""

    name: str = "float32"
    wire_dtype: Dtype = "float32"
    codec: Codec = "raw"


@dataclass(frozen=True)
class Outcome:
    """Implements `StepOutcome`."""

    data: memoryview
    shape: tuple[int, ...]
    dtype: Dtype
    queue_ms: float
    compute_ms: float
    codec: Codec = "raw"
    deserialise_ms: float = 0.0
    serialise_ms: float = 0.0
    token: int | None = None

    @property
    def forward_ms(self) -> float:
        return self.compute_ms


@dataclass
class Stats:
    """Implements `EngineStats`."""

    sessions: int
    kv_pages: int = 0
    kv_pages_used: int = 0
    kv_pages_cached: int = 0


@dataclass
class Held:
    """A session: the blocks it runs, the tokens it was promised, and those that it holds."""

    span: Span
    promised: int
    tokens: int = 0


class SimulatedEngine:
    """Implements `SpanEngine` for the blocks `span`, at `strength` (token, block) pairs a second."""

    shard_bytes = 0
    max_step_tokens = MAX_STEP_TOKENS
    takes_token_ids = gives_token_ids = can_hand_over = True
    precision = Form()
    threads = 1

    def __init__(self, span: Span, strength: float):
        self.span = span
        self.on_batch: Callable[[BatchReport], None] | None = None
        self.tokens = 0
        self._strength = strength
        self._sessions: dict[str, Held] = {}
        self._waiting = 0
        self._free_at = 0.0

    @property
    def kv_tokens_left(self) -> int:
        return KV_TOKENS - sum(session.promised for session in self._sessions.values())

    @property
    def queue(self) -> int:
        return self._waiting

    @property
    def stats(self) -> Stats:
        return Stats(len(self._sessions))

    def wire_form(self, wish: Wire) -> Form:
        return self.precision

    def open_session(
        self,
        session_id: str,
        span: Span,
        max_tokens: int,
        *,
        client: str = "",
        page_keys: bytes = b"",
        priority: Priority = "interactive",
        wire: Wire = "exact",
    ) -> int:
        if session_id in self._sessions:
            raise StepError("bad_request", "This session is open already.")
        if max_tokens > self.kv_tokens_left:
            raise NoCapacity("This server has no room for that session.", 5.0)
        self._sessions[session_id] = Held(span, max_tokens)
        return 0

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
        rows: int = 0,
        sampling: Sampling | None = None,
    ) -> Outcome:
        session, tokens = self._held(session_id), shape[0]
        now = asyncio.get_running_loop().time()
        seconds = session.span.size * (1 + (tokens - 1) / PREFILL_GAIN) / self._strength
        begins = max(now, self._free_at)
        self._free_at = begins + seconds
        self._waiting += 1
        try:
            await asyncio.sleep(self._free_at - now)
        finally:
            self._waiting -= 1
        session.tokens = seq_pos + tokens
        self.tokens += tokens
        told, times = rows or tokens, (1000 * (begins - now), 1000 * seconds)
        if response_type == "token_ids":
            return Outcome(memoryview(bytes(UINT32_BYTES * told)), (told,), "uint32", *times)
        values = memoryview(bytes(FLOAT32_BYTES * HIDDEN * told))
        return Outcome(values, (told, HIDDEN), "float32", *times)

    def kv_bytes(self, session_id: str, tokens: int) -> int:
        return self._held(session_id).span.size * tokens

    async def export_kv(self, session_id: str, first: int, end: int) -> memoryview:
        return memoryview(bytes(self.kv_bytes(session_id, end - first)))

    async def copy_kv(self, session_id: str, first: int, end: int) -> memoryview:
        return await self.export_kv(session_id, first, end)

    def rewind(self, session_id: str, length: int) -> None:
        session = self._held(session_id)
        session.tokens = min(session.tokens, length)

    async def import_kv(self, session_id: str, first: int, end: int, data: memoryview) -> None:
        session = self._held(session_id)
        if session.tokens != first or len(data) != self.kv_bytes(session_id, end - first):
            raise StepError("bad_request", "That is not what this session lacks.")
        session.tokens = end

    def close_session(self, session_id: str) -> None:
        self._sessions.pop(session_id, None)

    async def measure(self) -> tuple[float, float]:
        return self._strength, PREFILL_GAIN * self._strength

    def close(self) -> None:
        self._sessions.clear()

    async def wait_closed(self) -> None:
        return

    def _held(self, session_id: str) -> Held:
        if session_id not in self._sessions:
            raise StepError("unknown_session", "This server has no such session.")
        return self._sessions[session_id]
