"""An engine without a model: it adds one to each value, and takes as long as the test says."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from swarm.blocks.errors import NoCapacity, StepError
from swarm.kernels.codecs import from_wire, to_wire
from swarm.net.forms import Codec, Dtype, Wire
from swarm.net.messages import Priority, ResponseType
from swarm.page_keys import KEY_BYTES, PAGE_TOKENS
from swarm.sampling import Sampling
from swarm.server.span_engine import BatchReport
from swarm.spans import Span

HIDDEN = 3


KV_BYTES = 2
"""What the KV of a token takes."""


@dataclass(frozen=True)
class FakePrecision:
    name: str = "float16"
    wire_dtype: Dtype = "float32"
    codec: Codec = "raw"


FORMS: dict[Wire, FakePrecision] = {
    "half": FakePrecision(wire_dtype="float16", codec="scaled"),
    "int8": FakePrecision(wire_dtype="int8", codec="blocks"),
}


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
    token: int | None = None


@dataclass
class FakeStats:
    sessions: int = 0
    kv_pages: int = 0
    kv_pages_used: int = 0
    kv_pages_cached: int = 0


@dataclass
class FakeEngine:
    """Implements `SpanEngine`. `seconds` is what a step takes; `failure` is raised by the next step.

    It measures `rates`, and counts how often.

    Pages are kept by key as soon as a step names them, and by client. Token ids become hidden states of
    the value of each id. `sessions` are what each was promised, `lengths` what each holds, whose KV is
    nothing but positions.
    """

    kv_tokens: int = 1000
    max_step_tokens: int = 16
    seconds: float = 0.0
    closing_seconds: float = 0.0
    failure: Exception | None = None
    precision: FakePrecision = FakePrecision()
    takes_token_ids: bool = False
    gives_token_ids: bool = False
    can_hand_over: bool = True
    shard_bytes: int = 1_000_000
    queue: int = 0
    threads: int = 1
    rates: tuple[float, float] = (100.0, 1000.0)
    measured: int = 0
    is_closed: bool = False
    stats: FakeStats = field(default_factory=FakeStats)
    on_batch: Callable[[BatchReport], None] | None = None
    sessions: dict[str, int] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)
    wires: dict[str, Wire] = field(default_factory=dict)
    clients: dict[str, tuple[str, Priority]] = field(default_factory=dict)
    steps: list[tuple[str, int, int]] = field(default_factory=list)
    dropped: list[tuple[str, int]] = field(default_factory=list)
    kept: set[tuple[str, bytes]] = field(default_factory=set)

    @property
    def kv_tokens_left(self) -> int:
        return self.kv_tokens - sum(self.sessions.values())

    def wire_form(self, wish: Wire) -> FakePrecision:
        return self.precision if wish == "exact" else FORMS[wish]

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
        if session_id in self.sessions:
            raise StepError("bad_request", "open already")
        if max_tokens > self.kv_tokens_left:
            raise NoCapacity("full", 5.0 if max_tokens <= self.kv_tokens else None)
        self.sessions[session_id] = max_tokens
        self.clients[session_id] = (client, priority)
        pages = 0
        while (client, page_keys[pages * KEY_BYTES : (pages + 1) * KEY_BYTES]) in self.kept:
            pages += 1
        self.wires[session_id] = wire
        self.lengths[session_id] = pages * PAGE_TOKENS
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
        rows: int = 0,
        sampling: Sampling | None = None,
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
        if session_id in self.lengths:
            self.lengths[session_id] = seq_pos + shape[0]
        if dtype == "uint32":
            hidden = from_wire(data, shape, "uint32").float()[:, None].expand(-1, HIDDEN)
        else:
            hidden = from_wire(data, shape, dtype, codec) + 1
        answer = hidden[-rows:]
        if response_type == "token_ids":
            ids = answer.amax(1).to(torch.int32)
            return FakeResult(to_wire(ids, "uint32"), tuple(ids.shape), "uint32")
        form = self.wire_form(self.wires.get(session_id, "exact"))
        given = to_wire(answer, form.wire_dtype, form.codec)
        token = None if sampling is None else int(answer[-1].amax())
        return FakeResult(given, tuple(answer.shape), form.wire_dtype, form.codec, token=token)

    def kv_bytes(self, session_id: str, tokens: int) -> int:
        self._check_open(session_id)
        return KV_BYTES * tokens

    async def export_kv(self, session_id: str, first: int, end: int) -> memoryview:
        self._check_open(session_id)
        await asyncio.sleep(self.seconds)
        if not first < end <= self.lengths[session_id]:
            raise StepError("bad_request", "not held")
        return memoryview(_kv(first, end))

    async def copy_kv(self, session_id: str, first: int, end: int) -> memoryview:
        return await self.export_kv(session_id, first, end)

    def rewind(self, session_id: str, length: int) -> None:
        self._check_open(session_id)
        self.lengths[session_id] = min(self.lengths[session_id], length)

    async def import_kv(self, session_id: str, first: int, end: int, data: memoryview) -> None:
        self._check_open(session_id)
        await asyncio.sleep(self.seconds)
        if self.lengths[session_id] != first or not first < end <= self.sessions[session_id]:
            raise StepError("bad_request", "these positions do not fit")
        if data != _kv(first, end):
            raise StepError("bad_request", "not the KV of these positions")
        self.lengths[session_id] = end

    def close_session(self, session_id: str) -> None:
        self.sessions.pop(session_id, None)
        self.lengths.pop(session_id, None)

    def _check_open(self, session_id: str) -> None:
        if session_id not in self.sessions:
            raise StepError("unknown_session", "no such session")

    async def measure(self) -> tuple[float, float]:
        self.measured += 1
        return self.rates

    def close(self) -> None:
        self.is_closed = True

    async def wait_closed(self) -> None:
        assert self.is_closed
        await asyncio.sleep(self.closing_seconds)


def _kv(first: int, end: int) -> bytes:
    return b"".join((position % 2**16).to_bytes(KV_BYTES, "little") for position in range(first, end))
