"""The engine of one server: one shard, one page pool, and one loop that serves the steps of all sessions.

Each iteration takes rows of every step that is ready, runs them as one flat batch off the event loop, or on
it where that is quick and nobody else is there, and hands out what is done. Whatever a peer sends, memory
stays within what was promised. All state belongs to the event loop. Knows nothing of peers but their names.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from swarm.baton import Baton
from swarm.blocks.batch import Fairness, Share, form_batch
from swarm.blocks.checks import StepForm, check_step, max_step_tokens
from swarm.blocks.company import Pressure, patience, wanted
from swarm.blocks.compute import Compute, Piece
from swarm.blocks.compute_thread import ComputeThread
from swarm.blocks.errors import NoCapacity, StepError
from swarm.blocks.handover import Handover
from swarm.blocks.loading import EngineConfig, LoadedSpan, blocks_that_fit, load
from swarm.blocks.models import Model
from swarm.blocks.pace import Pace
from swarm.blocks.precision import WireForm
from swarm.blocks.sessions import Sessions
from swarm.blocks.steps import BatchReport, EngineStats, PendingStep, Session, StepResult
from swarm.kernels.codecs import to_wire
from swarm.kernels.pages import Segment
from swarm.page_keys import PAGE_TOKENS
from swarm.sampling import Sampling
from swarm.spans import Span

__all__ = ["Engine", "EngineConfig", "blocks_that_fit"]

logger = logging.getLogger(__name__)

DECODING_SECONDS = 0.5
"""How long after its last decode step a session counts as decoding: the next one is on its way."""

INLINE_SECONDS = 0.015
"""How long a decode step may hold up the event loop, where only one session has any: to have it computed in
another thread, and to be woken, adds a fifth of a millisecond to each token at each hop."""

MEASURED_PROMPT, MEASURED_TOKENS = 96, 6


class Engine:
    """Runs a span for many sessions. All methods but `load` are called from one event loop."""

    def __init__(self, loaded: LoadedSpan, *, overcommit: float = 1.0, prefix_cache: bool = True):
        self.span = loaded.span
        self.precision = loaded.precision
        self.shard_bytes = loaded.shard_bytes
        self.kv_tokens = loaded.pages * PAGE_TOKENS
        self.max_step_tokens = max_step_tokens(loaded)
        self.threads = torch.get_num_threads()
        self.on_batch: Callable[[BatchReport], None] | None = None
        self._loaded = loaded
        self._compute = Compute(loaded)
        self._counted = EngineStats(kv_pages=loaded.pages)
        self._sessions = Sessions(loaded, self._counted, overcommit=overcommit, prefix_cache=prefix_cache)
        self._ready: list[PendingStep] = []
        self._fairness = Fairness()
        self._pace = Pace()
        self._pressure = Pressure(shares_cores=loaded.is_on_cpu)
        self._is_serving = False  # an iteration runs, or is to be formed
        self._gathering: asyncio.TimerHandle | None = None
        self._enough = 0  # steps that end the gathering
        self._stepping: Session | None = None  # whose step came last
        self._alone_since = 0.0  # since when no other session had any
        self._inline_rows = 0  # of decode, which are computed within `INLINE_SECONDS`
        self._thread = ComputeThread()
        self._handover = Handover(loaded, self._sessions, self._thread)

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
        engine.threads = config.threads or torch.get_num_threads()
        if config.threads is not None:
            await engine._thread.run(partial(torch.set_num_threads, config.threads))
            torch.set_num_threads(config.threads)
        return engine

    @property
    def takes_token_ids(self) -> bool:
        """Whether steps on the first blocks may bring token ids."""
        return self._loaded.embedding is not None

    @property
    def gives_token_ids(self) -> bool:
        """Whether steps on the last blocks may ask for the next token."""
        return self._loaded.logits is not None

    @property
    def kv_tokens_left(self) -> int:
        """Tokens that no session was promised."""
        return self._sessions.tokens_left

    @property
    def queue(self) -> int:
        """Steps that have no result yet."""
        return len(self._ready)

    @property
    def stats(self) -> EngineStats:
        return replace(
            self._counted,
            sessions=len(self._sessions),
            kv_pages_used=self._sessions.pages_used,
            kv_pages_cached=self._sessions.pages_kept,
        )

    def wire_form(self, wish: str) -> WireForm:
        """How activations of a session travel that is opened with that `wire`."""
        return self.precision.wire_form(wish)

    def open_session(
        self,
        session_id: str,
        span: Span,
        max_tokens: int,
        *,
        client: str = "",
        page_keys: bytes = b"",
        priority: str = "interactive",
        wire: str = "exact",
    ) -> int:
        """Promise `client` KV memory for `max_tokens` on the blocks `span`, some or all of this engine's.

        Activations of its steps travel as `wire_form(wire)` says.

        Returns:
            How many tokens the session holds already, of those whose pages `page_keys` name.

        Raises:
            NoCapacity: they do not fit beside the other sessions, or never will.
            StepError: the session is open already, or not all of these blocks are here.
        """
        return self._sessions.open(
            session_id,
            span,
            max_tokens,
            client=client,
            page_keys=page_keys,
            is_bulk=priority == "bulk",
            wire=wire,
        )

    def close_session(self, session_id: str) -> None:
        """Free the session's KV memory. Closing an unknown session does nothing."""
        session = self._sessions.close(session_id)
        if session is self._stepping:
            self._stepping = None
        if session is not None and session.step is not None:
            self._end(session.step, StepError("unknown_session", "The session was closed."))

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
        rows: int = 0,
        sampling: Sampling | None = None,
    ) -> StepResult:
        """Run hidden states [tokens, hidden], or token ids [tokens], from position `seq_pos` on.

        What the session held from there on is forgotten. `page_keys` name the pages that the step fills;
        token ids name them themselves. The answer is for the last `rows` of the tokens, or all if 0: hidden
        states [rows, hidden], or with the `response_type` token_ids the tokens [rows] that the model finds
        likeliest after each. With `sampling` a token is sampled after the last one besides. A step that is
        cancelled before it runs changes nothing.

        Raises:
            StepError: unknown session, a step of it that still runs, a gap before `seq_pos`, too many tokens,
                or a shape, dtype or length that was not agreed on.
            NoCapacity: more was promised than there is, and it is used up for the moment.
        """
        session = self._sessions.find_idle(session_id)
        form = StepForm(seq_pos, data, shape, dtype, codec, response_type, rows, samples=sampling is not None)
        ids = check_step(self._loaded, session, form, self.max_step_tokens)
        if self._sessions.keeps_prefixes:
            session.kv.expect(seq_pos, ids, page_keys)
        now, result = time.perf_counter(), Baton[StepResult]()
        brought, tokens = data if ids is None else ids, shape[0]
        step = PendingStep(session, seq_pos, tokens, brought, rows or tokens, now, result, since=now)
        step.wants_tokens, step.sampling = response_type == "token_ids", sampling
        session.step = step
        if session is not self._stepping:
            self._stepping, self._alone_since = session, now
        self._ready.append(step)
        if step.is_decode:
            self._pressure.came(now - session.came_at)
            session.came_at, session.decode_rows = now, tokens
        self._serve()
        try:
            return await result
        finally:
            self._end(step)

    @property
    def can_hand_over(self) -> bool:
        """Whether the KV of sessions can be given to another engine of the same dtype, and taken in."""
        return self._handover.is_possible

    def kv_bytes(self, session_id: str, tokens: int) -> int:
        """Bytes of the KV of so many tokens of the session, on all its blocks.

        Raises:
            StepError: there is no such session.
        """
        return self._handover.size(session_id, tokens)

    async def export_kv(self, session_id: str, first: int, end: int) -> memoryview:
        """The KV of positions `[first, end)` of the session, as `swarm.blocks.handover` lays it out.

        Steps of other sessions wait for it: a long one is asked for in parts.

        Raises:
            StepError: unknown session, a step of it that still runs, positions that it does not hold, or
                blocks that keep states instead.
        """
        return await self._handover.give(session_id, first, end)

    async def copy_kv(self, session_id: str, first: int, end: int) -> memoryview:
        """`export_kv` of full pages, while steps of the session may run: they change none of these.

        Raises:
            StepError: unknown session, positions that are not those of full pages that it holds, or blocks
            that keep states instead. NoCapacity: there are no pages to spare for the moment.
        """
        return await self._handover.copy(session_id, first, end)

    def rewind(self, session_id: str, length: int) -> None:
        """Let the session forget what it holds from position `length` on.

        Raises:
            StepError: unknown session, or a step of it that still runs.
        """
        self._handover.rewind(session_id, length)

    async def import_kv(self, session_id: str, first: int, end: int, data: memoryview | bytes) -> None:
        """Let a session that holds exactly `first` tokens hold `end`, by what `export_kv` gave elsewhere.

        Its pages cannot be found by name from then on. What is refused changes nothing.

        Raises:
            StepError: unknown session, a step of it that still runs, positions that do not fit it, bytes of
                another length or that are not numbers, or blocks that keep states instead.
            NoCapacity: more was promised than there is, and it is used up for the moment.
        """
        await self._handover.take(session_id, first, end, data)

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
        for session_id in self._sessions.ids:
            self.close_session(session_id)
        self._thread.close()

    async def wait_closed(self) -> None:
        """Return once a closed engine computes no more."""
        await self._thread.wait_closed()

    def check_integrity(self) -> None:
        """
        Raises:
            AssertionError: a page is lost, or counted otherwise than the sessions use it.
        """
        self._sessions.check_integrity()

    def _serve(self) -> None:
        """See to it that an iteration takes up what is ready, with what else has come by then."""
        if not self._is_serving and len(self._sessions) == 1:
            self._iterate()
        elif not self._is_serving:
            self._is_serving = True
            asyncio.get_running_loop().call_soon(self._gather)
        elif self._gathering is not None and len(self._ready) >= self._enough:
            self._gathering.cancel()
            self._gathering = None
            asyncio.get_running_loop().call_soon(self._iterate)

    def _gather(self) -> None:
        """Where many decode and what computes is busy, wait a moment for more of them; iterate then."""
        self._is_serving = False
        now = time.perf_counter()
        rows = self._decoding(now)
        self._enough = wanted(len(rows))
        if len(self._ready) >= self._enough or not all(step.is_decode for step in self._ready):
            self._iterate()
            return
        iteration = self._pace.decode_seconds(sum(sorted(rows)[: self._enough])) or 0.0
        wait = patience(self._pressure.value(now), iteration, self._pressure.cycle)
        self._gathering = asyncio.get_running_loop().call_later(wait, self._iterate)
        self._is_serving = True

    def _iterate(self) -> None:
        """Have the next iteration computed."""
        self._gathering, self._is_serving = None, False
        pieces = self._form()
        if len(pieces) == 1 and self._may_be_inline(pieces[0].step):
            self._is_serving = True
            self._compute_inline(pieces)
        elif pieces:
            self._is_serving = True
            work = partial(self._compute.run, pieces)
            self._thread.start(work, partial(self._on_computed, pieces, time.perf_counter()))
        elif self._ready:
            self._serve()

    def _may_be_inline(self, step: PendingStep) -> bool:
        """Whether the event loop may stand still for the one step of an iteration."""
        is_quick = step.is_decode and step.tokens <= self._inline_rows and not self._thread.is_busy
        return is_quick and (len(self._sessions) == 1 or step.arrived - self._alone_since >= DECODING_SECONDS)

    def _compute_inline(self, pieces: Sequence[Piece]) -> None:
        started, error = time.perf_counter(), None
        try:
            self._compute.run(pieces)
        except Exception as failure:
            error = failure
        self._on_computed(pieces, started, None, error)

    def _on_computed(
        self, pieces: Sequence[Piece], started: float, _: None, error: BaseException | None
    ) -> None:
        """Hand out what the iteration gave; who got a result may have the next step at hand after that."""
        seconds = time.perf_counter() - started
        asyncio.get_running_loop().call_soon(self._go_on, pieces, None if error else seconds)
        self._hand_out(pieces, error)

    def _go_on(self, pieces: Sequence[Piece], seconds: float | None) -> None:
        """Go on with what is ready by now, and before that count what was computed."""
        self._is_serving = False
        if self._ready:
            self._serve()
        if seconds is not None:
            self._count(pieces, seconds)

    def _decoding(self, now: float) -> list[int]:
        """Of each session whose next decode step is here or on its way, the rows that the last one had."""
        return [
            session.decode_rows
            for session in self._sessions
            if now - session.decoded_at < DECODING_SECONDS
            and (session.step is None or session.step.is_decode)
        ]

    def _form(self) -> list[Piece]:
        """The next iteration's pieces, with pages for all their rows."""
        now = time.perf_counter()
        alone = [step for step in self._ready if step.is_alone]
        has_prefill = not all(step.is_decode for step in self._ready)
        rows = self._pace.prefill_rows(sum(self._decoding(now))) if has_prefill else 0
        shares = form_batch(alone[:1] or self._ready, self._fairness, rows, now)
        return [piece for share in shares if (piece := self._piece(share)) is not None]

    def _piece(self, share: Share[PendingStep]) -> Piece | None:
        """None, with the step at its end, where no page is left for it."""
        step, session = share.step, share.step.session
        first = step.seq_pos + step.done
        try:
            copies = self._sessions.reserve(session, first, first + share.rows)
        except NoCapacity as full:
            self._end(step, full)
            return None
        session.is_running = True
        return Piece(step, Segment(share.rows, first, tuple(session.kv.table), session.state), copies)

    def _hand_out(self, pieces: Sequence[Piece], error: BaseException | None) -> None:
        """Give the steps that are done their results. What failed together is repeated one by one."""
        now = time.perf_counter()
        for piece in pieces:
            session, step = piece.step.session, piece.step
            if not self._sessions.rest(session):
                continue
            if error is None:
                self._advance(piece, now)
            elif len(pieces) == 1:
                session.kv.roll_back(step.seq_pos)
                self._end(step, error)
            else:
                step.is_alone = True

    def _advance(self, piece: Piece, now: float) -> None:
        step, session = piece.step, piece.step.session
        session.kv.grow(piece.segment.length)
        step.done += piece.segment.rows
        if piece.asked:
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
        if self._loaded.is_on_cpu:
            self._inline_rows = self._pace.decode_rows(INLINE_SECONDS)
        self._pressure.ran(seconds)
        if self.on_batch is not None:
            pairs = sum(piece.segment.rows * piece.step.session.kv.blocks.size for piece in pieces)
            self.on_batch(BatchReport(len(pieces), decoded, prefilled, seconds, pairs))

    def _end(self, step: PendingStep, outcome: StepResult | BaseException | None = None) -> None:
        """The step gets no more rows, and its `outcome` if it has one. Safe to call again."""
        if step.session.step is step:
            step.session.step = None
            self._ready.remove(step)
        if outcome is None or step.result.done():
            return
        if isinstance(outcome, BaseException):
            step.result.set_exception(outcome)
        else:
            step.result.set_result(outcome)
