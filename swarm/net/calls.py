"""Messages over a stream: packing, checking bodies, and calls with exactly one answer each.

Knows the messages' types and which answers which; not what a server does with them.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeAlias

from swarm.errors import SwarmError
from swarm.net import messages
from swarm.net.messages import AnyMessage
from swarm.net.transport import MAX_BODY_BYTES, Buffer, FrameError, PeerId, Stream

_ANSWERS: dict[type[AnyMessage], type[AnyMessage]] = {
    messages.Ping: messages.Pong,
    messages.Observe: messages.Observed,
    messages.DialBack: messages.DialledBack,
    messages.Probe: messages.Probed,
    messages.Open: messages.Opened,
    messages.Step: messages.Result,
    messages.Link: messages.Linked,
    messages.Feed: messages.Fed,
    messages.HandOver: messages.HandedOver,
    messages.Mirror: messages.Mirrored,
    messages.Adopt: messages.Adopted,
    messages.Close: messages.Closed,
}
_ECHOED = ("nonce", "session_id", "seq_pos", "number")  # fields that an answer repeats from its question


TakesMessage: TypeAlias = Callable[[AnyMessage, memoryview], bool]
"""Is shown a message and its body, and tells whether it has taken it."""


class Refused(SwarmError):
    """The peer answered with an `Error`. The stream stays usable."""

    def __init__(self, error: messages.Error, peer: PeerId):
        super().__init__(f"Peer {peer} refused: {messages.printable(error.message)}")
        self.error = error
        self.peer = peer


class CallTimeout(SwarmError):
    """No answer came in time; the stream is closed, since a late answer would be taken for the next one's."""


class MessageStream:
    """Typed messages over one stream. Calls wait for each other: one question is open at a time."""

    def __init__(self, stream: Stream):
        self._stream = stream
        self._calling = asyncio.Lock()
        self.peer = stream.peer

    async def send(self, message: AnyMessage, body: Buffer = b"") -> None:
        """Send one message. `body` must not change afterwards: it may still be on its way.

        Raises:
            StreamClosed: the stream has ended.
        """
        await self._stream.send(messages.encode(message), body)

    def offer(self, message: AnyMessage, body: Buffer = b"") -> bool:
        """Send one message at once if nothing is in its way, and tell whether that was done."""
        return self._stream.offer(messages.encode(message), body)

    async def receive(
        self, max_body: int = MAX_BODY_BYTES, takes: TakesMessage = lambda message, body: False
    ) -> tuple[AnyMessage, memoryview]:
        """The next message, checked field by field, with a body of exactly the length it announces.

        Each is first shown to `takes`, as soon as it has come: those that it takes are not returned.

        Raises:
            StreamClosed: the stream has ended.
            FrameError: the peer broke a rule of the protocol; the stream is closed.
        """
        message: AnyMessage

        def takes_frame(header: bytes, body: memoryview) -> bool:
            nonlocal message
            message = messages.decode(header)
            _check_body(message, body)
            return takes(message, body)

        try:
            _, body = await self._stream.receive(max_body, takes_frame)
        except FrameError:
            self.close()
            raise
        return message, body

    async def call(
        self, message: AnyMessage, body: Buffer = b"", *, timeout: float, max_body: int = 0
    ) -> tuple[AnyMessage, memoryview]:
        """Send `message` and return its answer, within `timeout` seconds from now.

        A call that is cancelled or times out closes the stream.

        Raises:
            Refused: the peer answered with an `Error`.
            CallTimeout: the answer did not come in time.
            StreamClosed: the stream has ended.
            FrameError: the answer is malformed, or answers something else; the stream is closed.
        """
        async with self._one_call(timeout):
            await self.send(message, body)
            answer, answer_body = await self.receive(max_body)
            if not isinstance(answer, messages.Error):
                _check_answer(message, answer)
        if isinstance(answer, messages.Error):
            raise Refused(answer, self.peer)
        return answer, answer_body

    def close(self) -> None:
        self._stream.close()

    @asynccontextmanager
    async def _one_call(self, timeout: float) -> AsyncIterator[None]:
        asked = False
        try:
            async with asyncio.timeout(timeout), self._calling:
                asked = True
                yield
        except TimeoutError:
            if asked:
                self.close()
            raise CallTimeout(
                f"Peer {self.peer} did not answer within {timeout:g} seconds.",
                "It may be overloaded or gone.",
            ) from None
        except BaseException:
            if asked:
                self.close()
            raise


async def ping(
    stream: MessageStream,
    timeout: float = 5.0,
    nonce: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """The round trip to the peer, in seconds of `clock`: the loop's own may be as coarse as a millisecond.

    Raises:
        CallTimeout, StreamClosed, FrameError, Refused: as `MessageStream.call`.
    """
    asked = clock()
    await stream.call(messages.Ping(nonce=nonce), timeout=timeout)
    return clock() - asked


def _check_body(message: AnyMessage, body: memoryview) -> None:
    expected = messages.body_bytes(message)
    if len(body) != expected:
        kind = type(message).__name__
        raise FrameError(f"A peer sent a {kind} with a body of {len(body)} bytes instead of {expected}.")


def _check_answer(message: AnyMessage, answer: AnyMessage) -> None:
    fits = type(answer) is _ANSWERS.get(type(message)) and all(
        getattr(answer, field) == getattr(message, field) for field in _ECHOED if hasattr(message, field)
    )
    if not fits:
        raise FrameError(
            f"A peer answered a {type(message).__name__} with a {type(answer).__name__} not its own."
        )
