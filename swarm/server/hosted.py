"""One session on this server: the steps that wait for it, the one that runs, and where its results go.

Steps run one after the other, in the order they came, whoever brought them; each gets exactly one ending on
the client's stream. Owns what was agreed on with the client, and the session's place in the engine. Reading
from streams is not its business.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from swarm.baton import Bell
from swarm.blocks.errors import NoCapacity, StepError
from swarm.errors import SwarmError
from swarm.net import messages
from swarm.net.messages import (
    Adopt,
    Error,
    HandedOver,
    HandOver,
    Held,
    Link,
    Linked,
    Mirror,
    Mirrored,
    Result,
    Step,
    printable,
)
from swarm.net.outbox import Outbox
from swarm.net.transport import FrameError, PeerId, Stream, StreamClosed, Transport
from swarm.server.admission import Terms, refusal, refuse_step
from swarm.server.copying import Copying, Pace, Progress
from swarm.server.hand_over import hand_over
from swarm.server.metrics import Metrics
from swarm.server.onward import Onward, going_on
from swarm.server.span_engine import SpanEngine, StepOutcome
from swarm.server.vouching import INLINE_BYTES, Vouching

logger = logging.getLogger(__name__)

MAX_WAITING = 64
MAX_WAITING_BYTES = 16 * 1024 * 1024
"""Requests that may wait for their turn, and bytes of bodies above which no more are read."""

STEP_FAULTS: dict[str, messages.ErrorCode] = {
    "bad_request": "bad_request",
    "no_capacity": "no_capacity",
    "unknown_session": "unknown_session",
}
"""What an engine may say of a step, as the wire says it; anything else is our own fault."""

EVICTED = "This server has let its blocks go, and this session with them: open it again."
FAILED = "This server failed; the fault is its own."


class Waiting(NamedTuple):
    """Something to do for the session, in its turn. `is_fed`: the hop before brought it, not the client."""

    asked: Step | HandOver
    body: memoryview
    is_fed: bool
    came_at: float


class Hosted:
    """A session of `client`, which is told what becomes of its steps through `outbox`.

    `on_used` is called whenever something was done for it. `engine` is None once it was evicted. What it
    gives is vouched for by `vouching`, if that was asked for. `make_room` lets a standby go that takes memory
    which a step needs, and tells whether there was one.
    """

    def __init__(
        self,
        client: PeerId,
        terms: Terms,
        engine: SpanEngine,
        outbox: Outbox,
        transport: Transport,
        metrics: Metrics,
        on_used: Callable[[], None],
        vouching: Vouching | None = None,
        make_room: Callable[[SpanEngine], bool] = lambda engine: False,
    ):
        self.client = client
        self.terms = terms
        self.engine: SpanEngine | None = engine
        self.is_handing_over = False
        self._outbox = outbox
        self._transport = transport
        self._metrics = metrics
        self._on_used = on_used
        self._vouching = vouching
        self._make_room = make_room
        self._is_closed = False
        self._turn = asyncio.Lock()  # held by what works on the session in the engine
        self._waiting: deque[Waiting] = deque()
        self._bytes = 0
        self._came = Bell()
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._taken = 0
        self._feeder: Stream | None = None
        self._onward: Onward | None = None
        self._linking: asyncio.Task[None] | None = None
        self.copies_to: str | None = None  # the peer of its standby
        self._copying: Copying | None = None
        self._mirroring: asyncio.Task[None] | None = None
        self._working = asyncio.create_task(self._work(), name=f"session {terms.session_id}")

    @property
    def is_busy(self) -> bool:
        """Whether something is done for it, or waits to be."""
        return bool(self._waiting)

    @property
    def taken(self) -> int:
        """The number of the newest step that was taken up."""
        return max([self._taken, *(one.asked.number for one in self._waiting if isinstance(one.asked, Step))])

    def takes(self, asked: Step | HandOver, body: memoryview, *, is_fed: bool = False) -> bool:
        """Let it have its turn, if it need not wait for that to be possible; whether it has."""
        if self._is_closed or not self._has_room.is_set() or len(self._waiting) >= MAX_WAITING:
            return False
        if self.terms.is_standby:
            self.terms.is_standby = False
            if not is_fed:
                self.feed_from(None)  # it is copied to no more
        self._waiting.append(Waiting(asked, body, is_fed, time.perf_counter()))
        self._count_bytes(len(body))
        self._on_used()
        self._came.set()
        return True

    async def take(self, asked: Step | HandOver, body: memoryview, *, is_fed: bool = False) -> None:
        """Let it have its turn, once there is room for it to wait.

        Raises:
            FrameError: the peer sends on and on without waiting for answers.
            StreamClosed: the session has ended.
        """
        await self._has_room.wait()
        if self._is_closed:
            raise StreamClosed("The session has ended.")
        if not self.takes(asked, body, is_fed=is_fed):
            raise FrameError(f"A peer sent more than {MAX_WAITING} steps without waiting for answers.")

    def link(self, asked: Link) -> None:
        """Connect to the next hop, in the background, and tell the client once steps can go on there."""
        if self._linking is not None:
            self._linking.cancel()
        self._linking = asyncio.create_task(self._link(asked), name=f"link {self.terms.session_id}")

    def mirror(self, asked: Mirror, pace: Pace) -> None:
        """Copy what it holds to its standby, in the background, and tell the client once that begins."""
        if self._mirroring is not None:
            self._mirroring.cancel()
        self.copies_to = asked.peer
        self._mirroring = asyncio.create_task(
            self._mirror(asked, pace), name=f"mirror {self.terms.session_id}"
        )

    def feed_from(self, stream: Stream | None) -> None:
        """Take steps from `stream` from now on, and from no other any more."""
        before, self._feeder = self._feeder, stream
        if before is not None:
            before.close()

    def is_fed_by(self, stream: Stream) -> bool:
        return self._feeder is stream

    async def adopt(self, piece: Adopt, data: memoryview) -> None:
        """Hold what another server held of the session. A standby tells its client how far it is.

        Raises:
            StepError, NoCapacity: as `SpanEngine.import_kv`.
        """
        engine = self.engine
        if engine is None or self._waiting:
            raise StepError("bad_request", "This session cannot take anything over now.")
        if not self.terms.is_standby:
            self._feeder = None  # that stream brings no steps: its end will mean nothing
        async with self._turn:
            if self._vouching is not None:
                self._vouching.stop()
            if self.terms.is_standby and piece.first < self.terms.length:
                engine.rewind(self.terms.session_id, piece.first)
                self.terms.length = piece.first
            await engine.import_kv(self.terms.session_id, piece.first, piece.end, data)
            self.terms.length = piece.end
        if self.terms.is_standby:
            said = Held(session_id=self.terms.session_id, tokens=piece.end, taken=piece.taken)
            self._outbox.put(said)
        self._on_used()

    def last_voucher(self) -> bytes | None:
        """For what the session gave that no other voucher is for, if there is anything."""
        return None if self._vouching is None or self.is_busy else self._vouching.last()

    def evict(self) -> None:
        """End the session in the engine; whatever waits or comes for it is told so."""
        if self._mirroring is not None:
            self._mirroring.cancel()
        if self.engine is not None:
            self.engine.close_session(self.terms.session_id)
            self.engine = None

    async def close(self) -> None:
        """End the session at once, and wait for what it did; nothing is said any more."""
        self._is_closed = True
        tasks = [task for task in (self._working, self._linking, self._mirroring) if task is not None]
        for task in tasks:
            task.cancel()
        self.evict()
        self.feed_from(None)
        self._has_room.set()
        if self._onward is not None:
            self._onward.end()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._onward is not None:
            await self._onward.close()

    async def _work(self) -> None:
        while True:
            while not self._waiting:
                self._came.clear()
                await self._came.wait()
            one = self._waiting[0]
            try:
                async with self._turn:
                    await self._do(one)
            finally:
                self._waiting.popleft()
                self._count_bytes(-len(one.body))
                self._on_used()
            await self._outbox.wait_for_room()

    async def _do(self, one: Waiting) -> None:
        try:
            if isinstance(one.asked, Step):
                await self._on_step(one.asked, one)
            else:
                await self._on_hand_over(one.asked)
        except Exception:  # a bug of ours: the peer has a right to an answer, and the other sessions to go on
            logger.exception("session %s of peer %s failed", self.terms.session_id, self.client)
            self._refuse(one.asked, refusal("internal", FAILED))

    async def _on_step(self, step: Step, one: Waiting) -> None:
        if step.number <= self._taken or (one.is_fed and step.seq_pos > self.terms.length):
            return  # it came twice, or after one that was lost, which the client will bring again
        self._taken = step.number
        refused = self._refusal_of(step, len(one.body))
        if refused is None:
            self.terms.length = step.seq_pos
            if self._copying is not None:
                self._copying.cut(step.seq_pos)
            if self._vouching is not None:
                self._vouching.cut(step.seq_pos)
            try:
                done = await self._run_in_room(step, one.body)
            except NoCapacity as full:
                refused = refusal("no_capacity", full.message, full.retry_after)
            except StepError as error:
                refused = self._failed(error)
        if refused is not None:
            self._refuse(step, refused)
            return
        seconds = time.perf_counter() - one.came_at
        self.terms.length = step.seq_pos + step.shape[0]
        if self._copying is not None:
            self._copying.has_grown()
        is_pushed = self._push(step, done)
        self._tell(step, done, is_pushed, await self._vouch(step, one.body, done))
        self._metrics.on_step(self.client, step, done, seconds)

    def _refusal_of(self, step: Step, body: int) -> Error | None:
        if self.engine is None:
            return refusal("unknown_session", EVICTED)
        return refuse_step(step, body, self.terms)

    async def _run_in_room(self, step: Step, body: memoryview) -> StepOutcome:
        """Run the step, for which standbys give way if they must."""
        while True:
            try:
                return await self._run(step, body)
            except NoCapacity:
                if self.engine is None or not self._make_room(self.engine):
                    raise

    async def _run(self, step: Step, body: memoryview) -> StepOutcome:
        assert self.engine is not None
        return await self.engine.step(
            step.session_id,
            step.seq_pos,
            body,
            step.shape,
            step.dtype,
            step.codec,
            page_keys=step.page_keys,
            response_type=step.response_type,
            rows=step.rows,
            sampling=step.sampling if self.terms.samples(step) else None,
        )

    def _push(self, step: Step, done: StepOutcome) -> bool:
        """Pass the result on, if it is to go on and can; whether it does."""
        if (asked := going_on(step, done)) is None:
            return False
        onward, body = asked
        if onward.session_id == step.session_id:  # this hop runs all blocks
            return self.takes(onward, body, is_fed=True)
        if self._onward is not None and self._onward.leads_to(onward):
            self._onward.push(onward, body)
            return True
        return False

    async def _vouch(self, step: Step, body: memoryview, done: StepOutcome) -> tuple[bytes, ...]:
        if self._vouching is None:
            return ()
        if len(body) + len(done.data) <= INLINE_BYTES:
            return self._vouching.on_step(step, body, done)
        return await asyncio.to_thread(self._vouching.on_step, step, body, done)

    def _tell(self, step: Step, done: StepOutcome, is_pushed: bool, vouchers: tuple[bytes, ...]) -> None:
        result = Result(
            session_id=step.session_id,
            number=step.number,
            seq_pos=step.seq_pos,
            response_type=step.response_type,
            shape=done.shape,
            dtype=done.dtype,
            codec=done.codec,
            queue_ms=done.queue_ms,
            compute_ms=done.compute_ms,
            pushed=is_pushed,
            token=done.token,
            vouchers=vouchers,
        )
        self._outbox.put(result, done.data)

    def _failed(self, error: StepError) -> Error:
        if self.engine is None:
            return refusal("unknown_session", EVICTED)
        code = STEP_FAULTS.get(error.code, "internal")
        if code == "internal":
            logger.error(
                "a step of peer %s, session %s, failed: %s", self.client, self.terms.session_id, error
            )
        return refusal(code, error.message)

    def _refuse(self, asked: Step | HandOver | Link | Mirror, error: Error) -> None:
        self._metrics.on_refused(asked, error.code)
        self._outbox.put(about(asked, error) if isinstance(asked, Step) else error)

    async def _link(self, asked: Link) -> None:
        if self._onward is not None:
            onward, self._onward = self._onward, None
            await onward.close()
        try:
            gives = self.terms.gives_token_ids
            self._onward = await Onward.connect(self._transport, asked, gives_token_ids=gives)
        except SwarmError as error:
            peer, reason = printable(asked.peer), printable(str(error))
            logger.info("session %s cannot go on to peer %s: %s", asked.session_id, peer, reason)
            self._refuse(asked, refusal("bad_request", f"Peer {peer} cannot be fed."))
        except Exception:  # a bug of ours: nobody awaits this task, but the peer does its answer
            logger.exception("linking session %s of peer %s failed", asked.session_id, self.client)
            self._refuse(asked, refusal("internal", FAILED))
        else:
            self._outbox.put(Linked(session_id=asked.session_id))

    async def _mirror(self, asked: Mirror, pace: Pace) -> None:
        engine = self.engine
        copying: Copying | None = None
        try:
            if engine is None or not engine.can_hand_over:
                self._refuse(asked, refusal("bad_request", "This session cannot be copied."))
                return
            copying = self._copying = await Copying.connect(self._transport, engine, asked, pace)
            self._outbox.put(Mirrored(session_id=asked.session_id))
            await copying.run(lambda: Progress(self.terms.length, self._taken))
        except SwarmError as error:
            peer, reason = printable(asked.peer), printable(str(error))
            logger.info("session %s is not copied to peer %s: %s", asked.session_id, peer, reason)
            if copying is None:
                self._refuse(asked, refusal("bad_request", f"Peer {peer} cannot be fed."))
        except Exception:  # a bug of ours: nobody awaits this task, but the peer does its answer
            logger.exception("copying session %s of peer %s failed", asked.session_id, self.client)
            if copying is None:
                self._refuse(asked, refusal("internal", FAILED))
        finally:
            if copying is not None:
                copying.close()
            if self._mirroring is asyncio.current_task():
                self._copying = self.copies_to = None

    async def _on_hand_over(self, asked: HandOver) -> None:
        if self.engine is None or not self.engine.can_hand_over:
            self._refuse(asked, refusal("bad_request", "This session cannot be handed over: replay it."))
            return
        self.is_handing_over = True
        tokens = self.terms.length
        try:
            await hand_over(self._transport, self.engine, asked.session_id, tokens, asked)
        except (SwarmError, TimeoutError) as error:
            peer = printable(asked.peer)
            logger.info("session %s was not handed over to peer %s: %r", asked.session_id, peer, error)
            self._refuse(asked, refusal("bad_request", f"Peer {peer} did not take the session."))
        else:
            self._outbox.put(HandedOver(session_id=asked.session_id, tokens=tokens))
        finally:
            self.is_handing_over = False

    def _count_bytes(self, change: int) -> None:
        self._bytes += change
        if self._bytes > MAX_WAITING_BYTES and not self._is_closed:
            self._has_room.clear()
        else:
            self._has_room.set()


def about(step: Step, error: Error) -> Error:
    """`error` as the ending of `step`."""
    return Error(code=error.code, message=error.message, retry_after=error.retry_after, number=step.number)
