"""The streams that other peers open to this server, and the session that each of them may carry.

Owns what a stream has agreed on, from its opening to its end; however it ends, the session's KV memory
is freed. What may be asked is decided in `admission`, what is computed by the engine in the shard cell.
Must not know of announcements or of this process's life.
"""

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

from swarm.blocks.errors import NoCapacity, StepError
from swarm.net import messages
from swarm.net.messages import AnyMessage, Close, Closed, Error, Open, Opened, Ping, Pong, Result, Step
from swarm.net.transport import Buffer, FrameError, PeerId, Stream, StreamClosed
from swarm.server.admission import Limits, Offer, Terms, refusal, refuse_open, refuse_step
from swarm.server.cell import ShardCell
from swarm.server.metrics import Metrics
from swarm.server.seat import Seat
from swarm.server.span_engine import SpanEngine, StepOutcome
from swarm.spans import Span

logger = logging.getLogger(__name__)

Answer: TypeAlias = tuple[AnyMessage, Buffer]

STEP_FAULTS: dict[str, messages.ErrorCode] = {
    "bad_request": "bad_request",
    "no_capacity": "no_capacity",
    "unknown_session": "unknown_session",
}
"""What an engine may say of a step, as the wire says it; anything else is our own fault."""

EVICTED = "This server has let its blocks go, and this session with them: open it again."


