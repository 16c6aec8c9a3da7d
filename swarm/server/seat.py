"""One stream that a client opened, and the session that it may carry.

Owns listening to the stream, what is said on it, and when it counts as idle. What is asked and answered is
`sessions`' business, what becomes of a session's steps that of `hosted`.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from swarm.net import messages
from swarm.net.messages import AnyMessage, Ping, Probe, Step
from swarm.net.outbox import Outbox
from swarm.net.transport import FrameError, PeerId, Stream
from swarm.server.hosted import Hosted

T = TypeVar("T")


class Seat:
    """A stream, with a session on it while there is `hosted`."""

    def __init__(self, stream: Stream, patience: float):
        """A frame that the peer does not take within `patience` seconds ends the stream."""
        self.stream = stream
        self.outbox = Outbox(stream, patience)
        self.hosted: Hosted | None = None
        self.probing = 0  # bytes that probes may still move
        self._loop = asyncio.get_running_loop()
        self._used_at = self._loop.time()
        self._idle = 0.0
        self._waiting: asyncio.Timeout | None = None
        self._looking: asyncio.TimerHandle | None = None

    @property
    def peer(self) -> PeerId:
        return self.stream.peer

    @property
    def session_id(self) -> str:
        return self.hosted.terms.session_id if self.hosted else "none"

    async def receive(self, idle: float) -> tuple[AnyMessage, memoryview]:
        """The next message but steps that the session takes at once.

        A session falls idle without steps: pings keep none but standbys, but work does.

        Raises:
            TimeoutError: nothing came for `idle` seconds.
            StreamClosed, FrameError: as `Stream.receive` and `messages.decode`.
        """
        received = await self.unless_idle(idle, self._receive())
        if self.hosted is None or self.hosted.terms.is_standby or not isinstance(received[0], Ping):
            self.touch()
        return received

    async def unless_idle(self, idle: float | None, coming: Coroutine[Any, Any, T]) -> T:
        """What is `coming`, if that is before the stream has been out of use for `idle` seconds.

        Raises:
            TimeoutError: it is not.
        """
        if idle is None:
            return await coming
        self._idle = idle
        if self._looking is None:  # one timer for all messages, however many come
            self._looking = self._loop.call_at(self._used_at + idle, self._look)
        try:
            async with asyncio.timeout(None) as self._waiting:
                return await coming
        except BaseException:
            if self._looking is not None:
                self._looking.cancel()
            raise
        finally:
            self._waiting = None

    @property
    def used_at(self) -> float:
        """The loop's time at which the stream was in use last."""
        return self._used_at

    def touch(self) -> None:
        """The stream is in use: idleness counts from now on, or from when its session has nothing to do."""
        self._used_at = self._loop.time()

    async def free(self) -> None:
        """End the session, if there is one."""
        hosted, self.hosted = self.hosted, None
        if hosted is not None:
            await hosted.close()

    def _look(self) -> None:
        """End the waiting for a message if the stream is idle; else look again when it may be."""
        self._looking = None
        if self._waiting is None:
            return
        is_busy = self.hosted is not None and self.hosted.is_busy
        idle_at = self._idle + (self._loop.time() if is_busy else self._used_at)
        if idle_at <= self._loop.time():
            self._waiting.reschedule(idle_at)
        else:
            self._looking = self._loop.call_at(idle_at, self._look)

    async def _receive(self) -> tuple[AnyMessage, memoryview]:
        """Unlike `MessageStream`, leaves the stream open for a last word when a message is malformed.

        No body is taken before a session is open, or a probe was allowed some. Steps go straight to the
        session where they can.
        """
        message: AnyMessage

        def takes(header: bytes, body: memoryview) -> bool:
            nonlocal message
            message = _checked(header, body)
            return isinstance(message, Step) and self._takes_step(message, body)

        limit = self.hosted.terms.body_limit if self.hosted else self.probing
        _, body = await self.stream.receive(limit, takes)
        return message, body

    def _takes_step(self, step: Step, body: memoryview) -> bool:
        hosted = self.hosted
        if hosted is None or step.session_id != hosted.terms.session_id or not self.outbox.has_room:
            return False
        return hosted.takes(step, body)


def _checked(header: bytes, body: memoryview) -> AnyMessage:
    """
    Raises:
        FrameError: that is no message of this protocol, or not with such a body.
    """
    message = messages.decode(header)
    if len(body) and not isinstance(message, Step | Probe):
        raise FrameError(f"A peer sent a {type(message).__name__} with a body; only steps have one.")
    if isinstance(message, Probe) and len(body) != message.size:
        raise FrameError(f"A peer sent a Probe of {message.size} bytes with a body of {len(body)}.")
    return message
