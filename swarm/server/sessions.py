"""The streams that other peers open to this server, and the session that each of them may carry.

Owns who may say what on a stream, from its opening to its end; however it ends, the session's KV memory is
freed. What may be asked is decided in `admission`, what becomes of steps in `hosted`, what is computed by the
engine in the shard cell. Must not know of announcements or of this process's life.
"""

import asyncio
import logging
import os
from collections.abc import Iterator
from functools import partial

from swarm.allowance import Allowance
from swarm.blocks.errors import NoCapacity, StepError
from swarm.net.calls import MessageStream
from swarm.net.identity import Identity
from swarm.net.messages import (
    MAX_PROBE_BYTES,
    Adopt,
    Adopted,
    AnyMessage,
    Close,
    Closed,
    DialBack,
    Error,
    Fed,
    Feed,
    HandOver,
    Leaving,
    Link,
    Mirror,
    Observe,
    Open,
    Opened,
    Ping,
    Pong,
    Probe,
    Probed,
    Step,
    Unfed,
)
from swarm.net.transport import FrameError, PeerId, Stream, StreamClosed, Transport
from swarm.server.admission import Limits, Offer, Terms, refusal, refuse_open
from swarm.server.cell import ShardCell
from swarm.server.copying import Pace
from swarm.server.giving_way import (
    STANDBY_RETRY,
    end_standbys,
    free_pages,
    make_room,
    refuse_standby,
    standbys_of,
    tokens_of,
)
from swarm.server.hand_over import MAX_PIECE_BYTES
from swarm.server.hosted import FAILED, Hosted
from swarm.server.metrics import Metrics
from swarm.server.probes import Probes
from swarm.server.seat import Seat
from swarm.server.span_engine import SpanEngine
from swarm.server.vouching import Form, Vouching
from swarm.server.witness import Witness
from swarm.spans import Span

logger = logging.getLogger(__name__)

UNKNOWN = "This stream carries no such session: open it first."

WAYS_PER_SECOND, WAYS_AT_ONCE = 2.0, 128
"""How often one client may have this server dial others: all its sessions may move and go on at once."""

LAST_WORDS = 1.0
"""Seconds for what was said last to leave, before a server that drains ends its streams."""


