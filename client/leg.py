"""One hop of a session: what was agreed on with it, how far it is, and the steps it has yet to answer.

Owns what the hop holds of the sequence and where its time went; checks whatever it answers, and tells its
owner at once. Must not know of the other hops, nor why a step is made.
"""

import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from swarm.client.copied import Copied
from swarm.client.faults import HopError, RemoteFault, RequestRefused, refusal
from swarm.client.hop_stream import Deadlines, HopStream
from swarm.client.inputs import Wired
from swarm.client.page_chain import PageChain
from swarm.client.route import Hop
from swarm.client.suspicion import DECODE_TOKENS, ResponseTimes
from swarm.client.testimony import Testimony
from swarm.kernels.codecs import is_finite
from swarm.net.forms import Codec, Dtype, Wire, tensor_bytes
from swarm.net.messages import (
    AnyMessage,
    Error,
    HandedOver,
    HandOver,
    Held,
    Leaving,
    Link,
    Linked,
    Mirror,
    Mirrored,
    Open,
    Opened,
    ResponseType,
    Result,
    Step,
    Unfed,
)
from swarm.net.transport import PeerId, Transport
from swarm.page_keys import KEY_BYTES, PAGE_TOKENS

logger = logging.getLogger(__name__)

MAX_CHUNK = 4096
"""Tokens that a step has at most, whatever a hop would take."""


@dataclass
class HopTimes:
    """Milliseconds a hop took, summed over steps: on the network, in its queue, computing.

    Of a single step the first may be negative: who is pushed it may answer before the client has heard that.
    """

    steps: int = 0
    rtt_ms: float = 0.0
    queue_ms: float = 0.0
    compute_ms: float = 0.0

    def add(self, elapsed_ms: float, result: Result) -> None:
        self.steps += 1
        self.rtt_ms += elapsed_ms - result.queue_ms - result.compute_ms
        self.queue_ms += result.queue_ms
        self.compute_ms += result.compute_ms

    def mean(self) -> "HopTimes":
        steps = max(self.steps, 1)
        rtt_ms = max(0.0, self.rtt_ms / steps)
        return HopTimes(self.steps, rtt_ms, self.queue_ms / steps, self.compute_ms / steps)


@dataclass(frozen=True, slots=True)
class Asked:
    """What a session asks of every hop at its opening: room for `max_tokens`, and what it begins with.

    `tokens` are None where the sequence is given as hidden states, of which nobody knows the tokens. `wire`
    is how activations are to travel. Hops are to `vouch` for what they give; if the session is `audited`, it
    is kept what that was.
    """

    model_id: str
    hidden_size: int
    vocab_size: int
    max_tokens: int
    tokens: Sequence[int] | None
    wire: Wire = "exact"
    vouch: bool = False
    audited: bool = False


@dataclass(eq=False, slots=True)
class Pending:
    """A step of positions `[start, end)` that the hop has not answered yet.

    Of the answer, what lies from `valid_end` on is not wanted any more. `is_pushed` if the hop before brings
    it; `since` is when the hop can have begun, None while that is unknown. `step` may be sent again as it is.
    """

    step: Step
    start: int
    end: int
    valid_end: int
    is_pushed: bool
    since: float | None

    @classmethod
    def of(cls, step: Step, *, is_pushed: bool) -> Self:
        start, end = step.seq_pos, step.seq_pos + step.shape[0]
        return cls(step, start, end, end, is_pushed, None)

    @property
    def number(self) -> int:
        return self.step.number

    @property
    def tokens(self) -> int:
        return self.end - self.start


class Listener(Protocol):
    """Who is told what a leg hears, in the order it came."""

    def on_result(
        self, leg: "Leg", answered: Pending, result: Wired, pushed: bool, token: int | None
    ) -> None:
        """What comes of it, the next step above all, goes out before this returns.

        `token` is what it told last, or sampled.
        """
        ...

    def on_refused(self, leg: "Leg", refused: Pending, fault: HopError) -> None: ...

    def on_times(self, leg: "Leg", tokens: int, queue_ms: float, compute_ms: float) -> None: ...

    def on_news(self, leg: "Leg") -> None:
        """The leg's `fault`, `is_leaving` or `is_unfed` has changed."""
        ...

    def on_bug(self, bug: Exception) -> None:
        """Hearing something failed here; no hop is to blame."""
        ...


