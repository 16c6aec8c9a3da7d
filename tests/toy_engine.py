"""An engine whose model is arithmetic: its answers prove that nothing was lost, doubled or mixed up.

Hidden states have four channels: the token, how many blocks it went through, the sum of all tokens up to
it, and how many there are. A block holds the tokens that it saw, and what comes in must say the same of the
sequence as they do. Whatever does not fit is noted in `complaints` besides being refused.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from swarm.blocks.choosing import choose
from swarm.blocks.errors import NoCapacity, StepError
from swarm.kernels.codecs import from_wire, to_wire
from swarm.net.forms import Codec, Dtype, Wire
from swarm.net.messages import Error, Priority, ResponseType
from swarm.page_keys import KEY_BYTES, PAGE_TOKENS, page_keys, split_keys
from swarm.sampling import Sampling
from swarm.server.span_engine import BatchReport
from swarm.spans import Span

NUM_BLOCKS = 6
HIDDEN = 4
VOCABULARY = 257
EVERYBODY = ""

NextToken = Callable[[int, int], int]
"""The token after `count` tokens whose sum is `total`."""


def embedded(ids: np.ndarray) -> np.ndarray:
    """Tokens [count] as the hidden states [count, HIDDEN] that block 0 takes."""
    zeros, ones = np.zeros(len(ids), np.float32), np.ones(len(ids), np.float32)
    return np.stack([ids.astype(np.float32), zeros, ids.astype(np.float32), ones], axis=1)


def logits_of(token: int) -> torch.Tensor:
    """Logits [VOCABULARY] that are for that next token."""
    logits = torch.zeros(VOCABULARY)
    logits[token] = 10.0
    return logits


@dataclass(frozen=True)
class ToyForm:
    """Implements `WireForm`."""

    wire_dtype: Dtype
    codec: Codec = "raw"

    @property
    def name(self) -> str:
        return self.wire_dtype


@dataclass(frozen=True)
class ToyOutcome:
    """Implements `StepOutcome`."""

    data: memoryview
    shape: tuple[int, ...]
    dtype: Dtype
    codec: Codec
    queue_ms: float = 1.0
    compute_ms: float = 2.0
    deserialise_ms: float = 0.5
    forward_ms: float = 1.0
    serialise_ms: float = 0.5
    token: int | None = None


@dataclass
class ToyStats:
    """Implements `EngineStats`."""

    sessions: int
    kv_pages: int = 0
    kv_pages_used: int = 0
    kv_pages_cached: int = 0


@dataclass(kw_only=True)
class Script:
    """What an engine does, as its test says, and what it did.

    `refuse_steps` refuses the next steps (`refused_with` is the last of these), `spoil` changes what a step
    gives ([tokens, HIDDEN] float32), `before_step` is awaited before each with how many there were. Steps
    take `seconds`. An engine that `tells` gives that token where it is asked for one. `steps` are the
    positions and lengths that were asked.
    """

    dtype: Dtype = "float32"
    codec: Codec = "raw"
    max_step_tokens: int = 64
    kv_tokens: int = 10_000
    takes_token_ids: bool = True
    can_hand_over: bool = True
    tells: NextToken | None = None
    seconds: float = 0.0
    refuse_steps: list[Error] = field(default_factory=list)
    refused_with: Error | None = None
    spoil: Callable[[np.ndarray], np.ndarray] | None = None
    before_step: Callable[[int], Awaitable[None]] | None = None
    steps: list[tuple[int, int]] = field(default_factory=list)
    adopted: list[tuple[int, int]] = field(default_factory=list)
    pages: dict[tuple[str, Span, bytes], np.ndarray] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)


@dataclass
class ToySession:
    """What an engine has of one session: the tokens [blocks, held] that its blocks saw."""

    span: Span
    owner: str
    max_tokens: int
    form: ToyForm
    kv: np.ndarray
    is_running: bool = False

    @property
    def held(self) -> int:
        return self.kv.shape[1]


class ToyEngine:
    """Implements `SpanEngine` for the blocks `span`, as `script` says."""

    shard_bytes = 1_000_000

    def __init__(self, span: Span, script: Script):
        self.span = span
        self.sessions: dict[str, ToySession] = {}
        self.on_batch: Callable[[BatchReport], None] | None = None
        self._script = script

    @property
    def precision(self) -> ToyForm:
        return ToyForm(self._script.dtype, self._script.codec)

    @property
    def max_step_tokens(self) -> int:
        return self._script.max_step_tokens

    @property
    def takes_token_ids(self) -> bool:
        return self._script.takes_token_ids

    @property
    def gives_token_ids(self) -> bool:
        return self._script.tells is not None and self.span.end == NUM_BLOCKS

    @property
    def can_hand_over(self) -> bool:
        return self._script.can_hand_over

    @property
    def kv_tokens_left(self) -> int:
        return self._script.kv_tokens - sum(session.max_tokens for session in self.sessions.values())

    @property
    def queue(self) -> int:
        return sum(session.is_running for session in self.sessions.values())

    @property
    def stats(self) -> ToyStats:
        return ToyStats(len(self.sessions))

    def wire_form(self, wish: Wire) -> ToyForm:
        return ToyForm("float16", "scaled") if wish == "half" else self.precision

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
        if session_id in self.sessions or not self.span.covers(span):
            raise StepError("bad_request", "This session is open already, or not of these blocks.")
        if max_tokens > self.kv_tokens_left:
            raise NoCapacity("full", 5.0 if max_tokens <= self._script.kv_tokens else None)
        sees_tokens = self.takes_token_ids and span.start == 0
        owner = EVERYBODY if sees_tokens else client
        kept = [np.zeros((span.size, 0), np.float32)]
        for key in split_keys(page_keys):
            page = self._script.pages.get((owner, span, key))
            if page is None:
                break
            kept.append(page)
        self.sessions[session_id] = session = ToySession(
            span, owner, max_tokens, self.wire_form(wire), np.concatenate(kept, axis=1)
        )
        return session.held

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
    ) -> ToyOutcome:
        session = self._idle(session_id)
        self._script.steps.append((seq_pos, shape[0]))
        session.is_running = True
        try:
            if self._script.before_step is not None:
                await self._script.before_step(len(self._script.steps))
            await asyncio.sleep(self._script.seconds)
        finally:
            session.is_running = False
        if self._script.refuse_steps:
            self._script.refused_with = refusal = self._script.refuse_steps.pop(0)
            raise as_raised(refusal)
        if self.sessions.get(session_id) is not session:
            raise StepError("unknown_session", "The session was closed.")
        hidden = self._run(session, seq_pos, self._states(data, shape, dtype, codec))
        if self._script.spoil is not None:
            hidden = self._script.spoil(hidden)
        else:
            self._keep(session, seq_pos, shape[0], page_keys, brings_ids=dtype == "uint32")
        outcome = self._outcome(session, hidden[-rows:], response_type)
        return outcome if sampling is None else replace(outcome, token=self._sampled(hidden[-1], sampling))

    def close_session(self, session_id: str) -> None:
        self.sessions.pop(session_id, None)

    def kv_bytes(self, session_id: str, tokens: int) -> int:
        return self.sessions[session_id].span.size * tokens * 4

    async def export_kv(self, session_id: str, first: int, end: int) -> memoryview:
        session = self._idle(session_id)
        await asyncio.sleep(0)
        return memoryview(session.kv[:, first:end].tobytes())

    async def copy_kv(self, session_id: str, first: int, end: int) -> memoryview:
        session = self.sessions.get(session_id)
        if session is None or session.held < end or first % PAGE_TOKENS or end % PAGE_TOKENS:
            raise StepError("bad_request", f"{first}:{end} are no full pages of that session.")
        copied = memoryview(session.kv[:, first:end].tobytes())
        await asyncio.sleep(0)
        return copied

    def rewind(self, session_id: str, length: int) -> None:
        session = self._idle(session_id)
        session.kv = session.kv[:, :length]

    async def import_kv(self, session_id: str, first: int, end: int, data: memoryview) -> None:
        session = self._idle(session_id)
        await asyncio.sleep(0)
        if session.held != first or not first < end <= session.max_tokens:
            raise StepError("bad_request", f"The session holds {session.held} tokens, not {first}.")
        if len(data) != self.kv_bytes(session_id, end - first):
            raise StepError("bad_request", "That is not the KV of so many tokens.")
        brought = np.frombuffer(data, np.float32).reshape(session.span.size, end - first)
        session.kv = np.concatenate([session.kv, brought], axis=1)
        self._script.adopted.append((first, end))

    async def measure(self) -> tuple[float, float]:
        return 100.0, 1000.0

    def close(self) -> None:
        self.sessions.clear()

    async def wait_closed(self) -> None:
        return

    def _idle(self, session_id: str) -> ToySession:
        session = self.sessions.get(session_id)
        if session is None:
            raise StepError("unknown_session", "This server has no such session.")
        if session.is_running:
            self._script.complaints.append("two things are asked of a session at once")
            raise StepError("bad_request", "The last step of this session is still running.")
        return session

    def _states(self, data: memoryview, shape: tuple[int, ...], dtype: str, codec: str) -> np.ndarray:
        """What a step brings, as hidden states [tokens, HIDDEN]; what was rounded is whole again."""
        if dtype == "uint32":
            return embedded(np.frombuffer(data, np.uint32))
        is_raw = (dtype, codec) == ("float32", "raw")
        came = np.frombuffer(data, np.float32) if is_raw else from_wire(data, shape, dtype, codec).numpy()
        return np.rint(came.astype(np.float32)).reshape(shape)

    def _run(self, session: ToySession, seq_pos: int, hidden: np.ndarray) -> np.ndarray:
        if seq_pos > session.held or seq_pos + len(hidden) > session.max_tokens:
            self._refuse(f"{len(hidden)} tokens at {seq_pos}, where {session.held} are held")
        brought = np.broadcast_to(hidden[:, 0], (session.span.size, len(hidden)))
        session.kv = np.concatenate([session.kv[:, :seq_pos], brought], axis=1)
        totals = session.kv.cumsum(axis=1, dtype=np.float32)[:, seq_pos:]
        counts = np.arange(seq_pos + 1, session.held + 1, dtype=np.float32)
        if np.isfinite(hidden).all():
            self._check(session.span, hidden, totals, counts)
        blocks = hidden[:, 1] + session.span.size
        return np.stack([hidden[:, 0], blocks, totals[-1], counts], axis=1)

    def _check(self, span: Span, hidden: np.ndarray, totals: np.ndarray, counts: np.ndarray) -> None:
        """That what came went through the blocks before, and that all have seen the same sequence."""
        if (hidden[:, 1] != span.start).any():
            self._refuse(f"blocks {span} are brought what went through {hidden[0, 1]}")
        if (totals != totals[0]).any():
            self._refuse(f"blocks {span} hold different tokens")
        if span.start and ((hidden[:, 2] != totals[0]).any() or (hidden[:, 3] != counts).any()):
            self._refuse(f"blocks {span} hold another sequence than the blocks before")

    def _refuse(self, complaint: str) -> None:
        self._script.complaints.append(complaint)
        raise StepError("internal", complaint)

    def _keep(self, session: ToySession, seq_pos: int, tokens: int, keys: bytes, *, brings_ids: bool) -> None:
        """Let the pages that a step has filled be found: what a key names never changes."""
        filled = range(seq_pos // PAGE_TOKENS, (seq_pos + tokens) // PAGE_TOKENS)
        if brings_ids:
            keys = page_keys(session.kv[0].astype(int).tolist())[filled.start * KEY_BYTES :]
        for index, key in zip(filled, split_keys(keys), strict=False):
            name = (session.owner, session.span, key)
            page = session.kv[:, index * PAGE_TOKENS : (index + 1) * PAGE_TOKENS]
            if not np.array_equal(self._script.pages.setdefault(name, page), page, equal_nan=True):
                self._refuse("one key names two pages")

    def _outcome(self, session: ToySession, hidden: np.ndarray, response_type: ResponseType) -> ToyOutcome:
        if response_type == "token_ids":
            assert self._script.tells is not None, "tokens are asked of who said that it tells them"
            sums = np.nan_to_num(hidden, posinf=0.0)
            told = [self._script.tells(int(total), int(count)) for _, _, total, count in sums]
            ids = np.array(told, np.uint32)
            return ToyOutcome(memoryview(ids.tobytes()), ids.shape, "uint32", "raw")
        form, shape = session.form, hidden.shape
        if (form.wire_dtype, form.codec) == ("float32", "raw"):
            data = memoryview(np.ascontiguousarray(hidden, np.float32).tobytes())
        else:
            data = to_wire(torch.from_numpy(hidden), form.wire_dtype, form.codec)
        return ToyOutcome(data, shape, form.wire_dtype, form.codec)

    def _sampled(self, last: np.ndarray, sampling: Sampling) -> int:
        """The token after a sequence that ends with a hidden state [HIDDEN], as a client chooses it."""
        assert self._script.tells is not None, "tokens are asked of who said that it tells them"
        if not np.isfinite(last).all():
            raise StepError("internal", "The model gave no numbers.")
        _, _, total, count = last.tolist()
        return choose(logits_of(self._script.tells(int(total), int(count))), sampling, int(count))


def as_raised(error: Error) -> NoCapacity | StepError:
    """What an engine raises so that a step is refused with `error`, as far as an engine can."""
    if error.code == "no_capacity":
        return NoCapacity(error.message, error.retry_after)
    return StepError(error.code, error.message)
