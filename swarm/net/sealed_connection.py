"""A TCP connection on whose way nobody can read, change, repeat, reorder or add anything: who tries ends it.

Made for two ends that have a fresh key for each direction. They read and write bytes as with asyncio's
streams; on the way, these travel in pieces, each with its length before it and sealed with the next nonce.
Knows neither how the ends came by the keys nor what they send.

Source: ChaCha20-Poly1305 (RFC 8439), its nonce a counter as in Noise (section 5.1 of its specification).
"""

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Callable, Generator
from typing import Any, TypeVar, cast

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from swarm.baton import Baton
from swarm.net.sealing import TAG_BYTES, SealBroken
from swarm.net.transport import Buffer

KEY_BYTES = 32
LENGTH = struct.Struct("<I")
MAX_PIECE_BYTES = 64 * 1024
READ_AHEAD = 256 * 1024
"""Bytes above which no more are taken in before somebody reads them."""
LINGER = 5.0
"""Seconds for what was sent before a close to leave, and for the other end to close too."""

KEEP_ALIVE = 30
"""Seconds of rest after which TCP sends a sign of life: routers on the way forget what rests for long."""

Parsed = TypeVar("Parsed")

_KEEP_IDLE: int = getattr(socket, "TCP_KEEPIDLE" if hasattr(socket, "TCP_KEEPIDLE") else "TCP_KEEPALIVE")
_NONCE = struct.Struct("<4xQ")


class PieceSeal:
    """The key of one direction, and how many `pieces` have gone there: no nonce is used twice."""

    def __init__(self, key: bytes):
        self.pieces = 0
        self._cipher = ChaCha20Poly1305(key)

    def close(self, data: Buffer) -> bytes:
        """The next piece, with its length before it."""
        sealed = self._cipher.encrypt(self._next_nonce(), data, None)
        return LENGTH.pack(len(sealed)) + sealed

    def open(self, sealed: Buffer) -> bytes:
        """What was sealed as the next piece.

        Raises:
            SealBroken: it was not, with this key.
        """
        try:
            return self._cipher.decrypt(self._next_nonce(), sealed, None)
        except InvalidTag as error:
            raise SealBroken from error

    def _next_nonce(self) -> bytes:
        nonce = _NONCE.pack(self.pieces)
        self.pieces += 1
        return nonce


class Pieces:
    """What has come and was not read yet: it stays in its pieces until then, and is copied once."""

    def __init__(self) -> None:
        self.bytes = 0
        self._pieces: deque[bytes] = deque()
        self._start = 0  # where what was not read of the first piece begins

    def add(self, piece: bytes) -> None:
        self._pieces.append(piece)
        self.bytes += len(piece)

    def take(self, size: int) -> bytes:
        """The next `size` bytes, of which there must be as many."""
        self.bytes -= size
        parts = []
        while size:
            piece, start = self._pieces[0], self._start
            end = min(start + size, len(piece))
            if end == len(piece):
                self._pieces.popleft()
            self._start = end % len(piece)
            size -= end - start
            parts.append(piece[start:end])
        return parts[0] if len(parts) == 1 else b"".join(parts)