class Leg:
    """This session's part at one hop. `opened` is what was agreed on.

    The hop holds the session's first `length` tokens, and will hold `sent` once it has answered all. Once
    there is a `fault` it is of no use any more. `onward` is the leg whose hop it passes steps to, `linking`
    the one with which that is being tried. Where the hop `is_leaving`, another is not looked for before
    `move_at`. Steps are not to be sent before `resume_at`, since the hop has had no room for them since
    `busy_since`. A hop without a `chain` is told no keys of pages. What it gave to an audited session is its
    `testimony`. What it holds may have come from the peers `given_by`. Where it is copied to a standby, both
    know how far that is by `copied`.
    """

    def __init__(self, hop: Hop, chain: PageChain | None, deadlines: Deadlines, clock: Callable[[], float]):
        self.hop = hop
        self.chain = chain
        self.deadlines = deadlines
        self.prefill = HopTimes()
        self.decode = HopTimes()
        self.opened: Opened
        self.session_id = secrets.token_hex(16)
        self.length = self.sent = 0
        self.pending: dict[int, Pending] = {}
        self.fault: HopError | None = None
        self.is_leaving = False
        self.move_at = 0.0
        self.is_unfed = False
        self.onward: Leg | None = None
        self.linking: Leg | None = None
        self.resume_at = 0.0
        self.busy_since: float | None = None
        self.testimony: Testimony | None = None
        self.given_by: frozenset[PeerId] = frozenset()
        self.copied: Copied | None = None
        self._newest = 0
        self._clock = clock
        self._asked: Asked
        self._listener: Listener
        self._stream = HopStream(hop, deadlines, self._hear, self._on_end)
        self._response_times = ResponseTimes()
        self._last_answer = 0.0

    @property
    def block(self) -> int:
        """The first block that the hop runs."""
        return self.hop.span.start

    @property
    def has_answered(self) -> bool:
        """Whether the hop has done any step."""
        return bool(self.prefill.steps or self.decode.steps)

    @property
    def hidden_size(self) -> int:
        return self._asked.hidden_size

    @property
    def takes_token_ids(self) -> bool:
        return self.opened.takes_token_ids and self.block == 0 and self._asked.tokens is not None

    @property
    def max_chunk(self) -> int:
        return min(self.opened.max_step_tokens, MAX_CHUNK)

    async def open(
        self, transport: Transport, asked: Asked, listener: Listener, *, is_standby: bool = False
    ) -> None:
        """
        Raises:
            RemoteFault, NoCapacity, RequestRefused: see `swarm.client.faults`.
        """
        self._asked, self._listener = asked, listener
        if asked.tokens is None:
            self.chain = None
        keys = self.chain.asked(asked.tokens) if self.chain and asked.tokens else b""
        message = Open(
            session_id=self.session_id,
            model_id=asked.model_id,
            start=self.hop.span.start,
            end=self.hop.span.end,
            max_tokens=asked.max_tokens,
            page_keys=keys,
            wire=asked.wire,
            vouch=asked.vouch,
            standby=is_standby,
        )
        opened = await self._stream.open(transport, message)
        if opened.dtype == "uint32" or opened.session_id != self.session_id:
            raise RemoteFault(self.hop, "answered the opening of a session with something else")
        if opened.held > len(keys) // KEY_BYTES * PAGE_TOKENS:
            raise RemoteFault(self.hop, "says it holds more of a new session than it was asked for")
        if is_standby and not opened.mirrors:
            raise RequestRefused(self.hop, "knows no standbys")
        if asked.audited and opened.held and self.block:
            raise RemoteFault(self.hop, "says it holds what it was never brought")
        self.opened = opened
        if asked.audited:
            self.testimony = Testimony(self.hop, asked.model_id, self.session_id, opened)
        self.length = self.sent = opened.held
        self._stream.listen(tensor_bytes((self.max_chunk, asked.hidden_size), opened.dtype, opened.codec))

    def expect(self, pending: Pending) -> None:
        """The hop will be brought this step, and is to answer it."""
        self._cut(pending.start)
        self.pending[pending.number] = pending
        self.sent, self._newest = pending.end, pending.number
        if self.testimony is not None and pending.is_pushed:
            self.testimony.was_fed = True

    async def send(self, pending: Pending, body: bytes | memoryview) -> None:
        """Bring the step to the hop. A failure shows as `fault`."""
        pending.is_pushed = False
        pending.since = self._clock()
        try:
            await self._stream.send(pending.step, body)
        except HopError as fault:
            self.fail(fault)

    def rewind(self, length: int) -> None:
        """What the hop holds from position `length` on is not wanted any more."""
        self.length = min(self.length, length)
        self._cut(length)
        if self.testimony is not None:
            self.testimony.cut(length)
        for pending in self.pending.values():
            pending.valid_end = min(pending.valid_end, length)

    def give_up_from(self, number: int) -> None:
        """Expect no answers to steps of that number or a later one."""
        self.pending = {own: pending for own, pending in self.pending.items() if own < number}
        self._cut(max([self.length, *(pending.valid_end for pending in self.pending.values())]))

    def late_since(self) -> tuple[float, Pending] | None:
        """When the hop can have begun with the oldest step it owes an answer to; None if that is unknown."""
        oldest = next(iter(self.pending.values()), None)
        if oldest is None or oldest.since is None:
            return None
        return max(oldest.since, self._last_answer), oldest

    def patience(self, tokens: int) -> float:
        """Seconds that the hop may be silent with a step of so many tokens before it is to be asked."""
        rates = self.hop.announcement.throughput
        rate = rates.decode if tokens <= DECODE_TOKENS else rates.prefill / tokens
        return self._response_times.patience(tokens, self.hop.span.size / rate if rate else 0.0)

    async def has_taken(self, pending: Pending) -> bool:
        """Whether the hop has that step, by its own account.

        Raises:
            RemoteFault: it says nothing any more.
        """
        taken = await self._stream.ping()
        return taken is None or taken >= pending.number

    async def link(self, onward: "Leg") -> None:
        """Let the hop pass its results on to `onward`'s.

        Raises:
            HopError: it cannot; steps have to be brought there from here.
        """
        asked = Link(
            session_id=self.session_id,
            peer=onward.hop.peer,
            addresses=onward.hop.announcement.addresses,
            to_session=onward.session_id,
            dtype="uint32" if onward.takes_token_ids else onward.opened.dtype,
            codec="raw" if onward.takes_token_ids else onward.opened.codec,
        )
        await self._stream.ask(asked, Linked, self.deadlines.link)
        self.onward, onward.is_unfed = onward, False

    async def hand_over(self, target: "Leg") -> int:
        """Let the hop give what it holds to `target`'s, and return how many tokens that are.

        Raises:
            HopError: it cannot.
        """
        asked = HandOver(
            session_id=self.session_id,
            peer=target.hop.peer,
            addresses=target.hop.announcement.addresses,
            to_session=target.session_id,
        )
        answer = await self._stream.ask(asked, HandedOver, self.deadlines.hand_over)
        assert isinstance(answer, HandedOver)
        return answer.tokens

    async def mirror(self, standby: "Leg") -> None:
        """Let the hop copy what it holds to `standby`'s from now on.

        Raises:
            HopError: it cannot.
        """
        self.copied = standby.copied = Copied(self._newest, self.sent)
        asked = Mirror(
            session_id=self.session_id,
            peer=standby.hop.peer,
            addresses=standby.hop.announcement.addresses,
            to_session=standby.session_id,
        )
        await self._stream.ask(asked, Mirrored, self.deadlines.link)

    async def ping(self) -> None:
        """Show the hop that somebody is there still, and see that it is.

        Raises:
            RemoteFault: it says nothing any more.
        """
        await self._stream.ping()

    def adopted(self, tokens: int, source: "Leg") -> None:
        """The hop was given what that of `source` held of the first `tokens` tokens."""
        self.length = self.sent = tokens
        self.given_by = source.given_by | {source.hop.peer}
        if self.testimony is not None:
            self.testimony.whole = False

    def stand_in(self, tokens: int, source: "Leg", listener: Listener) -> None:
        """The standby takes the place of `source`'s, of which it holds a copy of `tokens` tokens."""
        self._listener, self.copied, self.is_unfed = listener, None, False
        self.adopted(tokens, source)

    async def close(self) -> None:
        """Say goodbye, waiting a moment at most."""
        closed = await self._stream.close(self.session_id)
        if closed is not None and closed.voucher is not None and self.testimony is not None:
            try:
                self.testimony.vouch(closed.voucher)
            except RemoteFault as fault:
                logger.info("the last voucher of a session is of no use: %s", fault)

    def abort(self) -> None:
        """End it without a word. Safe to call again."""
        self._stream.abort()

    def fail(self, fault: HopError) -> None:
        """The hop is lost, or of no use; the first reason stays."""
        if self.fault is None:
            self.fault = fault
            self.abort()
            self._listener.on_news(self)

    def _cut(self, length: int) -> None:
        """The hop will hold nothing from `length` on until it is brought that."""
        if length < self.sent:
            self.sent = length
            if self.copied is not None:
                self.copied.cut(self._newest, length)

    def _on_end(self, reason: Exception) -> None:
        if isinstance(reason, HopError):
            self.fail(reason)
        else:
            self._listener.on_bug(reason)

    def _hear(self, message: AnyMessage, body: memoryview) -> None:
        """
        Raises:
            RemoteFault: that is nothing a hop may say.
        """
        match message:
            case Result():
                self._on_result(message, body)
            case Error(number=int(number)):
                if (pending := self._answered(number)) is not None:
                    self._listener.on_refused(self, pending, refusal(self.hop, message))
            case Unfed():
                self.is_unfed = True
                self._listener.on_news(self)
            case Held() if self.copied is not None:
                self.copied.told(message.taken, message.tokens)
            case Leaving():
                self.is_leaving = True
                self._listener.on_news(self)
            case _:
                raise RemoteFault(self.hop, "said something that is no answer")

    def _on_result(self, result: Result, body: memoryview) -> None:
        pending = self._answered(result.number)
        if pending is None:
            return
        try:
            self._check(result, body, pending.step)
            wired = Wired(body, result.shape, result.dtype, result.codec)
            if self.testimony is not None:
                self.testimony.hear(pending.start, pending.tokens, wired, result.vouchers)
        except RemoteFault as fault:
            self._listener.on_refused(self, pending, fault)
            return
        seconds = self._count(result, pending)
        if pending.valid_end > pending.start:
            self.length = max(self.length, pending.valid_end)
        self.busy_since = None
        token = body.cast("B").cast("I")[-1] if result.response_type == "token_ids" else result.token
        self._listener.on_result(self, pending, wired, result.pushed, token)
        self._listener.on_times(self, pending.tokens, result.queue_ms, result.compute_ms)
        if seconds is not None:
            self._response_times.add(pending.tokens, seconds)

    def _answered(self, number: int) -> Pending | None:
        """The step of that number, which has its ending now; None if it was given up.

        Raises:
            RemoteFault: one before it has none.
        """
        if number in self.pending and number != next(iter(self.pending)):
            raise RemoteFault(self.hop, "left out the answer to a step")
        return self.pending.pop(number, None)

    def _count(self, result: Result, pending: Pending) -> float | None:
        """How long the hop took for that, which is counted; None if nobody knows when it began."""
        now, before = self._clock(), self._last_answer
        self._last_answer = now
        if pending.since is None:
            return None
        seconds = now - max(pending.since, before)
        times = self.decode if pending.tokens <= DECODE_TOKENS else self.prefill
        times.add(1000 * seconds, result)
        return seconds

    def _check(self, result: Result, body: memoryview, step: Step) -> None:
        """Whether it is what was asked for, and numbers: hops keep what comes of it.

        Raises:
            RemoteFault: it is not.
        """
        if (result.session_id, result.seq_pos) != (self.session_id, step.seq_pos):
            raise RemoteFault(self.hop, "answered another step than it was asked")
        if (result.response_type, result.shape, result.dtype, result.codec) != self._expected(step):
            raise RemoteFault(self.hop, "answered a step with a result of another shape or kind")
        if result.response_type == "token_ids":
            if any(token >= self._asked.vocab_size for token in body.cast("B").cast("I")):
                raise RemoteFault(self.hop, "answered with a token that the model does not have")
        elif result.token is not None and result.token >= self._asked.vocab_size:
            raise RemoteFault(self.hop, "sampled a token that the model does not have")
        elif not is_finite(body, result.shape, result.dtype, result.codec):
            raise RemoteFault(self.hop, "answered with values that are not numbers")

    def _expected(self, step: Step) -> tuple[ResponseType, tuple[int, ...], Dtype, Codec]:
        rows = step.rows or step.shape[0]
        if step.response_type == "token_ids":
            return "token_ids", (rows,), "uint32", "raw"
        return "hidden_states", (rows, self._asked.hidden_size), self.opened.dtype, self.opened.codec
