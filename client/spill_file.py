"""One anonymous temporary file of bounded size, in pieces that are written once, read and given back.

Owns which bytes of the file are in use, and gives what is free behind them back to the disk. Must not know
what the pieces hold.

Writing blocks, but only for a copy into the operating system's memory: about a millisecond a megabyte.
Reading may wait for the disk, and so happens in a thread.
"""

import asyncio
import os
import tempfile
from bisect import bisect_left
from collections.abc import Sequence
from typing import IO, NamedTuple

Buffer = bytes | bytearray | memoryview


class Extent(NamedTuple):
    """Bytes `[offset, offset + size)` of the file."""

    offset: int
    size: int


class Wanted(NamedTuple):
    """The bytes of the file from `offset` on are to fill `target`."""

    offset: int
    target: memoryview


class FreeSpace:
    """The free parts of `[0, limit)`: as few and as large as can be, ordered. `end` is behind all in use."""

    def __init__(self, limit: int):
        self.in_use = 0
        self.end = 0
        self._limit = limit
        self._holes: list[Extent] = []

    def take(self, size: int) -> Extent | None:
        """The first free part of `size` bytes; None where none is as large."""
        for at, hole in enumerate(self._holes):
            if hole.size >= size:
                rest = Extent(hole.offset + size, hole.size - size)
                self._holes[at : at + 1] = [rest] if rest.size else []
                self.in_use += size
                return Extent(hole.offset, size)
        if self.end + size > self._limit:
            return None
        self.end += size
        self.in_use += size
        return Extent(self.end - size, size)

    def give(self, extent: Extent) -> None:
        """Take back what `take` gave."""
        self.in_use -= extent.size
        at = bisect_left(self._holes, extent)
        start, end = extent.offset, extent.offset + extent.size
        first, last = at, at
        if at and sum(self._holes[at - 1]) == start:
            first, start = at - 1, self._holes[at - 1].offset
        if at < len(self._holes) and self._holes[at].offset == end:
            last, end = at + 1, sum(self._holes[at])
        if end == self.end:
            self.end = start
            self._holes[first:last] = []
        else:
            self._holes[first:last] = [Extent(start, end - start)]


class SpillFile:
    """At most `limit` bytes. The file is made at the first writing, and has no name from then on."""

    def __init__(self, limit: int):
        self._space = FreeSpace(limit)
        self._file: IO[bytes] | None = None
        self._readers = 0
        self._given_while_read: list[Extent] = []

    @property
    def bytes(self) -> int:
        """Those in use."""
        return self._space.in_use

    def write(self, pieces: Sequence[Buffer]) -> Extent | None:
        """The place of `pieces`, one behind the other; None where they do not fit.

        Raises:
            OSError: the disk is full, or there is nowhere to write.
        """
        extent = self._space.take(sum(len(piece) for piece in pieces))
        if extent is None:
            return None
        try:
            self._write_at(extent.offset, pieces)
        except OSError:
            self._space.give(extent)
            raise
        return extent

    async def read(self, wanted: Sequence[Wanted]) -> None:
        """Fill the targets. What is given back meanwhile keeps its bytes until then.

        Raises:
            OSError: the disk failed.
        """
        if not wanted:
            return
        if self._file is None:
            raise OSError("the file of spilled pieces is closed")
        descriptor = os.dup(self._file.fileno())  # the reading's own, which closing the file leaves alone
        self._readers += 1
        reading = asyncio.get_running_loop().run_in_executor(None, _read, descriptor, wanted)
        reading.add_done_callback(self._on_read)
        await asyncio.shield(reading)  # a thread cannot be cancelled, and reads on

    def give(self, extent: Extent) -> None:
        """Let others have the bytes, as soon as nobody reads."""
        if self._readers:
            self._given_while_read.append(extent)
            return
        before = self._space.end
        self._space.give(extent)
        if self._space.end < before and self._file is not None:
            self._file.truncate(self._space.end)

    def close(self) -> None:
        """Give the file back to the disk; reading that has begun still ends well. Safe to call again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write_at(self, offset: int, pieces: Sequence[Buffer]) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - closed by `close`
        for piece in pieces:
            view = memoryview(piece)
            while view:
                written = os.pwrite(self._file.fileno(), view, offset)
                view, offset = view[written:], offset + written

    def _on_read(self, reading: "asyncio.Future[None]") -> None:
        if not reading.cancelled():
            reading.exception()  # seen, also where nobody waits any more
        self._readers -= 1
        if not self._readers:
            given, self._given_while_read = self._given_while_read, []
            for extent in given:
                self.give(extent)


def _read(descriptor: int, wanted: Sequence[Wanted]) -> None:
    """Fill the targets from a file that is this call's own."""
    try:
        for offset, target in wanted:
            filled = 0
            while filled < len(target):
                read = os.pread(descriptor, len(target) - filled, offset + filled)
                if not read:
                    raise OSError("a spilled piece is not in its file any more")
                target[filled : filled + len(read)] = read
                filled += len(read)
    finally:
        os.close(descriptor)