class SealedConnection(asyncio.Protocol):
    """One end of it, once asyncio has connected it as a protocol; a `framing.Reader` and `framing.Writer`.

    What it writes is sealed by `ours`, what it reads was by `theirs`. `on_lost` is called when it is over.
    """

    def __init__(self, ours: PieceSeal, theirs: PieceSeal, on_lost: Callable[["SealedConnection"], None]):
        self.has_ended = False  # whether the other end has, so that nothing more comes
        self._ours = ours
        self._theirs = theirs
        self._on_lost = on_lost
        self._sealed = b""  # the beginning of a piece
        self._opened = Pieces()
        self._wanted = 0
        self._parser: Generator[int, bytes, Any] | None = None
        self._parsed: Baton[Any]  # what it will have made of all
        self._may_write = asyncio.Event()
        self._may_write.set()
        self._connected: asyncio.Transport | None = None
        self._is_paused = self._is_left = self._is_lost = False
        self._lingering: asyncio.TimerHandle | None = None

    @property
    def transport(self) -> asyncio.Transport:
        assert self._connected is not None, "only a connection that was made has a transport"
        return self._connected

    def is_closing(self) -> bool:
        return self._is_left or self.transport.is_closing()

    def write(self, data: Buffer) -> None:
        """Send that soon."""
        whole = memoryview(data)
        for start in range(0, len(whole), MAX_PIECE_BYTES):
            self.transport.write(self._ours.close(whole[start : start + MAX_PIECE_BYTES]))

    async def drain(self) -> None:
        """Wait until most of what was written has left.

        Raises:
            ConnectionResetError: it never will.
        """
        await self._may_write.wait()
        if self._is_lost:
            raise ConnectionResetError("the shortcut has ended")

    async def readexactly(self, size: int, /) -> bytes:
        """The next `size` bytes, as `parse` gives them. Cancelling it loses nothing."""
        return await self.parse(_exactly(size))

    async def parse(self, parser: Generator[int, bytes, Parsed]) -> Parsed:
        """What `parser` makes of what comes. One at a time.

        Each time it is given as many bytes as it asked for, at once when the last of them has come.

        Raises:
            IncompleteReadError: so many do not come any more.
            Exception: what the parser raises.
        """
        self._parser, self._parsed = parser, Baton[Parsed]()
        self._wanted = next(parser)
        self._feed()
        if self.has_ended or self._is_left:
            self._starve()
        try:
            return await self._parsed
        finally:
            self._wanted, self._parser = 0, None

    async def wait_silent(self, patience: float) -> None:
        """Return once the other end has ended, or nothing has come for `patience` seconds that could have."""
        while not self.has_ended:
            heard, could_have = self._theirs.pieces, not self._is_paused
            await asyncio.sleep(patience)
            if could_have and self._theirs.pieces == heard:
                return

    def leave(self) -> None:
        """End both directions at once; what was sent before still arrives. Safe to call again.

        Closing TCP while there is something to read would have it thrown away what was sent: so the rest is
        read, and not looked at, until the other end closes as well.
        """
        if self._is_left:
            return
        self._is_left = True
        self._starve()
        transport = self.transport
        if transport.is_closing():
            return
        self._lingering = asyncio.get_running_loop().call_later(LINGER, transport.abort)
        if self.has_ended:
            transport.close()
            return
        transport.write_eof()
        self._opened = Pieces()
        self._heed_bound()

    def abort(self) -> None:
        """End it without waiting for anything. Safe to call again, and before it is connected."""
        self._is_left = True
        self._starve()
        if self._connected is not None:
            self._connected.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        _tune(transport.get_extra_info("socket"))
        self._connected = cast(asyncio.Transport, transport)
        self._connected.set_write_buffer_limits(high=0)  # so that uvloop writes at once, not after all else
        if self._is_left:  # uvloop goes on connecting for who does not wait any more
            self.abort()

    def data_received(self, data: bytes) -> None:
        if self._is_left:
            return
        try:
            self._open_pieces(self._sealed + data if self._sealed else data)
        except SealBroken:
            self.transport.abort()
            return
        self._feed()

    def eof_received(self) -> bool:
        self.has_ended = True
        self._starve()
        return not self._is_left

    def pause_writing(self) -> None:
        self._may_write.clear()

    def resume_writing(self) -> None:
        self._may_write.set()

    def connection_lost(self, error: Exception | None) -> None:
        self.has_ended = self._is_lost = True
        if self._lingering is not None:
            self._lingering.cancel()
        self._may_write.set()
        self._starve()
        self._on_lost(self)

    def _open_pieces(self, heard: bytes) -> None:
        """Open those that have come whole, and keep the rest."""
        start, view = 0, memoryview(heard)
        while len(heard) >= start + LENGTH.size:
            (size,) = LENGTH.unpack_from(heard, start)
            if not TAG_BYTES < size <= MAX_PIECE_BYTES + TAG_BYTES:
                raise SealBroken
            end = start + LENGTH.size + size
            if len(heard) < end:
                break
            self._opened.add(self._theirs.open(view[start + LENGTH.size : end]))
            start = end
        self._sealed = heard[start:]

    def _feed(self) -> None:
        """Give the parser what it asks for, as far as that has come and it is waited for."""
        parser = self._parser
        try:
            while parser and not self._parsed.done() and self._opened.bytes >= self._wanted:
                self._wanted = parser.send(self._opened.take(self._wanted))
        except StopIteration as end:
            self._end_parsing(end.value)
        except Exception as error:  # is for who waits for what is parsed
            self._end_parsing(None, error)
        self._heed_bound()

    def _starve(self) -> None:
        """The parser gets no more."""
        if self._parser is not None:
            self._end_parsing(None, asyncio.IncompleteReadError(b"", self._wanted))

    def _end_parsing(self, parsed: object, error: Exception | None = None) -> None:
        if self._parsed.done():
            return
        if error is not None:
            self._parsed.set_exception(error)
            self._parsed.exception()  # who waits for it may be gone by then
        else:
            self._parsed.set_result(parsed)

    def _heed_bound(self) -> None:
        """Take in no more while there is much that nobody wants."""
        is_full = self._opened.bytes > max(READ_AHEAD, self._wanted)
        if is_full == self._is_paused or self.transport.is_closing():
            return
        self._is_paused = is_full
        if is_full:
            self.transport.pause_reading()
        else:
            self.transport.resume_reading()


def _exactly(size: int) -> Generator[int, bytes, bytes]:
    return (yield size)


def _tune(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, True)
    connection.setsockopt(socket.IPPROTO_TCP, _KEEP_IDLE, KEEP_ALIVE)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEP_ALIVE)
