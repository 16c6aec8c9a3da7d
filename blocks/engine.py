"""The engine of one server: one shard, the KV memory of its sessions, and the one thread that computes.

Steps run in the order they come, off the event loop. Positions, sizes and capacity are checked here,
so that whatever a peer sends, memory stays within what was promised. Knows nothing of peers.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from math import prod
from typing import Any

import psutil
import torch
from torch import Tensor

from swarm.blocks.architecture import part_of
from swarm.blocks.errors import NoCapacity, StepError
from swarm.blocks.fused import fuse
from swarm.blocks.kv import SessionKV
from swarm.blocks.models import Model
from swarm.blocks.precision import Precision, choose_device, choose_precision
from swarm.blocks.shard import load_span, stored_dtype
from swarm.errors import InputError
from swarm.kernels.codecs import from_wire, to_wire
from swarm.spans import Span

logger = logging.getLogger(__name__)

MAX_STEP_TOKENS = 2048
MAX_STEP_BYTES = 64 * 2**20
MAX_KV_TOKENS = 2**18
KV_MEMORY_FRACTION = 0.25
MAX_PARTS = 64
"""Sub-spans whose models are kept; they share the tensors of the whole."""

RETRY_AFTER = 5.0
"""Seconds after which a full server may have room again."""


@dataclass(frozen=True)
class EngineConfig:
    """`kv_tokens`: what all sessions together may hold, None by memory; `threads`: None for torch's."""

    dtype: str = "auto"
    device: str = "auto"
    kv_tokens: int | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("kv-tokens", self.kv_tokens), ("threads", self.threads)):
            if value is not None and value < 1:
                raise InputError(f"--{name} {value} is not possible.", "Give a whole number from 1 on.")


@dataclass(frozen=True)
class StepResult:
    """Hidden states after the span as wire bytes [tokens, hidden], and the milliseconds they took."""

    data: memoryview
    shape: tuple[int, int]
    dtype: str
    codec: str
    queue_ms: float
    compute_ms: float


