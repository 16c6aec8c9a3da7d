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
from swarm.net.messages import Feed, Step
from swarm.net.outbox import Outbox
from swarm.net.transport import FrameError, PeerId, StreamClosed, Transport
from swarm.server.span_engine import StepOutcome

PATIENCE = 5.0
"""Seconds that the next hop has to answer, and to take a frame."""


TOKENS = "uint32", "raw"
"""As what a last hop's tokens go on, with which it begins further rounds."""


def going_on(step: Step, done: StepOutcome) -> tuple[Step, memoryview] | None:
    """What the next hop is asked, and brought, given what `step` has `done`; None if the step ends here."""
    if not step.rounds and not step.then:
        return None
    then = step.then
    if step.rounds:
        then = *then, messages.Onward(step.session_id, step.response_type, step.rows, b"")
    first = then[0]
    asked = msgspec.structs.replace(
        step,
        session_id=first.session_id,
        response_type=first.response_type,
        page_keys=first.page_keys,
        rows=first.rows,
        then=then[1:],
    )
    token = _told(step, done)
    if token is None:
        form = {"shape": done.shape, "dtype": done.dtype, "codec": done.codec}
        return msgspec.structs.replace(asked, payload_type="hidden_states", **form), done.data
    if token in step.ends:
        return None
    begun = msgspec.structs.replace(
        asked,
        number=step.number + 1,
        seq_pos=step.seq_pos + step.shape[0],
        rounds=step.rounds - 1,
        payload_type="token_ids",
        shape=(1,),
        dtype="uint32",
        codec="raw",
    )
    return begun, memoryview(token.to_bytes(4, "little"))


def _told(step: Step, done: StepOutcome) -> int | None:
    """The token with which another round begins, as this hop is the last."""
    if step.response_type == "token_ids":
        token: int = done.data.cast("B").cast("I")[0]
        return token
    return done.token


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
