"""What travelled between two hops of a session, by position, as it was on the wire.

Owns the memory of all journals of a client: what exceeds it goes to a temporary file, the oldest first, and
what exceeds that is forgotten. A put may thus write, about as much as it brings. Must not know of hops, nor
what the rows mean. Belongs to one event loop.
"""

import logging
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from typing import NamedTuple

from swarm.client.spill_file import Extent, SpillFile, Wanted
from swarm.net.forms import ITEM_BYTES, Codec, Dtype, tensor_bytes

logger = logging.getLogger(__name__)

PAGE_ROWS = 32
"""Rows that come in smaller numbers are put together in pages of so many; others stay as they came."""


class RowForm(NamedTuple):
    """Bytes of one row: its scales, which stand before the values of all rows, and its values."""

    scales: int
    values: int

    @classmethod
    def of(cls, width: int, dtype: Dtype, codec: Codec) -> "RowForm":
        values = width * ITEM_BYTES[dtype]
        return cls(tensor_bytes((1, width), dtype, codec) - values, values)

    def size(self, rows: int) -> int:
        return rows * (self.scales + self.values)

    def rows(self, place: memoryview | Extent) -> int:
        """How many a place has room for."""
        return (place.size if isinstance(place, Extent) else len(place)) // self.size(1)

    def parts(self, first: int, end: int, rows: int) -> tuple[slice, slice]:
        """Where the scales and the values of rows `[first, end)` lie in a buffer of `rows`."""
        values = rows * self.scales
        return (
            slice(first * self.scales, end * self.scales),
            slice(values + first * self.values, values + end * self.values),
        )

    def copy(self, source: memoryview, first: int, end: int, target: memoryview, at: int) -> None:
        """Put the rows `[first, end)` of `source` at row `at` of `target`."""
        taken = self.parts(first, end, self.rows(source))
        given = self.parts(at, at + end - first, self.rows(target))
        for here, there in zip(taken, given, strict=True):
            target[there] = source[here]


class Segment:
    """The rows of positions `[start, end)`: the first ones in a place that may be larger.

    The place is in memory, or an extent of the file. While `is_open` rows may be added to it where it lies.
    """

    __slots__ = ("end", "is_open", "journal", "place", "start")

    def __init__(
        self, journal: "Journal", start: int, end: int, place: memoryview | Extent, is_open: bool = False
    ):
        self.journal = journal
        self.start = start
        self.end = end
        self.place = place
        self.is_open = is_open

    @property
    def memory(self) -> int:
        """Bytes of memory held."""
        return 0 if isinstance(self.place, Extent) else len(self.place)

    @property
    def room(self) -> int:
        """Rows that may be added."""
        return self.start + PAGE_ROWS - self.end if self.is_open else 0

    def shrunk(self) -> memoryview:
        """The rows in memory, with no room besides."""
        assert isinstance(self.place, memoryview)
        count, form = self.end - self.start, self.journal.form
        if len(self.place) == form.size(count):
            return self.place
        rows = memoryview(bytearray(form.size(count)))
        form.copy(self.place, 0, count, rows, 0)
        return rows


