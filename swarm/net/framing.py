"""Frames on a byte stream: two little-endian u32 lengths, then the header, then the body.

Lengths are checked as soon as they arrive; memory for a body grows only with the bytes that have come. A word
is a frame without a header, for the two ends of the stream alone.
Works on asyncio's stream reader and writer, or the like, and does not know whose they are.
"""

import asyncio
import struct
from typing import Protocol

from swarm.net.transport import (
    MAX_BODY_BYTES,
    MAX_HEADER_BYTES,
    Buffer,
    FrameError,
    StreamClosed,
)


class Reader(Protocol):
    """As asyncio's."""

    async def readexactly(self, n: int, /) -> bytes: ...


class Writer(Protocol):
    """As asyncio's."""

    @property
    def transport(self) -> asyncio.WriteTransport: ...

    def is_closing(self) -> bool: ...

    def write(self, data: Buffer, /) -> None: ...

    async def drain(self) -> None: ...


LENGTHS = struct.Struct("<II")
SMALL_BODY = 64 * 1024
"""Bodies up to this many bytes are copied into one write with their header: cheaper than a second write."""


def check_lengths(header: int, body: int, max_body: int) -> None:
    """
    Raises:
        FrameError: a frame with these lengths, in bytes, is not allowed.
    """
    if not 0 < header <= MAX_HEADER_BYTES:
        raise FrameError(f"A peer sent a header of {header} bytes; 1 to {MAX_HEADER_BYTES} are allowed.")
    if body > min(max_body, MAX_BODY_BYTES):
        raise FrameError(f"A peer sent a body of {body} bytes; {max_body} are allowed here.")


def check_sendable(header: Buffer, body: Buffer) -> None:
    """
    Raises:
        ValueError: this peer would break the rules itself with such a frame.
    """
    header_bytes, body_bytes = memoryview(header).nbytes, memoryview(body).nbytes
    if not 0 < header_bytes <= MAX_HEADER_BYTES or body_bytes > MAX_BODY_BYTES:
        raise ValueError(f"a frame of {header_bytes} + {body_bytes} bytes is larger than allowed")


def lengths_of(data: bytes, max_body: int = MAX_BODY_BYTES, max_word: int = 0) -> tuple[int, int]:
    """A frame's lengths, in bytes: header and body. It may be a word of up to `max_word` bytes.

    Raises:
        FrameError: they are not allowed.
    """
    header_bytes, body_bytes = LENGTHS.unpack(data)
    if header_bytes or not 0 < body_bytes <= max_word:
        check_lengths(header_bytes, body_bytes, max_body)
    return header_bytes, body_bytes


async def read_lengths(reader: Reader, max_body: int = MAX_BODY_BYTES, max_word: int = 0) -> tuple[int, int]:
    """The next frame's lengths, in bytes: header and body. Cancelling it loses nothing.

    It may be a word of up to `max_word` bytes, with a header of none.

    Raises:
        StreamClosed: the stream ended.
        FrameError: the lengths are not allowed.
    """
    return lengths_of(await _read(reader, LENGTHS.size), max_body, max_word)


async def read_frame(reader: Reader, lengths: tuple[int, int]) -> tuple[bytes, memoryview]:
    """The header and body that follow their lengths. The stream is of no use after cancelling it.

    Raises:
        StreamClosed: the stream ended within the frame.
    """
    header_bytes, body_bytes = lengths
    header = await _read(reader, header_bytes)
    return header, memoryview(await _read(reader, body_bytes))


async def write_frame(writer: Writer, header: Buffer, body: Buffer = b"") -> None:
    """Write one frame and wait until most of it has left. `body` must not change afterwards.

    Raises:
        StreamClosed: the stream has ended.
        ValueError: the frame is larger than any peer would take.
    """
    try:
        put_frame(writer, header, body)
        await writer.drain()
    except OSError as error:
        raise StreamClosed("The peer ended the stream.") from error


def put_frame(writer: Writer, header: Buffer, body: Buffer = b"") -> None:
    """`write_frame` without waiting for anything to leave.

    Raises:
        StreamClosed, ValueError: as `write_frame`.
    """
    check_sendable(header, body)
    if writer.is_closing():
        raise StreamClosed("The stream has ended.")
    body = memoryview(body).cast("B")
    lengths = LENGTHS.pack(len(header), len(body))
    if len(body) <= SMALL_BODY:
        writer.write(b"".join((lengths, header, body)))
    else:
        writer.write(lengths + header)
        writer.write(body)


def put_word(writer: Writer, word: bytes) -> None:
    """Write a word without waiting for it to leave; in vain if the stream has ended."""
    writer.write(LENGTHS.pack(0, len(word)) + word)


async def _read(reader: Reader, size: int) -> bytes:
    try:
        return await reader.readexactly(size)
    except (asyncio.IncompleteReadError, OSError) as error:
        raise StreamClosed("The peer ended the stream.") from error
