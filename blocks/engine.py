"""The engine of one server: one shard, one page pool, and one loop that serves the steps of all sessions.

Each iteration takes rows of every step that is ready, runs them as one flat batch off the event loop, and
hands out what is done. Positions, sizes and capacity are checked here, so that whatever a peer sends, memory
stays within what was promised. All state belongs to the event loop. Knows nothing of peers but their names.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import torch

from swarm.blocks.batch import Fairness, Share, form_batch
from swarm.blocks.checks import StepForm, check_step, max_step_tokens
from swarm.blocks.company import Pressure, patience, wanted
from swarm.blocks.compute import Compute, Piece
from swarm.blocks.errors import NoCapacity, StepError
from swarm.blocks.kv import EVERYBODY, PageName, SessionKV, pages_of
from swarm.blocks.loading import EngineConfig, LoadedSpan, load
from swarm.blocks.models import Model
from swarm.blocks.pace import Pace
from swarm.blocks.pool import PagePool, PoolExhausted
from swarm.blocks.steps import BatchReport, EngineStats, PendingStep, Session, StepResult
from swarm.kernels.codecs import to_wire
from swarm.kernels.pages import Segment
from swarm.page_keys import KEY_BYTES, PAGE_TOKENS
from swarm.spans import Span

__all__ = ["Engine", "EngineConfig"]

logger = logging.getLogger(__name__)

RETRY_AFTER = 5.0
"""Seconds after which a full server may have room again."""

DECODING_SECONDS = 0.5
"""How long after its last decode step a session counts as decoding: the next one is on its way."""

MEASURED_PROMPT, MEASURED_TOKENS = 96, 6


class Engine:
    """Runs a span for many sessions. All methods but `load` are called from one event loop."""

    def __init__(self, loaded: LoadedSpan, *, overcommit: float = 1.0, prefix_cache: bool = True):
        self.span = loaded.span
        self.precision = loaded.precision
        self.shard_bytes = loaded.shard_bytes
        self.kv_tokens = loaded.pages * PAGE_TOKENS
        self.max_step_tokens = max_step_tokens(loaded)
        self.on_batch: Callable[[BatchReport], None] | None = None
        self._loaded = loaded
        self._compute = Compute(loaded)
        self._keeps_prefixes = prefix_cache and loaded.keeps_pages
        self._pool: PagePool[PageName] = PagePool(loaded.pages)
        self._promisable = int(loaded.pages * overcommit)
        self._sessions: dict[str, Session] = {}
        self._leaving: set[Session] = set()
        self._ready: list[PendingStep] = []
        self._fairness = Fairness()
        self._pace = Pace()
        self._pressure = Pressure(shares_cores=loaded.is_on_cpu)
        self._came = asyncio.Event()
        self._counted = EngineStats(kv_pages=loaded.pages)
        self._serving: asyncio.Task[None] | None = None
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
            InputError: the checkpoint, the span, the dtype, the device or a limit cannot be used.
        """
        loaded = await asyncio.to_thread(load, model, span, config, on_progress)
        engine = cls(loaded, overcommit=config.overcommit, prefix_cache=config.prefix_cache)
        if config.threads is not None:
            engine._thread.submit(torch.set_num_threads, config.threads)
        return engine

    @property
    def takes_token_ids(self) -> bool:
        """Whether steps on the first blocks may bring token ids."""
        return self._loaded.embedding is not None

    @property
    def gives_token_ids(self) -> bool:
        """Whether steps on the last blocks may ask for the likeliest next token."""
        return self._loaded.logits is not None

    @property
    def kv_tokens_left(self) -> int:
        """Tokens that no session was promised."""
        return max(0, self._promisable - self._promised) * PAGE_TOKENS

    @property
    def queue(self) -> int:
        """Steps that have no result yet."""
        return len(self._ready)

    @property
    def stats(self) -> EngineStats:
        return replace(
            self._counted,
            sessions=len(self._sessions),
            kv_pages_used=self._pool.used,
            kv_pages_cached=self._pool.kept,
        )

    def open_session(
        self,
        session_id: str,
        span: Span,
        max_tokens: int,
        *,
        client: str = "",
        page_keys: bytes = b"",
        priority: str = "interactive",
    ) -> int:
        """Promise `client` KV memory for `max_tokens` on the blocks `span`, some or all of this engine's.

        Returns:
            How many tokens the session holds already, of those whose pages `page_keys` name.

        Raises:
            NoCapacity: they do not fit beside the other sessions, or never will.
            StepError: the session is open already, or not all of these blocks are here.
        """
        if not self.span.covers(span):
            raise StepError("bad_request", f"This server serves blocks {self.span}, not {span}.")
        if session_id in self._sessions:
            raise StepError("bad_request", "This session is open already.")
        self._check_room(max_tokens)
        blocks = Span(span.start - self.span.start, span.end - self.span.start)
        kv = SessionKV(self._pool, blocks, max_tokens, client)
        state = self._loaded.forward.new_state(blocks, max_tokens)
        self._sessions[session_id] = Session(kv, is_bulk=priority == "bulk", state=state)
        self._counted.admitted += 1
        if not self._keeps_prefixes:
            return 0
        sees_tokens = self.takes_token_ids and blocks.start == 0
        held = kv.attach(page_keys, EVERYBODY if sees_tokens else client)
        self._counted.prefix_tokens_asked += len(page_keys) // KEY_BYTES * PAGE_TOKENS
        self._counted.prefix_tokens_held += held
        return held

    def close_session(self, session_id: str) -> None:
        """Free the session's KV memory. Closing an unknown session does nothing."""
        session = self._sessions.pop(session_id, None)
        if session is None:
            return
        session.is_closed = True
        if session.step is not None:
            self._end(session.step, StepError("unknown_session", "The session was closed."))
        if session.is_running:
            self._leaving.add(session)
        else:
            session.kv.roll_back(0)

    async def step(
        self,
        session_id: str,
        seq_pos: int,
        data: memoryview | bytes,
        shape: tuple[int, ...],
        dtype: str,
        codec: str,
        *,
        page_keys: bytes = b"",
        response_type: str = "hidden_states",
    ) -> StepResult:
        """Run hidden states [tokens, hidden], or token ids [tokens], from position `seq_pos` on.

        What the session held from there on is forgotten. `page_keys` name the pages that the step fills;
        token ids name them themselves. With the `response_type` token_ids, the answer is the token that the
        model finds likeliest after the last row. A step that is cancelled before it runs changes nothing.

        Raises:
            StepError: unknown session, a step of it that still runs, a gap before `seq_pos`, too many tokens,
                or a shape, dtype or length that was not agreed on.
            NoCapacity: more was promised than there is, and it is used up for the moment.
        """
        session = self._sessions.get(session_id)
        if session is None:
            raise StepError("unknown_session", "This server has no such session.")
        if session.step is not None or session.is_running:  # given up or not: its pages are written to
            raise StepError("bad_request", "The last step of this session is still running.")
        ids = check_step(
            self._loaded, session.kv, StepForm(seq_pos, data, shape, dtype, codec, response_type)
        )
        if self._keeps_prefixes:
            session.kv.expect(seq_pos, ids, page_keys)
        now, result = time.perf_counter(), asyncio.get_running_loop().create_future()
        step = PendingStep(session, seq_pos, shape[0], data if ids is None else ids, now, result, since=now)
        step.wants_token = response_type == "token_ids"
        session.step = step
        self._ready.append(step)
        self._came.set()
        if step.is_decode:
            self._pressure.came(now - session.came_at)
            session.came_at = now
        if self._serving is None:
            self._serving = asyncio.create_task(self._serve(), name="serve steps")
        try:
            return await result
        finally:
            self._end(step)

    async def measure(self) -> tuple[float, float]:
        """Decode and prefill rates in (token, block) pairs a second, by running a session of its own."""
        decoded = min(MEASURED_TOKENS, self.kv_tokens - 1)
        prompt = min(MEASURED_PROMPT, self.kv_tokens - decoded, self.max_step_tokens)
        self.open_session("", self.span, prompt + decoded)
        rng = torch.Generator().manual_seed(0)
        hidden = torch.randn(prompt, self._loaded.hidden_size, generator=rng).to(self.precision.dtype)
        wire = self.precision.wire_dtype, self.precision.codec
        try:
            times = []
            for seq_pos, rows in ((0, hidden), *((prompt + at, hidden[:1]) for at in range(decoded))):
                done = await self.step("", seq_pos, to_wire(rows, *wire), tuple(rows.shape), *wire)
                times.append(done.forward_ms / 1000)
        finally:
            self.close_session("")
        return self.span.size / min(times[1:]), self.span.size * prompt / times[0]

    def close(self) -> None:
        """Forget all sessions and end the compute thread once the running iteration is done."""
        for session_id in list(self._sessions):
            self.close_session(session_id)
        if self._serving is not None:
            self._serving.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def wait_closed(self) -> None:
        """Return once a closed engine computes no more."""
        await asyncio.to_thread(self._thread.shutdown, wait=True)

    def check_integrity(self) -> None:
        """
        Raises:
            AssertionError: a page is lost, or counted otherwise than the sessions use it.
        """
        held = [*self._sessions.values(), *self._leaving]
        self._pool.check_integrity(session.kv.table for session in held)
        assert all(
            len(session.kv.table) == pages_of(session.kv.length) for session in held if not session.step
        )

    async def _serve(self) -> None:
        """One iteration after the other, as long as there are steps."""
        try:
            while self._ready:
                await self._gather()
                pieces = self._form()
                if pieces:
                    self._hand_out(pieces, await self._run(pieces))
                    await asyncio.sleep(0)  # who got a result may have the next step at hand
        finally:
            self._serving = None

    async def _gather(self) -> None:
        """Where many decode and what computes is busy, wait a moment for more of them."""
        now = time.perf_counter()
        enough = wanted(self._decoding(now))
        if len(self._ready) >= enough or not all(step.is_decode for step in self._ready):
            return
        iteration = self._pace.decode_seconds(enough) or 0.0
        with suppress(TimeoutError):
            async with asyncio.timeout(patience(self._pressure.value(now), iteration, self._pressure.cycle)):
                while len(self._ready) < enough:
                    self._came.clear()
                    await self._came.wait()

    def _decoding(self, now: float) -> int:
        """Sessions whose next decode step is here or on its way."""
        return sum(
            now - session.decoded_at < DECODING_SECONDS and (session.step is None or session.step.is_decode)
            for session in self._sessions.values()
        )

    def _form(self) -> list[Piece]:
        """The next iteration's pieces, with pages for all their rows."""
        now = time.perf_counter()
        alone = [step for step in self._ready if step.is_alone]
        rows = self._pace.prefill_rows(self._decoding(now))
        shares = form_batch(alone[:1] or self._ready, self._fairness, rows, now)
        return [piece for share in shares if (piece := self._piece(share)) is not None]

    def _piece(self, share: Share[PendingStep]) -> Piece | None:
        """None, with the step at its end, where no page is left for it."""
        step, session = share.step, share.step.session
        first = step.seq_pos + step.done
        try:
            copies = session.kv.reserve(first, first + share.rows)
        except PoolExhausted:
            full = NoCapacity("This server promised more tokens than it has; all are in use.", RETRY_AFTER)
            self._end(step, full)
            return None
        session.is_running = True
        return Piece(step, Segment(share.rows, first, tuple(session.kv.table), session.state), copies)

    async def _run(self, pieces: Sequence[Piece]) -> Exception | float:
        """Run an iteration in the compute thread; the seconds that it took, or why it failed."""
        loop, started = asyncio.get_running_loop(), time.perf_counter()
        try:
            await loop.run_in_executor(self._thread, self._compute.run, pieces)
        except Exception as error:  # whatever failed, each step of the iteration must get an ending
            return error
        return time.perf_counter() - started

    def _hand_out(self, pieces: Sequence[Piece], outcome: Exception | float) -> None:
        """Give the steps that are done their results. What failed together is repeated one by one."""
        now = time.perf_counter()
        for piece in pieces:
            session, step = piece.step.session, piece.step
            session.is_running = False
            if session.is_closed:
                self._leaving.discard(session)
                session.kv.roll_back(0)
            elif not isinstance(outcome, Exception):
                self._advance(piece, now)
            elif len(pieces) == 1:
                session.kv.roll_back(step.seq_pos)
                self._end(step, outcome)
            else:
                step.is_alone = True
        if not isinstance(outcome, Exception):
            self._count(pieces, outcome)

    def _advance(self, piece: Piece, now: float) -> None:
        step, session = piece.step, piece.step.session
        session.kv.grow(piece.segment.length)
        step.done += piece.segment.rows
        assert piece.output is not None
        step.outputs.append(piece.output)
        if step.is_decode:
            session.decoded_at = now
        if step.done == step.tokens:
            self._end(step, step.finished)

    def _count(self, pieces: Sequence[Piece], seconds: float) -> None:
        decoded = sum(piece.segment.rows for piece in pieces if piece.step.is_decode)
        prefilled = sum(piece.segment.rows for piece in pieces) - decoded
        self._counted.decode_tokens += decoded
        self._counted.prefill_tokens += prefilled
        self._pace.learn(decoded, prefilled, seconds)
        self._pressure.ran(seconds)
        if self.on_batch is not None:
            self.on_batch(BatchReport(len(pieces), decoded, prefilled, seconds))

    def _end(self, step: PendingStep, outcome: StepResult | Exception | None = None) -> None:
        """The step gets no more rows, and its `outcome` if it has one. Safe to call again."""
        if step.session.step is step:
            step.session.step = None
            self._ready.remove(step)
        if outcome is None or step.result.done():
            return
        if isinstance(outcome, Exception):
            step.result.set_exception(outcome)
        else:
            step.result.set_result(outcome)

    @property
    def _promised(self) -> int:
        held = (*self._sessions.values(), *self._leaving)
        return sum(pages_of(session.kv.capacity) for session in held)

    def _check_room(self, max_tokens: int) -> None:
        if pages_of(max_tokens) > self._pool.size:
            self._counted.refused += 1
            raise NoCapacity(f"This server holds {self.kv_tokens} tokens at most, not {max_tokens}.", None)
        if pages_of(max_tokens) > self._promisable - self._promised:
            self._counted.refused += 1
            raise NoCapacity(
                f"This server has room for {self.kv_tokens_left} more tokens, not {max_tokens}.", RETRY_AFTER
            )
