"""A stream to another peer, over a connection to the libp2p daemon and, once it has turned, by a shortcut.

Knows frames, and which way they go; not how it was opened, nor when it is to turn.
"""

import asyncio
from contextlib import suppress

from swarm.net import framing
from swarm.net.sealed_connection import LINGER, SealedConnection
from swarm.net.shortcut_turns import Turn
from swarm.net.shortcut_words import MAX_WORD_BYTES, OVER
from swarm.net.transport import MAX_BODY_BYTES, Buffer, FrameError, PeerId, StreamClosed


class Libp2pStream:
    """A stream through the daemon. Implements `Stream`, and `Turnable` for its `turn`, if it has one.

    The daemon's part stays open beneath a shortcut: where it ends, the peer is gone, and the stream ends.
    """

    def __init__(
        self,
        peer: PeerId,
        protocol: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        open_streams: set["Libp2pStream"],
    ):
        self.peer = peer
        self.protocol = protocol
        self.turn: Turn | None = None
        self._daemon = reader, writer
        self._reader: framing.Reader = reader
        self._writer: framing.Writer = writer
        self._sending = asyncio.Lock()
        self._is_closed = False
        self._watching: asyncio.Task[None] | None = None
        self._open_streams = open_streams
        open_streams.add(self)

    @property
    def is_short(self) -> bool:
        """Whether what it sends goes by a shortcut."""
        return self._writer is not self._daemon[1]

    async def send(self, header: Buffer, body: Buffer = b"") -> None:
        try:
            async with self._sending:
                self._check_open()
                await framing.write_frame(self._writer, header, body)
        except StreamClosed:
            self.close()
            raise
        self._on_frame()

    def offer(self, header: Buffer, body: Buffer = b"") -> bool:
        is_in_the_way = self._sending.locked() or self._writer.transport.get_write_buffer_size()
        if self._is_closed or is_in_the_way or memoryview(body).nbytes > framing.SMALL_BODY:
            return False
        try:
            framing.put_frame(self._writer, header, body)
        except StreamClosed:
            return False
        self._on_frame()
        return True

    async def receive(self, max_body: int = MAX_BODY_BYTES) -> tuple[bytes, memoryview]:
        while True:
            header, body = await self._receive(max_body)
            if header:
                self._on_frame()
                return header, body
            self._on_word(bytes(body))

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._open_streams.discard(self)
        if self.turn is not None:
            self.turn.close()
        if self._watching is not None:
            self._watching.cancel()
        transport = self._daemon[1].transport
        if transport.get_write_buffer_size():
            transport.close()
            asyncio.get_running_loop().call_later(LINGER, _abort_if_lingering, transport)
        else:
            transport.abort()

    def say(self, word: bytes) -> None:
        framing.put_word(self._writer, word)

    def go_out_by(self, connection: SealedConnection) -> None:
        self.say(OVER)
        self._writer = connection

    def come_in_by(self, connection: SealedConnection) -> None:
        self._reader = connection
        self._watching = asyncio.create_task(self._end_with_daemon(connection), name=f"watch {self.peer}")

    async def _receive(self, max_body: int) -> tuple[bytes, memoryview]:
        """The next frame or word."""
        self._check_open()
        is_short = self._reader is not self._daemon[0]
        max_word = 0 if self.turn is None or is_short else MAX_WORD_BYTES
        try:
            lengths = await framing.read_lengths(self._reader, max_body, max_word)
        except (StreamClosed, FrameError):
            self.close()
            raise
        try:
            return await framing.read_frame(self._reader, lengths)
        except BaseException:  # a frame half read, whatever the reason, leaves nothing to go on with
            self.close()
            raise

    def _on_word(self, word: bytes) -> None:
        self._check_open()
        assert self.turn is not None
        try:
            self.turn.on_word(word)
        except FrameError:
            self.close()
            raise

    def _on_frame(self) -> None:
        if self.turn is not None and not self._is_closed:
            self.turn.on_frame()

    async def _end_with_daemon(self, connection: SealedConnection) -> None:
        """Nothing more comes through the daemon but the end: close then, once what came before is read."""
        with suppress(OSError):
            await self._daemon[0].read(1)
        await connection.wait_silent(LINGER)
        if not connection.has_ended:
            self.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise StreamClosed("The stream has ended.")


def _abort_if_lingering(transport: asyncio.WriteTransport) -> None:
    if transport.get_write_buffer_size():
        transport.abort()