class JournalStore:
    """The memory, and the room on disk, of all journals of a client; limits in bytes, kept at all times."""

    def __init__(self, memory_limit: int, disk_limit: int):
        self._memory_limit = memory_limit
        self._disk_limit = disk_limit
        self._bytes = 0
        self._file = SpillFile(disk_limit)
        self._has_warned = False
        self._in_memory: OrderedDict[Segment, None] = OrderedDict()  # oldest first, as the next
        self._on_disk: OrderedDict[Segment, None] = OrderedDict()

    @property
    def bytes(self) -> int:
        """Memory held."""
        return self._bytes

    @property
    def spilled_bytes(self) -> int:
        """Room taken on disk, a while longer than its rows are held where others are being read."""
        return self._file.bytes

    def close(self) -> None:
        """Forget everything, and keep nothing from then on. Safe to call again."""
        self._memory_limit = self._disk_limit = 0
        for journal in {segment.journal for segment in (*self._in_memory, *self._on_disk)}:
            journal.release()
        self._file.close()

    def add(self, segment: Segment) -> None:
        """Take up a segment in memory, and make room for it."""
        self._in_memory[segment] = None
        self._bytes += segment.memory
        while self._bytes > self._memory_limit:
            self._spill(next(iter(self._in_memory)))

    def remove(self, segment: Segment) -> None:
        """Free what a segment holds."""
        if isinstance(segment.place, Extent):
            del self._on_disk[segment]
            self._file.give(segment.place)
        else:
            del self._in_memory[segment]
            self._bytes -= segment.memory

    def seal(self, segment: Segment) -> None:
        """Let a segment take no more rows, and free the room it has for them."""
        segment.is_open = False
        if isinstance(segment.place, memoryview):
            self._bytes -= segment.memory
            segment.place = segment.shrunk()
            self._bytes += segment.memory

    async def read(self, wanted: list[Wanted]) -> None:
        """
        Raises:
            OSError: the disk failed.
        """
        await self._file.read(wanted)

    def _spill(self, segment: Segment) -> None:
        """Bring a segment from memory to disk, or forget it and all before it in its journal."""
        extent = self._written(segment.shrunk())
        if extent is None:
            segment.journal.forget_through(segment)
            return
        self.remove(segment)
        segment.place, segment.is_open = extent, False
        self._on_disk[segment] = None

    def _written(self, data: memoryview) -> Extent | None:
        """Where on disk `data` lies, for which the oldest there is forgotten where it must be."""
        if len(data) > self._disk_limit:
            return None
        try:
            while (extent := self._file.write([data])) is None and self._on_disk:
                oldest = next(iter(self._on_disk))
                oldest.journal.forget_through(oldest)
        except OSError as error:
            if not self._has_warned:
                logger.warning("journals lose their oldest parts: the disk takes no more: %s", error)
            self._has_warned = True
            return None
        return extent