class Sessions:
    """Serves the shard cell of one model's span to whoever opens a stream."""

    def __init__(
        self,
        model_id: str,
        hidden_size: int,
        cell: ShardCell,
        transport: Transport,
        limits: Limits | None = None,
        metrics: Metrics | None = None,
        witness: Witness | None = None,
        identity: Identity | None = None,
        pace: Pace | None = None,
    ):
        """What is given is vouched for by `identity`, that of this peer, where a client asks for it.

        What sessions hold is copied to standbys at that `pace`.
        """
        self._model_id = model_id
        self._hidden_size = hidden_size
        self._cell = cell
        self._transport = transport
        self._limits = limits or Limits()
        self._metrics = metrics or Metrics(cell)
        self._witness = witness or Witness(transport)
        self._ways = Allowance(WAYS_PER_SECOND, WAYS_AT_ONCE)
        self._probes = Probes()
        self._identity = identity
        self._pace = pace or Pace()
        self._seats: set[Seat] = set()
        self.last_ended_at = 0.0  # in the loop's time; 0 if no session has ended yet
        self._changed = asyncio.Event()

    @property
    def count(self) -> int:
        """How many sessions are open, standbys apart."""
        return len(self._on(None))

    @property
    def tokens_left(self) -> int:
        """Tokens of KV memory that are promised to nobody, or to standbys, which give way."""
        engine = self._cell.engine
        if engine is None:
            return 0
        return engine.kv_tokens_left + sum(tokens_of(standbys_of(self._seats, engine)))

    async def on_stream(self, stream: Stream) -> None:
        """Answer every message of `stream` until it ends, falls idle, or breaks a rule of framing."""
        seat = Seat(stream, self._limits.send)
        self._seats.add(seat)
        try:
            await self._converse(seat)
        except TimeoutError:
            logger.info("closed an idle stream of peer %s, session %s", seat.peer, seat.session_id)
        except FrameError as fault:
            logger.info("closed a stream of peer %s, session %s: %s", seat.peer, seat.session_id, fault)
            await self._free(seat)
            seat.outbox.put(refusal("bad_request", fault.message))
            await seat.outbox.flush()
        finally:
            self._seats.discard(seat)
            await self._free(seat)
            await seat.outbox.close()

    def evict(self, engine: SpanEngine | None = None) -> None:
        """End every session, or those that run on `engine`.

        The streams stay: who steps on is told so, and may open a session again.
        """
        for hosted in self._on(engine):
            hosted.evict()
        end_standbys(standbys_of(self._seats, engine))

    async def drain(self, grace: float, patience: float) -> None:
        """Let the clients take their sessions elsewhere, then end every stream.

        That may take `grace` seconds, as long as every `patience` seconds something comes of it: one of them
        has moved, or goes on here meanwhile.
        """
        await self._let_go(None, grace, patience)
        await self._flush()
        for seat in self._seats:
            seat.stream.close()

    async def leave(self, engine: SpanEngine, grace: float, patience: float) -> None:
        """Let the clients take elsewhere the sessions that run on `engine`, then end those; as `drain`."""
        await self._let_go(engine, grace, patience)
        self.evict(engine)

    def demands(self) -> list[tuple[Span, int]]:
        """Of each open session that is no standby, its blocks and the tokens that it was promised."""
        return [(hosted.terms.span, hosted.terms.max_tokens) for hosted in self._on(None)]

    async def _let_go(self, engine: SpanEngine | None, grace: float, patience: float) -> None:
        clock = asyncio.get_running_loop().time
        for seat in self._seats:
            if seat.hosted is not None and (engine is None or seat.hosted.engine is engine):
                seat.outbox.put(Leaving(session_id=seat.session_id))
        deadline, moved_at = clock() + grace, clock()
        while (before := self._taken(engine)) and clock() < min(deadline, moved_at + patience):
            self._changed.clear()
            try:
                async with asyncio.timeout_at(min(deadline, moved_at + patience)):
                    await self._changed.wait()
            except TimeoutError:
                pass
            if self._taken(engine) != before or any(one.is_handing_over for one in self._on(engine)):
                moved_at = clock()
        if left := len(self._on(engine)):
            logger.warning("%d sessions were not taken elsewhere in time", left)

    async def _flush(self) -> None:
        """Let what was said last leave."""
        flushing = [asyncio.create_task(seat.outbox.flush()) for seat in self._seats]
        if flushing:
            _, late = await asyncio.wait(flushing, timeout=LAST_WORDS)
            for one in late:
                one.cancel()

    def _hosted(self) -> Iterator[Hosted]:
        return (seat.hosted for seat in tuple(self._seats) if seat.hosted is not None)

    def _on(self, engine: SpanEngine | None) -> list[Hosted]:
        """The open sessions that are no standbys, or those of them that run on `engine`."""
        return [
            hosted
            for hosted in self._hosted()
            if hosted.engine is not None
            and not hosted.terms.is_standby
            and (engine is None or hosted.engine is engine)
        ]

    def _taken(self, engine: SpanEngine | None) -> list[int]:
        """Of each such session, the newest step that was taken up."""
        return [hosted.taken for hosted in self._on(engine)]

    async def _converse(self, seat: Seat) -> None:
        while True:
            await seat.outbox.wait_for_room()
            message, body = await seat.receive(self._limits.idle)
            if isinstance(message, Feed):
                await self._be_fed(seat, message)
                return
            answer = await self._answer(seat, message, body)
            del body
            if isinstance(answer, Error):
                self._metrics.on_refused(message, answer.code)
            if answer is not None:
                seat.outbox.put(answer)

    async def _answer(self, seat: Seat, message: AnyMessage, body: memoryview) -> AnyMessage | None:
        """What to answer at once; None where the session answers in its time."""
        try:
            match message:
                case Ping():
                    return Pong(nonce=message.nonce, taken=seat.hosted.taken if seat.hosted else 0)
                case Observe():
                    return await self._witness.observe(seat.peer, message)
                case DialBack():
                    return await self._witness.dial_back(seat.peer, message)
                case Probe():
                    return self._on_probe(seat, message)
                case Open():
                    return await self._on_open(seat, message)
                case Close():
                    return await self._on_close(seat, message)
                case Step() | HandOver() | Link() | Mirror():
                    return await self._on_session(seat, message, body)
        except (StreamClosed, FrameError):
            raise
        except Exception:  # a bug of ours: the peer has a right to an answer, and the other streams to go on
            logger.exception("answering peer %s, session %s, failed", seat.peer, seat.session_id)
            return refusal("internal", FAILED)
        raise FrameError(f"A peer sent a {type(message).__name__}, an answer to no question.")

    async def _on_session(
        self, seat: Seat, asked: Step | HandOver | Link | Mirror, body: memoryview
    ) -> Error | None:
        hosted = seat.hosted
        if hosted is None or hosted.terms.session_id != asked.session_id:
            number = asked.number if isinstance(asked, Step) else None
            return Error(code="unknown_session", message=UNKNOWN, number=number)
        if isinstance(asked, Link | HandOver | Mirror):
            wait = self._ways.take(seat.peer, asyncio.get_running_loop().time())
            if wait:
                return refusal("no_capacity", "You have this server go to others too often.", wait)
        if isinstance(asked, Link):
            hosted.link(asked)
        elif isinstance(asked, Mirror):
            others = (one for one in self._hosted() if one is not hosted)
            if sum(one.copies_to == asked.peer for one in others) >= self._limits.copies_per_peer:
                return refusal("no_capacity", "Enough sessions are copied to that peer.", STANDBY_RETRY)
            hosted.mirror(asked, self._pace)
        else:
            await hosted.take(asked, body)
        return None

    async def _on_open(self, seat: Seat, asked: Open) -> Opened | Error:
        if seat.hosted is not None and seat.hosted.engine is not None:
            return refusal("bad_request", "This stream carries a session already: close it first.")
        refused = refuse_open(asked, self._offer(seat.peer), self._limits)
        if refused is not None:
            if refused.code == "warming_up":
                self._cell.wake()
            return refused
        engine = self._cell.engine
        assert engine is not None, "a cell that serves holds an engine"
        if asked.standby:
            if (refused := refuse_standby(asked.max_tokens, engine)) is not None:
                return refused
        else:
            make_room(self._seats, engine, asked.max_tokens)
        try:
            held = engine.open_session(
                asked.session_id,
                Span(asked.start, asked.end),
                asked.max_tokens,
                client=seat.peer,
                page_keys=asked.page_keys,
                priority=asked.priority,
                wire=asked.wire,
            )
        except NoCapacity as full:
            return refusal("no_capacity", full.message, full.retry_after)
        except StepError as error:
            return refusal("bad_request", error.message)
        terms = self._agree(asked, engine, held)
        vouching = self._vouching(asked, terms)
        evicted, seat.hosted = (
            seat.hosted,
            Hosted(
                seat.peer,
                terms,
                engine,
                seat.outbox,
                self._transport,
                self._metrics,
                seat.touch,
                vouching,
                partial(free_pages, self._seats),
            ),
        )
        if evicted is not None:
            await evicted.close()
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
            vouches=vouching is not None,
            mirrors=engine.can_hand_over,
            goes_round=True,
            samples=terms.gives_token_ids,
        )

    def _on_probe(self, seat: Seat, asked: Probe) -> Error | None:
        """Answer a peer that measures the way here, within what it is allowed."""
        if seat.hosted is not None:
            return refusal("bad_request", "This stream carries a session: measure the way on another one.")
        if not seat.probing:
            if wait := self._probes.take(seat.peer, asyncio.get_running_loop().time()):
                return refusal("no_capacity", "The way here was measured often enough for now.", wait)
            seat.probing = MAX_PROBE_BYTES
        moved = asked.size + asked.back
        if moved > seat.probing:
            return refusal("bad_request", f"You may move {seat.probing} bytes more to measure the way here.")
        seat.probing -= moved
        answer = Probed(nonce=asked.nonce, size=asked.back, allowed=seat.probing)
        seat.outbox.put(answer, os.urandom(asked.back))
        return None

    async def _on_close(self, seat: Seat, asked: Close) -> Closed | Error:
        if seat.session_id != asked.session_id:
            return refusal("unknown_session", UNKNOWN)
        voucher = seat.hosted.last_voucher() if seat.hosted else None
        await self._free(seat)
        return Closed(session_id=asked.session_id, voucher=voucher)

    async def _be_fed(self, seat: Seat, asked: Feed) -> None:
        """Take a session's steps, or its KV memory, from another server until the stream ends."""
        if seat.hosted is not None:
            raise FrameError("A peer fed a session over a stream that carries one.")
        fed = self._seat_of(asked.session_id)
        if fed is None or fed.hosted is None:
            self._metrics.on_refused(asked, "unknown_session")
            seat.outbox.put(refusal("unknown_session", "There is no such session here to be fed."))
            await seat.outbox.flush()
            return
        hosted = fed.hosted
        hosted.feed_from(seat.stream)
        seat.outbox.put(Fed(session_id=asked.session_id))
        calls = MessageStream(seat.stream)

        def takes(message: AnyMessage, body: memoryview) -> bool:
            seat.touch()
            if hosted.terms.is_standby or not isinstance(message, Step):
                return False
            return message.session_id == asked.session_id and hosted.takes(message, body, is_fed=True)

        try:
            while True:
                await seat.outbox.wait_for_room()
                idle = None if hosted.terms.is_standby else self._limits.idle  # that ends with the session
                receiving = calls.receive(max(hosted.terms.body_limit, MAX_PIECE_BYTES), takes)
                message, body = await seat.unless_idle(idle, receiving)
                seat.touch()
                match message:
                    case Step() if message.session_id == asked.session_id:
                        await hosted.take(message, body, is_fed=True)
                    case Adopt() if message.session_id == asked.session_id:
                        seat.outbox.put(await self._on_adopt(hosted, message, body))
                    case _:
                        raise FrameError(f"A peer fed a session with a {type(message).__name__} not its own.")
                del body
        finally:
            if hosted.is_fed_by(seat.stream):
                hosted.feed_from(None)
                fed.outbox.put(Unfed(session_id=asked.session_id))

    async def _on_adopt(self, hosted: Hosted, piece: Adopt, data: memoryview) -> Adopted | Error:
        try:
            await hosted.adopt(piece, data)
        except NoCapacity as full:
            refused = refusal("no_capacity", full.message, full.retry_after)
        except StepError as error:
            refused = refusal("bad_request", error.message)
        except Exception:  # a bug of ours: the peer has a right to an answer
            logger.exception("adopting session %s from elsewhere failed", piece.session_id)
            refused = refusal("internal", FAILED)
        else:
            return Adopted(session_id=piece.session_id)
        self._metrics.on_refused(piece, refused.code)
        return refused

    async def _free(self, seat: Seat) -> None:
        if seat.hosted is not None:
            if not seat.hosted.terms.is_standby:
                self.last_ended_at = asyncio.get_running_loop().time()
            await seat.free()
            self._changed.set()

    def _seat_of(self, session_id: str) -> Seat | None:
        """The stream that carries that session, while it is open."""
        open_ones = (
            seat for seat in self._seats if seat.hosted is not None and seat.hosted.engine is not None
        )
        return next((seat for seat in open_ones if seat.session_id == session_id), None)

    def _vouching(self, asked: Open, terms: Terms) -> Vouching | None:
        if self._identity is None or not asked.vouch:
            return None
        form = Form(self._model_id, self._cell.dtype, self._cell.quantization)
        return Vouching(self._identity, form, terms, asked.page_keys)

    def _offer(self, peer: PeerId) -> Offer:
        own = [hosted for hosted in self._hosted() if hosted.engine is not None and hosted.client == peer]
        standbys = sum(hosted.terms.is_standby for hosted in own)
        return Offer(
            model_id=self._model_id,
            span=self._cell.span,
            left=self._cell.left,
            phase=self._cell.phase,
            loading_seconds=self._cell.retry_after(),
            sessions_of_peer=len(own) - standbys,
            standbys_of_peer=standbys,
        )

    def _agree(self, asked: Open, engine: SpanEngine, held: int) -> Terms:
        form = engine.wire_form(asked.wire)
        return Terms(
            session_id=asked.session_id,
            span=Span(asked.start, asked.end),
            max_tokens=asked.max_tokens,
            hidden_size=self._hidden_size,
            dtype=form.wire_dtype,
            codec=form.codec,
            max_step_tokens=engine.max_step_tokens,
            takes_token_ids=engine.takes_token_ids and asked.start == 0,
            gives_token_ids=engine.gives_token_ids and asked.end == self._cell.span.end,
            is_standby=asked.standby,
            length=held,
        )