class Engine:
    """Runs a span for many sessions. All methods but `load` are called from one event loop."""

    def __init__(
        self, module: Any, span: Span, precision: Precision, device: torch.device, kv_tokens: int | None
    ):
        """`module` is what `load_span` gives."""
        self.span = span
        self.precision = precision
        self._module = module
        self._device = device
        self._hidden_size: int = module.config.hidden_size
        self.kv_tokens = kv_tokens if kv_tokens is not None else self._kv_tokens_by_memory()
        step_tokens = MAX_STEP_BYTES // (self._hidden_size * precision.dtype.itemsize)
        self.max_step_tokens = max(1, min(MAX_STEP_TOKENS, step_tokens))
        self.queue = 0
        self._sessions: dict[str, SessionKV] = {}
        self._part = lru_cache(MAX_PARTS)(partial(part_of, module))
        self._fused = fuse(module)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="compute")

    @classmethod
    async def load(
        cls,
        model: Model,
        span: Span,
        config: EngineConfig,
        on_progress: Callable[[float], None] = lambda fraction: None,
    ) -> "Engine":
        """Read the weights of `span` and get ready; `on_progress` is called from another thread.

        Raises:
            InputError: the checkpoint, the span, the dtype or the device cannot be used.
        """

        def build() -> Engine:
            if config.threads is not None:
                torch.set_num_threads(config.threads)
            device = choose_device(config.device)
            precision = choose_precision(config.dtype, device, stored_dtype(model.checkpoint, span))
            return cls(
                load_span(model, span, precision, device, on_progress),
                span,
                precision,
                device,
                config.kv_tokens,
            )

        engine = await asyncio.to_thread(build)
        if config.threads is not None:
            engine._thread.submit(torch.set_num_threads, config.threads)
        return engine

    @property
    def kv_tokens_left(self) -> int:
        """Tokens that no session has reserved."""
        return self.kv_tokens - sum(session.capacity for session in self._sessions.values())

    def open_session(self, session_id: str, span: Span, max_tokens: int) -> None:
        """Reserve KV memory for `max_tokens` on the blocks `span`, some or all of this engine's.

        Raises:
            NoCapacity: they do not fit beside the other sessions, or never will.
            StepError: the session is open already, or not all of these blocks are here.
        """
        if not self.span.covers(span):
            raise StepError("bad_request", f"This server serves blocks {self.span}, not {span}.")
        if session_id in self._sessions:
            raise StepError("bad_request", "This session is open already.")
        if max_tokens > self.kv_tokens:
            raise NoCapacity(f"This server holds {self.kv_tokens} tokens at most, not {max_tokens}.", None)
        if max_tokens > self.kv_tokens_left:
            raise NoCapacity(
                f"This server has room for {self.kv_tokens_left} more tokens, not {max_tokens}.", RETRY_AFTER
            )
        blocks = Span(span.start - self.span.start, span.end - self.span.start)
        self._sessions[session_id] = SessionKV(blocks, max_tokens)

    def close_session(self, session_id: str) -> None:
        """Free the session's KV memory. Closing an unknown session does nothing."""
        self._sessions.pop(session_id, None)

    async def step(
        self,
        session_id: str,
        seq_pos: int,
        data: memoryview | bytes,
        shape: tuple[int, ...],
        dtype: str,
        codec: str,
    ) -> StepResult:
        """Run hidden states [tokens, hidden] from position `seq_pos` on, forgetting what stood there before.

        Raises:
            StepError: unknown session, a gap before `seq_pos`, too many tokens, or a shape, dtype or length
                that was not agreed on.
        """
        session = self._sessions.get(session_id)
        if session is None:
            raise StepError("unknown_session", "This server has no such session.")
        self._check_step(session, seq_pos, shape, dtype, codec)
        queued = time.perf_counter()
        self.queue += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._thread, self._run_wire, session, seq_pos, data, shape, queued
            )
        finally:
            self.queue -= 1

    async def measure(self) -> tuple[float, float]:
        """Decode and prefill rates in (token, block) pairs a second, by running a session of its own."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._measure)

    def close(self) -> None:
        """Forget all sessions and end the compute thread once the running step is done."""
        self._sessions.clear()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _check_step(
        self, session: SessionKV, seq_pos: int, shape: tuple[int, ...], dtype: str, codec: str
    ) -> None:
        if (dtype, codec) != (self.precision.wire_dtype, self.precision.codec):
            raise StepError(
                "bad_request",
                f"Activations travel as {self.precision.wire_dtype} {self.precision.codec} here.",
            )
        if len(shape) != 2 or shape[1] != self._hidden_size:
            raise StepError(
                "bad_request", f"Hidden states have the shape [tokens, {self._hidden_size}] here."
            )
        if shape[0] > self.max_step_tokens:
            raise StepError(
                "bad_request", f"A step may hold {self.max_step_tokens} tokens at most, not {shape[0]}."
            )
        if seq_pos > session.length:
            raise StepError(
                "bad_request", f"The session ends at position {session.length}: {seq_pos} leaves a gap."
            )
        if seq_pos + shape[0] > session.capacity:
            raise StepError("bad_request", f"The session was opened for {session.capacity} tokens.")

    def _run_wire(
        self,
        session: SessionKV,
        seq_pos: int,
        data: memoryview | bytes,
        shape: tuple[int, ...],
        queued: float,
    ) -> StepResult:
        started = time.perf_counter()
        wire_dtype, codec = self.precision.wire_dtype, self.precision.codec
        hidden = from_wire(data, shape, wire_dtype, codec)
        out = to_wire(self._run(session, seq_pos, hidden), wire_dtype, codec)
        ended = time.perf_counter()
        return StepResult(
            data=out,
            shape=(shape[0], self._hidden_size),
            dtype=wire_dtype,
            codec=codec,
            queue_ms=1000 * (started - queued),
            compute_ms=1000 * (ended - started),
        )

    @torch.inference_mode()
    def _run(self, session: SessionKV, seq_pos: int, hidden: Tensor) -> Tensor:
        """Hidden states [tokens, hidden] through the span; a failing step leaves the session at `seq_pos`."""
        session.roll_back(seq_pos)
        positions = torch.arange(seq_pos, seq_pos + hidden.shape[0], device=self._device)
        if self._fused is not None and len(hidden) <= self._fused.max_rows:
            return self._fused.run(hidden, session, positions)
        try:
            out = self._part(session.blocks)(
                inputs_embeds=hidden[None].to(self._device, self.precision.dtype),
                position_ids=positions[None],
                past_key_values=session,
                use_cache=True,
            )
        except BaseException:
            session.roll_back(seq_pos)
            raise
        return out.last_hidden_state[0]

    def _measure(self, prompt: int = 64, decoded: int = 4) -> tuple[float, float]:
        session = SessionKV(Span(0, self.span.size), prompt + decoded)
        hidden = torch.randn(prompt, self._hidden_size, generator=torch.Generator().manual_seed(0))
        self._run(session, 0, hidden)
        prefill = self._seconds(session, 0, hidden)
        decode = min(self._seconds(session, prompt + i, hidden[:1]) for i in range(decoded))
        return self.span.size / decode, self.span.size * prompt / prefill

    def _seconds(self, session: SessionKV, seq_pos: int, hidden: Tensor) -> float:
        started = time.perf_counter()
        self._run(session, seq_pos, hidden).cpu()
        return time.perf_counter() - started

    def _kv_tokens_by_memory(self) -> int:
        config = self._module.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        token_bytes = prod((2, self.span.size, kv_heads, head_dim, self.precision.dtype.itemsize))
        if self._device.type == "cuda":
            free = torch.cuda.mem_get_info(self._device)[0]
        else:
            free = psutil.virtual_memory().available
        return max(1, min(MAX_KV_TOKENS, int(free * KV_MEMORY_FRACTION / token_bytes)))
