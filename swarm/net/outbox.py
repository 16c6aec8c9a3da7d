"""What waits to be sent over one stream, so that whoever has something to say need not wait for the network.

Frames go out in their order: at once where they can, else by a task of the outbox's own. Knows nothing of
what they mean.
"""

import asyncio
from collections import deque

from swarm.net import messages
from swarm.net.messages import AnyMessage
from swarm.net.transport import Buffer, Stream, StreamClosed

MAX_WAITING_BYTES = 16 * 1024 * 1024
"""Bytes that may wait for a slow peer."""

FRAME_BYTES = 256
"""What a frame is counted with beside header and body: very small ones take memory too."""


class Outbox:
    """Sends over `stream`, and closes it where a frame is not taken within `patience` seconds."""

    def __init__(self, stream: Stream, patience: float):
        self.is_open = True
        self._stream = stream
        self._patience = patience
        self._waiting: deque[tuple[bytes, Buffer]] = deque()
        self._bytes = 0
        self._sending: asyncio.Task[None] | None = None
        self._has_room = asyncio.Event()
        self._has_room.set()

    @property
    def has_room(self) -> bool:
        return self._has_room.is_set()

    def put(self, message: AnyMessage, body: Buffer = b"") -> None:
        """Send it soon, if the stream is open. `body` must not change afterwards."""
        if not self.is_open:
            return
        header = messages.encode(message)
        if self._sending is None and self._stream.offer(header, body):
            return
        self._waiting.append((header, body))
        self._bytes += FRAME_BYTES + len(header) + len(body)
        if self._bytes > MAX_WAITING_BYTES:
            self._has_room.clear()
        if self._sending is None:
            self._sending = asyncio.create_task(self._send(), name=f"send to {self._stream.peer}")

    async def wait_for_room(self) -> None:
        """Return once not too much waits, or the stream has ended."""
        await self._has_room.wait()

    async def flush(self) -> None:
        """Return once all is sent, or the stream has ended, or the peer's time for it is over."""
        if self._sending is not None:
            await asyncio.wait((self._sending,), timeout=self._patience)

    async def close(self) -> None:
        """`end`, and wait for what was being sent."""
        self.end()
        if self._sending is not None:
            self._sending.cancel()
            await asyncio.gather(self._sending, return_exceptions=True)

    def end(self) -> None:
        """Close the stream at once. Safe to call again."""
        self.is_open = False
        self._waiting.clear()
        self._bytes = 0
        self._has_room.set()
        self._stream.close()

    async def _send(self) -> None:
        try:
            while self._waiting:
                header, body = self._waiting.popleft()
                async with asyncio.timeout(self._patience):
                    await self._stream.send(header, body)
                self._bytes -= FRAME_BYTES + len(header) + len(body)
                if self._bytes <= MAX_WAITING_BYTES:
                    self._has_room.set()
        except (StreamClosed, TimeoutError):
            self.end()
        finally:
            self._sending = None
