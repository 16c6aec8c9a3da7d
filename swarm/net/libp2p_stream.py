"""A stream to another peer, over a connection to the libp2p daemon. Knows frames, not how it was opened."""

import asyncio

from swarm.net import framing
from swarm.net.transport import MAX_BODY_BYTES, Buffer, FrameError, PeerId, StreamClosed

LINGER = 5.0
"""Seconds for what was sent before a close to leave."""


class Libp2pStream:
    """A stream through the daemon. Implements `Stream`."""

    def __init__(
        self,
        peer: PeerId,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        open_streams: set["Libp2pStream"],
    ):
        self.peer = peer
        self._reader = reader
        self._writer = writer
        self._sending = asyncio.Lock()
        self._is_closed = False
        self._open_streams = open_streams
        open_streams.add(self)

    async def send(self, header: Buffer, body: Buffer = b"") -> None:
        try:
            async with self._sending:
                await framing.write_frame(self._writer, header, body)
        except StreamClosed:
            self.close()
            raise

    def offer(self, header: Buffer, body: Buffer = b"") -> bool:
        is_in_the_way = self._sending.locked() or self._writer.transport.get_write_buffer_size()
        if self._is_closed or is_in_the_way or memoryview(body).nbytes > framing.SMALL_BODY:
            return False
        try:
            framing.put_frame(self._writer, header, body)
        except StreamClosed:
            return False
        return True

    async def receive(self, max_body: int = MAX_BODY_BYTES) -> tuple[bytes, memoryview]:
        if self._is_closed:
            raise StreamClosed("The stream has ended.")
        try:
            lengths = await framing.read_lengths(self._reader, max_body)
        except (StreamClosed, FrameError):
            self.close()
            raise
        try:
            return await framing.read_frame(self._reader, lengths)
        except BaseException:  # a frame half read, whatever the reason, leaves nothing to go on with
            self.close()
            raise

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._open_streams.discard(self)
        transport = self._writer.transport
        if transport.get_write_buffer_size():
            transport.close()
            asyncio.get_running_loop().call_later(LINGER, _abort_if_lingering, transport)
        else:
            transport.abort()


def _abort_if_lingering(transport: asyncio.WriteTransport) -> None:
    if transport.get_write_buffer_size():
        transport.abort()