class Sessions:
    """Serves the shard cell of one model's span to whoever opens a stream."""

    def __init__(
        self,
        model_id: str,
        hidden_size: int,
        cell: ShardCell,
        limits: Limits | None = None,
        metrics: Metrics | None = None,
    ):
        self._model_id = model_id
        self._hidden_size = hidden_size
        self._cell = cell
        self._limits = limits or Limits()
        self._metrics = metrics or Metrics(cell)
        self._seats: set[Seat] = set()
        self.last_ended_at = 0.0  # in the loop's time; 0 if no session has ended yet
        self._answering = 0
        self._quiet = asyncio.Event()
        self._quiet.set()

    @property
    def count(self) -> int:
        """How many sessions are open."""
        return sum(seat.engine is not None for seat in self._seats)

    async def on_stream(self, stream: Stream) -> None:
        """Answer every message of `stream` until it ends, falls idle, or breaks a rule of framing."""
        seat = Seat(stream)
        self._seats.add(seat)
        try:
            await self._converse(seat)
        except TimeoutError:
            logger.info("closed an idle stream of peer %s, session %s", seat.peer, seat.session_id)
        except FrameError as fault:
            logger.info("closed a stream of peer %s, session %s: %s", seat.peer, seat.session_id, fault)
            await self._say_why(seat, fault)
        finally:
            self._seats.discard(seat)
            self._free(seat)
            await seat.close()

    def evict(self) -> None:
        """End every session. The streams stay: who steps on is told so, and may open a session again."""
        for seat in self._seats:
            seat.evict()

    async def drain(self, grace: float) -> None:
        """Wait at most `grace` seconds for the answers that are being worked on, then end every stream."""
        try:
            async with asyncio.timeout(grace):
                await self._quiet.wait()
        except TimeoutError:
            logger.warning("%d steps were not done within %g seconds", self._answering, grace)
        for seat in tuple(self._seats):
            seat.stream.close()

    async def _converse(self, seat: Seat) -> None:
        while True:
            message, body = await seat.receive(self._limits.idle)
            with self._counted():
                answer, data = await self._answer(seat, message, body)
                del body
                if isinstance(answer, Error):
                    self._metrics.on_refused(message, answer.code)
                async with asyncio.timeout(self._limits.send):
                    await seat.stream.send(messages.encode(answer), data)

    async def _answer(self, seat: Seat, message: AnyMessage, body: memoryview) -> Answer:
        try:
            match message:
                case Open():
                    return self._on_open(seat, message), b""
                case Step():
                    return await self._on_step(seat, message, body)
                case Close():
                    return self._on_close(seat, message), b""
                case Ping():
                    return Pong(nonce=message.nonce), b""
        except (StreamClosed, FrameError):
            raise
        except Exception:  # a bug of ours: the peer has a right to an answer, and the other streams to go on
            logger.exception("answering peer %s, session %s, failed", seat.peer, seat.session_id)
            return refusal("internal", "This server failed; the fault is its own."), b""
        raise FrameError(f"A peer sent a {type(message).__name__}, an answer to no question.")

    def _on_open(self, seat: Seat, asked: Open) -> Opened | Error:
        if seat.engine is not None:
            return refusal("bad_request", "This stream carries a session already: close it first.")
        refused = refuse_open(asked, self._offer(seat.peer), self._limits)
        if refused is not None:
            if refused.code == "warming_up":
                self._cell.wake()
            return refused
        engine = self._cell.engine
        assert engine is not None, "a cell that serves holds an engine"
        try:
            held = engine.open_session(
                asked.session_id,
                Span(asked.start, asked.end),
                asked.max_tokens,
                client=seat.peer,
                page_keys=asked.page_keys,
                priority=asked.priority,
            )
        except NoCapacity as full:
            return refusal("no_capacity", full.message, full.retry_after)
        except StepError as error:
            return refusal("bad_request", error.message)
        terms = self._agree(asked, engine, held)
        seat.engine, seat.terms = engine, terms
        self._metrics.on_opened(asked, held)
        logger.debug(
            "peer %s opened session %s for %d tokens, %d held",
            seat.peer,
            asked.session_id,
            asked.max_tokens,
            held,
        )
        return Opened(
            session_id=asked.session_id,
            dtype=terms.dtype,
            codec=terms.codec,
            max_step_tokens=terms.max_step_tokens,
            held=held,
            takes_token_ids=terms.takes_token_ids,
            gives_token_ids=terms.gives_token_ids,
        )

    async def _on_step(self, seat: Seat, step: Step, body: memoryview) -> Answer:
        if seat.was_evicted:
            return refusal("unknown_session", EVICTED), b""
        refused = refuse_step(step, len(body), seat.terms, self._cell.phase)
        if refused is not None:
            return refused, b""
        assert seat.terms is not None
        seat.terms.length = step.seq_pos
        started = time.perf_counter()
        try:
            done = await self._run(seat, step, body)
        except NoCapacity as full:
            return refusal("no_capacity", full.message, full.retry_after), b""
        except StepError as error:
            return self._failed_step(seat, error), b""
        if done is None:
            return refusal("unknown_session", EVICTED), b""
        self._metrics.on_step(seat.peer, step, done, time.perf_counter() - started)
        seat.terms.length = step.seq_pos + step.shape[0]
        return _result(step, done), done.data

    async def _run(self, seat: Seat, step: Step, body: memoryview) -> StepOutcome | None:
        """What the engine gives for `step`; None if it was evicted meanwhile.

        Raises:
            NoCapacity, StepError: as the engine's step.
            StreamClosed, FrameError: the stream has ended meanwhile, and the step with it.
        """
        assert seat.engine is not None
        running = seat.engine.step(
            step.session_id,
            step.seq_pos,
            body,
            step.shape,
            step.dtype,
            step.codec,
            page_keys=step.page_keys,
            response_type=step.response_type,
        )
        try:
            return await seat.run(running)
        finally:
            seat.touch()

    def _failed_step(self, seat: Seat, error: StepError) -> Error:
        code = STEP_FAULTS.get(error.code, "internal")
        if code == "internal":
            logger.error("a step of peer %s, session %s, failed: %s", seat.peer, seat.session_id, error)
        return refusal(code, error.message)

    def _on_close(self, seat: Seat, asked: Close) -> Closed | Error:
        if seat.session_id != asked.session_id:
            return refusal("unknown_session", "This stream carries no such session.")
        self._free(seat)
        return Closed(session_id=asked.session_id)

    def _free(self, seat: Seat) -> None:
        if seat.engine is not None:
            self.last_ended_at = asyncio.get_running_loop().time()
        seat.free()

    def _offer(self, peer: PeerId) -> Offer:
        return Offer(
            model_id=self._model_id,
            span=self._cell.span,
            phase=self._cell.phase,
            loading_seconds=self._cell.retry_after(),
            sessions_of_peer=sum(seat.engine is not None and seat.peer == peer for seat in self._seats),
        )

    def _agree(self, asked: Open, engine: SpanEngine, held: int) -> Terms:
        return Terms(
            session_id=asked.session_id,
            max_tokens=asked.max_tokens,
            hidden_size=self._hidden_size,
            dtype=engine.precision.wire_dtype,
            codec=engine.precision.codec,
            max_step_tokens=engine.max_step_tokens,
            takes_token_ids=engine.takes_token_ids and asked.start == 0,
            gives_token_ids=engine.gives_token_ids and asked.end == self._cell.span.end,
            length=held,
        )

    async def _say_why(self, seat: Seat, fault: FrameError) -> None:
        """The reason for closing, if the stream can still carry it."""
        try:
            async with asyncio.timeout(self._limits.send):
                await seat.stream.send(messages.encode(refusal("bad_request", fault.message)))
        except (StreamClosed, TimeoutError) as error:
            logger.debug("peer %s was not told why its stream was closed: %s", seat.peer, error)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self._answering += 1
        self._quiet.clear()
        try:
            yield
        finally:
            self._answering -= 1
            if not self._answering:
                self._quiet.set()


def _result(step: Step, done: StepOutcome) -> Result:
    return Result(
        session_id=step.session_id,
        seq_pos=step.seq_pos,
        response_type=step.response_type,
        shape=done.shape,
        dtype=done.dtype,
        codec=done.codec,
        queue_ms=done.queue_ms,
        compute_ms=done.compute_ms,
    )
