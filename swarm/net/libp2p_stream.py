"""A stream to another peer, over a connection to the libp2p daemon and, once it has turned, by a shortcut.

Knows frames, and which way they go; not how it was opened, nor when it is to turn.
"""

import asyncio
from collections.abc import Generator
from contextlib import suppress

from swarm.net import framing
from swarm.net.sealed_connection import LINGER, SealedConnection
from swarm.net.shortcut_turns import Turn
from swarm.net.shortcut_words import MAX_WORD_BYTES, OVER
from swarm.net.transport import MAX_BODY_BYTES, Buffer, FrameError, PeerId, StreamClosed, Takes


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
        self._writer: framing.Writer = writer
        self._connection: SealedConnection | None = None  # by which it receives, once that is a shortcut
        self._sending = asyncio.Lock()
        self._is_closed = False
        self._is_within = False  # a frame that has come in part
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

    async def receive(
        self, max_body: int = MAX_BODY_BYTES, takes: Takes | None = None
    ) -> tuple[bytes, memoryview]:
        while self._connection is None:
            header, body = await self._receive_from_daemon(max_body)
            if not header:
                self._on_word(bytes(body))
                continue
            self._on_frame()
            if takes is None or not takes(header, body):
                return header, body
        return await self._receive_short(self._connection, max_body, takes)

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
        self._connection = connection
        self._watching = asyncio.create_task(self._end_with_daemon(connection), name=f"watch {self.peer}")

    async def _receive_from_daemon(self, max_body: int) -> tuple[bytes, memoryview]:
        """The next frame or word that comes through the daemon."""
        self._check_open()
        reader, max_word = self._daemon[0], 0 if self.turn is None else MAX_WORD_BYTES
        try:
            lengths = await framing.read_lengths(reader, max_body, max_word)
        except (StreamClosed, FrameError):
            self.close()
            raise
        try:
            return await framing.read_frame(reader, lengths)
        except BaseException:  # a frame half read, whatever the reason, leaves nothing to go on with
            self.close()
            raise

    async def _receive_short(
        self, connection: SealedConnection, max_body: int, takes: Takes | None
    ) -> tuple[bytes, memoryview]:
        """The next frame that comes by the shortcut and is not taken."""
        self._check_open()
        try:
            return await connection.parse(self._frames(max_body, takes))
        except asyncio.IncompleteReadError as error:
            self.close()
            raise StreamClosed("The peer ended the stream.") from error
        except BaseException:
            if self._is_within:
                self.close()
            raise

    def _frames(self, max_body: int, takes: Takes | None) -> Generator[int, bytes, tuple[bytes, memoryview]]:
        """A parser of frames up to the first that is not taken."""
        while True:
            lengths = yield framing.LENGTHS.size
            self._is_within = True
            header_bytes, body_bytes = framing.lengths_of(lengths, max_body)
            header = yield header_bytes
            body = memoryview((yield body_bytes))
            self._is_within = False
            self._on_frame()
            if takes is None or not takes(header, body):
                return header, body

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
