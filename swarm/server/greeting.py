"""What a peer without blocks answers: pings, how it sees others, whether it can dial them, and no more."""

import asyncio
from contextlib import suppress

from swarm.net.calls import MessageStream
from swarm.net.messages import AnyMessage, DialBack, Observe, Ping, Pong
from swarm.net.transport import Stream, StreamClosed, Transport
from swarm.server.admission import refusal
from swarm.server.witness import Witness

IDLE_TIMEOUT = 60.0
"""Seconds for which a stream may say nothing."""


class Greeter:
    """Answers streams, as `Transport.listen` brings them."""

    def __init__(self, transport: Transport):
        self._witness = Witness(transport)

    async def on_stream(self, stream: Stream) -> None:
        """Answer every message of `stream` until it ends, falls idle, or breaks a rule of framing."""
        calls = MessageStream(stream)
        with suppress(StreamClosed, TimeoutError):
            while True:
                async with asyncio.timeout(IDLE_TIMEOUT):
                    asked, _ = await calls.receive()
                await calls.send(await self._answer(stream, asked))

    async def _answer(self, stream: Stream, asked: AnyMessage) -> AnyMessage:
        match asked:
            case Ping():
                return Pong(nonce=asked.nonce)
            case Observe():
                return await self._witness.observe(stream.peer, asked)
            case DialBack():
                return await self._witness.dial_back(stream.peer, asked)
        return refusal("model_mismatch", "This peer serves no model.")
