"""A link: the stream by which a session's steps go on from this hop to the next.

Owns that stream, what of a step goes on, and in which form that travels. Must not know how a step was
computed, nor what the client is told of it.
"""

import asyncio
from contextlib import suppress

import msgspec

from swarm.errors import InputError
from swarm.kernels.codecs import from_wire, to_wire
from swarm.net import messages
from swarm.net.calls import MessageStream
from swarm.net.forms import FORMS
from swarm.net.messages import Feed, PayloadType, Step
from swarm.net.outbox import Outbox
from swarm.net.transport import FrameError, PeerId, StreamClosed, Transport
from swarm.server.span_engine import StepOutcome

PATIENCE = 5.0
"""Seconds that the next hop has to answer, and to take a frame."""


TOKENS = "uint32", "raw"
"""As what a last hop's tokens go on, with which it begins further rounds."""


def going_on(step: Step, done: StepOutcome) -> Step | None:
    """What is asked of the next hop, given what `step` has `done`; None where the step ends here."""
    if not step.rounds:
        return _asked_next(step, done, step.number, step.seq_pos, step.then, 0) if step.then else None
    then = *step.then, messages.Onward(step.session_id, step.response_type, step.rows, b"")
    if step.response_type == "hidden_states":
        return _asked_next(step, done, step.number, step.seq_pos, then, step.rounds)
    if done.data.cast("B").cast("I")[0] in step.ends:
        return None
    return _asked_next(step, done, step.number + 1, step.seq_pos + step.shape[0], then, step.rounds - 1)


def _asked_next(
    step: Step,
    done: StepOutcome,
    number: int,
    seq_pos: int,
    then: tuple[messages.Onward, ...],
    rounds: int,
) -> Step:
    first = then[0]
    kind: PayloadType = "token_ids" if done.dtype == "uint32" else "hidden_states"
    return Step(
        session_id=first.session_id,
        number=number,
        seq_pos=seq_pos,
        payload_type=kind,
        response_type=first.response_type,
        shape=done.shape,
        dtype=done.dtype,
        codec=done.codec,
        page_keys=first.page_keys,
        rows=first.rows,
        then=then[1:],
        rounds=rounds,
        ends=step.ends,
    )


class Onward:
    """The steps of one session, on their way to the hop that `link` names."""

    def __init__(self, link: messages.Link, calls: MessageStream, outbox: Outbox):
        self._link = link
        self._calls = calls
        self._outbox = outbox
        self._watching = asyncio.create_task(self._watch(), name=f"watch the link to {link.peer}")

    @classmethod
    async def connect(
        cls, transport: Transport, link: messages.Link, *, gives_token_ids: bool = False
    ) -> "Onward":
        """Reach the next hop, and its session; by a hop that `gives_token_ids` also to bring it such.

        Raises:
            SwarmError: it cannot be reached, or has no such session, or nothing goes on in that form.
        """
        form = link.dtype, link.codec
        if form not in FORMS and not (gives_token_ids and form == TOKENS):
            raise InputError(f"Nothing goes on as {link.dtype} {link.codec}.")
        stream = await transport.open_stream(PeerId(link.peer), link.addresses)
        calls = MessageStream(stream)
        try:
            await calls.call(Feed(session_id=link.to_session), timeout=PATIENCE)
        except BaseException:
            calls.close()
            raise
        return cls(link, calls, Outbox(stream, PATIENCE))

    def leads_to(self, step: Step) -> bool:
        """Whether that may be asked where it ends, and it can take something now."""
        is_token, takes_tokens = step.dtype == "uint32", self._link.dtype == "uint32"
        fits = self._link.to_session == step.session_id and is_token == takes_tokens
        return fits and self._outbox.is_open and self._outbox.has_room

    def push(self, step: Step, data: memoryview) -> None:
        """Ask `step` of the next hop, which brings it `data`."""
        form = self._link.dtype, self._link.codec
        if (step.dtype, step.codec) != form:
            data = to_wire(from_wire(data, step.shape, step.dtype, step.codec), *form)
            step = msgspec.structs.replace(step, dtype=form[0], codec=form[1])
        self._outbox.put(step, data)

    def end(self) -> None:
        """Close the stream at once. Safe to call again."""
        self._outbox.end()

    async def close(self) -> None:
        """`end`, and wait for what was going on."""
        self.end()
        self._watching.cancel()
        await asyncio.gather(self._watching, return_exceptions=True)
        await self._outbox.close()

    async def _watch(self) -> None:
        """See at once that the other end has gone: it says nothing after its first answer."""
        with suppress(StreamClosed, FrameError):
            await self._calls.receive(max_body=0)
        self._outbox.end()