class Journal:
    """The rows of positions `[start, end)` that travelled over one boundary of one session.

    `start` is above 0 where a prefix never travelled, or was forgotten for want of room. Rows are `width`
    values as `dtype` with `codec`. A journal that is not used any more must be released.
    """

    def __init__(self, store: JournalStore, width: int, dtype: Dtype, codec: Codec):
        self.dtype = dtype
        self.codec = codec
        self.form = RowForm.of(width, dtype, codec)
        self._store = store
        self._segments: list[Segment] = []
        self._end = 0
        self._is_released = False

    @property
    def bytes(self) -> int:
        """Size of the rows that are held."""
        return self.form.size(self.end - self.start)

    @property
    def start(self) -> int:
        return self._segments[0].start if self._segments else self._end

    @property
    def end(self) -> int:
        return self._end

    def covers(self, first: int, end: int) -> bool:
        return self.start <= first <= end <= self._end

    def put(self, start: int, data: memoryview, tokens: int) -> None:
        """Keep the rows of positions `[start, start + tokens)`, as wire bytes that must not change.

        Positions that are held stay as they are, and those before `start` are not taken up again. An empty
        journal begins wherever the first rows do. Where `data` is many rows and all of its buffer it is kept
        as it is, and copied otherwise.

        Raises:
            ValueError: the rows would leave a gap, or are not so many bytes.
        """
        if len(data) != self.form.size(tokens):
            raise ValueError(f"{tokens} rows in {len(data)} bytes instead of {self.form.size(tokens)}")
        if self._segments and start > self._end:
            raise ValueError(f"rows from {start} on leave a gap after {self._end}")
        if self._is_released:
            return
        if not self._segments:
            self._end = start
        first = self._end - start
        if tokens - first >= PAGE_ROWS:
            self._keep(data, first, tokens)
            return
        while first < tokens:
            first = self._fill_page(data, first, tokens)

    def truncate(self, length: int) -> None:
        """Forget the positions from `length` on."""
        while self._segments and self._segments[-1].start >= length:
            self._store.remove(self._segments.pop())
        self._end = min(self._end, length)
        if self._segments and self._segments[-1].end > length:
            self._segments[-1].end = length
            if not self._segments[-1].is_open:
                self._store.seal(self._segments[-1])

    async def read(self, first: int, end: int) -> memoryview:
        """The rows of positions `[first, end)` as they are now, as wire bytes that must not be changed.

        Raises:
            LookupError: they are not all held; what the disk has lost is forgotten.
        """
        if not self.covers(first, end):
            raise LookupError(f"rows [{first}, {end}) of a journal of [{self.start}, {self._end})")
        segments = self._overlapping(first, end)
        if len(segments) == 1 and (kept := self._kept(segments[0], first, end)):
            return kept
        rows = memoryview(bytearray(self.form.size(end - first)))
        wanted = [part for segment in segments for part in self._gather(segment, first, end, rows)]
        try:
            await self._store.read(wanted)
        except OSError as error:
            self._forget_spilled(segments)
            raise LookupError(f"rows [{first}, {end}) of a journal are lost: {error}") from error
        return rows

    def release(self) -> None:
        """Forget everything, and keep nothing from then on. Safe to call again."""
        self._is_released = True
        self.truncate(self.start)

    def forget_through(self, last: Segment) -> None:
        """Forget the segment `last` and those before it, if it is held."""
        if last not in self._segments:
            return
        count = self._segments.index(last) + 1
        for segment in self._segments[:count]:
            self._store.remove(segment)
        del self._segments[:count]

    def _keep(self, data: memoryview, first: int, tokens: int) -> None:
        """Append the rows `[first, tokens)` of `data` as a segment of its own."""
        if first or not _is_whole(data):
            data, rows = memoryview(bytearray(self.form.size(tokens - first))), data
            self.form.copy(rows, first, tokens, data, 0)
        if self._segments:
            self._store.seal(self._segments[-1])
        self._append(Segment(self, self._end, self._end + tokens - first, data))

    def _fill_page(self, data: memoryview, first: int, tokens: int) -> int:
        """Append what fits on the last page, or a new one, of the rows from `first` on: up to which."""
        last = self._segments[-1] if self._segments else None
        page = last if last and last.room else self._new_page()
        assert isinstance(page.place, memoryview)
        until = min(tokens, first + page.room)
        self.form.copy(data, first, until, page.place, page.end - page.start)
        page.end += until - first
        if page is last:
            self._end = page.end
        else:
            self._append(page)
        return until

    def _new_page(self) -> Segment:
        memory = memoryview(bytearray(self.form.size(PAGE_ROWS)))
        return Segment(self, self._end, self._end, memory, is_open=True)

    def _append(self, segment: Segment) -> None:
        self._end = segment.end
        self._segments.append(segment)
        self._store.add(segment)

    def _overlapping(self, first: int, end: int) -> list[Segment]:
        if first == end:
            return []
        begin = bisect_right(self._segments, first, key=lambda segment: segment.start) - 1
        until = bisect_left(self._segments, end, key=lambda segment: segment.start)
        return self._segments[begin:until]

    def _kept(self, segment: Segment, first: int, end: int) -> memoryview | None:
        """The rows as they lie in memory, where they lie together and nobody writes."""
        if segment.is_open or isinstance(segment.place, Extent):
            return None
        if (first, end) == (segment.start, segment.end):
            return segment.place
        if self.form.scales:
            return None
        return segment.place[self.form.size(first - segment.start) : self.form.size(end - segment.start)]

    def _gather(self, segment: Segment, first: int, end: int, rows: memoryview) -> list[Wanted]:
        """Copy what a segment in memory has of `[first, end)` to its place in `rows`; ask for it on disk."""
        since, until = max(first, segment.start), min(end, segment.end)
        if isinstance(segment.place, memoryview):
            self.form.copy(segment.place, since - segment.start, until - segment.start, rows, since - first)
            return []
        offset = segment.place.offset
        taken = self.form.parts(since - segment.start, until - segment.start, self.form.rows(segment.place))
        given = self.form.parts(since - first, until - first, end - first)
        parts = zip(taken, given, strict=True)
        return [Wanted(offset + here.start, rows[there]) for here, there in parts if here.start < here.stop]

    def _forget_spilled(self, segments: list[Segment]) -> None:
        """Forget the last of `segments` that lies on disk, and all before it."""
        for segment in reversed(segments):
            if isinstance(segment.place, Extent):
                self.forget_through(segment)
                return


def _is_whole(data: memoryview) -> bool:
    """Whether keeping `data` keeps no more memory alive than its own bytes."""
    return isinstance(data.obj, bytes | bytearray) and len(data.obj) == len(data)
