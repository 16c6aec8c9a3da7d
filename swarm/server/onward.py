"""A link: the stream by which a session's steps go on from this hop to the next.

Owns that stream and in which form activations travel over it. Must not know how a step was computed, nor
what the client is told of it.
"""

import asyncio
from contextlib import suppress

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


class Onward:
    """The steps of one session, on their way to the hop that `link` names."""

    def __init__(self, link: messages.Link, calls: MessageStream, outbox: Outbox):
        self._link = link
        self._calls = calls
        self._outbox = outbox
        self._watching = asyncio.create_task(self._watch(), name=f"watch the link to {link.peer}")

    @classmethod
    async def connect(cls, transport: Transport, link: messages.Link) -> "Onward":
        """Reach the next hop, and its session.

        Raises:
            SwarmError: it cannot be reached, or has no such session, or no activations travel in that form.
        """
        if (link.dtype, link.codec) not in FORMS:
            raise InputError(f"No activations travel as {link.dtype} {link.codec}.")
        stream = await transport.open_stream(PeerId(link.peer), link.addresses)
        calls = MessageStream(stream)
        try:
            await calls.call(Feed(session_id=link.to_session), timeout=PATIENCE)
        except BaseException:
            calls.close()
            raise
        return cls(link, calls, Outbox(stream, PATIENCE))

    def leads_to(self, session_id: str) -> bool:
        """Whether it ends in that session, and can take something now."""
        return self._link.to_session == session_id and self._outbox.is_open and self._outbox.has_room

    def push(self, step: Step, done: StepOutcome) -> None:
        """Send what `step` gave to where its `then` begins."""
        first, *rest = step.then
        onward = Step(
            session_id=first.session_id,
            number=step.number,
            seq_pos=step.seq_pos,
            payload_type="hidden_states",
            response_type=first.response_type,
            shape=done.shape,
            dtype=self._link.dtype,
            codec=self._link.codec,
            page_keys=first.page_keys,
            rows=first.rows,
            then=tuple(rest),
        )
        self._outbox.put(onward, self._in_its_form(done))

    def end(self) -> None:
        """Close the stream at once. Safe to call again."""
        self._outbox.end()

    async def close(self) -> None:
        """`end`, and wait for what was going on."""
        self.end()
        self._watching.cancel()
        await asyncio.gather(self._watching, return_exceptions=True)
        await self._outbox.close()

    def _in_its_form(self, done: StepOutcome) -> memoryview:
        if (done.dtype, done.codec) == (self._link.dtype, self._link.codec):
            return done.data
        states = from_wire(done.data, done.shape, done.dtype, done.codec)
        return to_wire(states, self._link.dtype, self._link.codec)

    async def _watch(self) -> None:
        """See at once that the other end has gone: it says nothing after its first answer."""
        with suppress(StreamClosed, FrameError):
            await self._calls.receive(max_body=0)
        self._outbox.end()
