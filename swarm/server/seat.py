"""One stream that a peer opened, and the session that it may carry.

Owns what the two have agreed on, the step that runs for it, and listening to the stream meanwhile: a step
whose peer has gone is not worth running. What is asked and answered is `sessions`' business.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeAlias

from swarm.net import messages
from swarm.net.messages import AnyMessage, Ping, Step
from swarm.net.transport import FrameError, PeerId, Stream
from swarm.server.admission import Terms
from swarm.server.span_engine import SpanEngine, StepOutcome

Received: TypeAlias = tuple[AnyMessage, memoryview]


class Seat:
    """A stream, with a session on it while `engine` is set. `terms` outlive a session that was evicted."""

    def __init__(self, stream: Stream):
        self.stream = stream
        self.terms: Terms | None = None
        self.engine: SpanEngine | None = None
        self._used_at = asyncio.get_running_loop().time()
        self._coming: asyncio.Task[Received] | None = None
        self._running: asyncio.Task[StepOutcome] | None = None

    @property
    def peer(self) -> PeerId:
        return self.stream.peer

    @property
    def session_id(self) -> str:
        return self.terms.session_id if self.terms else "none"

    @property
    def was_evicted(self) -> bool:
        """The session ended here, and its peer has not reacted to that yet."""
        return self.terms is not None and self.engine is None

    async def receive(self, idle: float) -> Received:
        """The next message. A session falls idle without steps: pings do not keep it.

        Raises:
            TimeoutError: nothing came for `idle` seconds.
            StreamClosed, FrameError: as `Stream.receive` and `messages.decode`.
        """
        coming = self._listen()
        async with asyncio.timeout_at(self._used_at + idle):
            received = await coming
        self._coming = None
        if self.engine is None or not isinstance(received[0], Ping):
            self.touch()
        return received

    def touch(self) -> None:
        """The stream is in use: idleness counts from now on."""
        self._used_at = asyncio.get_running_loop().time()

    async def run(self, step: Coroutine[Any, Any, StepOutcome]) -> StepOutcome | None:
        """What `step` gives, None if the session is evicted meanwhile. Cancelled if the stream ends.

        Raises:
            StreamClosed, FrameError: the stream has ended.
            SwarmError: as `step`.
        """
        coming, running = self._listen(), asyncio.create_task(step, name=f"step of {self.session_id}")
        self._running = running
        try:
            await asyncio.wait((running, coming), return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                coming.result()
                await asyncio.wait((running,))
        except BaseException:  # the stream has ended, or this is cancelled
            await _end(running)
            raise
        finally:
            self._running = None
        return None if running.cancelled() else running.result()

    def evict(self) -> None:
        """End the session, with the step that runs for it; the stream stays."""
        if self._running is not None:
            self._running.cancel()
        if self.terms is not None and self.engine is not None:
            self.engine.close_session(self.terms.session_id)
            self.engine = None

    def free(self) -> None:
        """End the session, if there is one, and forget it."""
        self.evict()
        self.terms = None

    async def close(self) -> None:
        """Listen no more."""
        if self._coming is not None:
            await _end(self._coming)

    def _listen(self) -> "asyncio.Task[Received]":
        if self._coming is None:
            self._coming = asyncio.create_task(self._receive(), name=f"listen to {self.peer}")
        return self._coming

    async def _receive(self) -> Received:
        """Unlike `MessageStream`, leaves the stream open for a last word when a message is malformed.

        No body is taken before a session is open.
        """
        header, body = await self.stream.receive(self.terms.body_limit if self.terms else 0)
        message = messages.decode(header)
        if len(body) and not isinstance(message, Step):
            raise FrameError(f"A peer sent a {type(message).__name__} with a body; only steps have one.")
        return message, body


async def _end(task: "asyncio.Task[Any]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
