"""The journal against a plain list of rows: what is held, spilled and forgotten, and that no byte is lost."""

import asyncio
import os
import random
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from swarm.client.journal import PAGE_ROWS, Journal, JournalStore
from swarm.client.spill_file import Extent, FreeSpace, SpillFile, Wanted
from swarm.net.forms import Codec, Dtype, tensor_bytes

WIDTH = 40
FORMS: list[tuple[Dtype, Codec]] = [
    ("float32", "raw"),
    ("bfloat16", "raw"),
    ("float16", "scaled"),
    ("int8", "blocks"),
]
ROW = 4 * WIDTH
AMPLE = 1 << 20


def row_parts(position: int, version: int, dtype: Dtype, codec: Codec) -> tuple[bytes, bytes]:
    """Scales and values of one row, unlike any other's."""
    size = tensor_bytes((1, WIDTH), dtype, codec)
    values = tensor_bytes((1, WIDTH), dtype, "raw")
    row = b"".join(((position * 31 + version) * 65_537 + at).to_bytes(8, "little") for at in range(size))
    return row[: size - values], row[size - values : size]


def wire(rows: list[tuple[bytes, bytes]]) -> bytes:
    return b"".join(scales for scales, _ in rows) + b"".join(values for _, values in rows)


def rows_of(start: int, count: int, version: int = 0) -> memoryview:
    """Rows of plain float32."""
    return memoryview(wire([row_parts(at, version, "float32", "raw") for at in range(start, start + count)]))


@pytest.fixture
def store() -> Iterator[JournalStore]:
    store = JournalStore(AMPLE, AMPLE)
    yield store
    store.close()


def plain(store: JournalStore) -> Journal:
    return Journal(store, WIDTH, "float32", "raw")


class JournalsMatchLists(RuleBasedStateMachine):
    """Three journals of one small store, each beside the rows it was given."""

    @initialize(memory=st.integers(0, 40_000), disk=st.integers(0, 40_000))
    def begin(self, memory: int, disk: int) -> None:
        self.runner = asyncio.Runner()
        self.limits = memory, disk
        self.store = JournalStore(memory, disk)
        self.forms = [FORMS[0], FORMS[2], FORMS[3]]
        self.journals = [Journal(self.store, WIDTH, *form) for form in self.forms]
        self.rows: list[dict[int, tuple[bytes, bytes]]] = [{}, {}, {}]
        self.starts = [0, 0, 0]
        self.version = 0

    @rule(
        which=st.integers(0, 2),
        back=st.integers(0, 70),
        count=st.integers(1, 100) | st.integers(1, 3),
        is_part=st.booleans(),
    )
    def put(self, which: int, back: int, count: int, is_part: bool) -> None:
        journal, rows = self.journals[which], self.rows[which]
        self.version += 1
        start = max(0, journal.end - back)
        fresh = {at: row_parts(at, self.version, *self.forms[which]) for at in range(start, start + count)}
        data = wire(list(fresh.values()))
        view = memoryview(b"<" + data + b">")[1:-1] if is_part else memoryview(data)
        if journal.start == journal.end:
            self.starts[which] = start
            rows.clear()
        journal.put(start, view, count)
        for at, row in fresh.items():
            if at >= self.starts[which]:
                rows.setdefault(at, row)

    @rule(which=st.integers(0, 2))
    def put_after_a_gap(self, which: int) -> None:
        journal = self.journals[which]
        if journal.start == journal.end:
            return
        before = journal.start, journal.end
        with pytest.raises(ValueError, match="gap"):
            journal.put(journal.end + 1, memoryview(wire([row_parts(0, 0, *self.forms[which])])), 1)
        assert (journal.start, journal.end) == before

    @rule(which=st.integers(0, 2), back=st.integers(0, 120))
    def truncate(self, which: int, back: int) -> None:
        journal = self.journals[which]
        length = max(0, journal.end - back)
        journal.truncate(length)
        self.rows[which] = {at: row for at, row in self.rows[which].items() if at < length}
        assert journal.end <= length

    @rule(which=st.integers(0, 2), at=st.integers(0, 1_000), count=st.integers(0, 150))
    def read(self, which: int, at: int, count: int) -> None:
        journal = self.journals[which]
        held = journal.end - journal.start
        first = journal.start + (at % held if held else 0)
        end = min(first + count, journal.end)
        assert journal.covers(first, end)
        data = self.runner.run(journal.read(first, end))
        assert bytes(data) == wire([self.rows[which][position] for position in range(first, end)])

    @rule(which=st.integers(0, 2), beyond=st.integers(1, 5))
    def read_beyond(self, which: int, beyond: int) -> None:
        journal = self.journals[which]
        for first, end in [(journal.start, journal.end + beyond), (journal.start - beyond, journal.end)]:
            assert not journal.covers(first, end)
            with pytest.raises(LookupError):
                self.runner.run(journal.read(first, end))

    @rule(which=st.integers(0, 2))
    def release(self, which: int) -> None:
        self.journals[which].release()
        self.journals[which] = Journal(self.store, WIDTH, *self.forms[which])
        self.rows[which] = {}

    @invariant()
    def limits_are_kept_and_every_byte_counted(self) -> None:
        places = [segment.place for journal in self.journals for segment in journal._segments]
        assert self.store.bytes == sum(len(place) for place in places if isinstance(place, memoryview))
        assert self.store.spilled_bytes == sum(place.size for place in places if isinstance(place, Extent))
        assert self.store.bytes <= self.limits[0]
        assert self.store.spilled_bytes <= self.limits[1]
        assert file_size(self.store._file) <= self.limits[1]

    @invariant()
    def what_is_held_ends_where_it_should(self) -> None:
        for journal, rows in zip(self.journals, self.rows, strict=True):
            assert 0 <= journal.start <= journal.end
            if rows and journal.start < journal.end:
                assert journal.end == max(rows) + 1
                assert journal.start >= min(rows)

    def teardown(self) -> None:
        for journal in self.journals:
            journal.release()
        assert (self.store.bytes, self.store.spilled_bytes) == (0, 0)
        assert file_size(self.store._file) == 0
        self.store.close()
        self.runner.close()


TestJournalsMatchLists = JournalsMatchLists.TestCase
TestJournalsMatchLists.settings = settings(max_examples=60, stateful_step_count=40)


def file_size(file: SpillFile) -> int:
    return os.fstat(file._file.fileno()).st_size if file._file else 0


@pytest.mark.parametrize("form", FORMS)
async def test_rows_come_back_in_any_grouping(store: JournalStore, form: tuple[Dtype, Codec]) -> None:
    journal = Journal(store, WIDTH, *form)
    rows = [row_parts(at, 0, *form) for at in range(200)]
    for start, end in [(0, 50), (50, 51), (51, 53), (53, 90), (90, 121), (121, 200)]:
        journal.put(start, memoryview(wire(rows[start:end])), end - start)
    for first, end in [(0, 200), (0, 50), (1, 49), (49, 54), (60, 60), (52, 130), (199, 200)]:
        assert bytes(await journal.read(first, end)) == wire(rows[first:end])


async def test_what_the_hops_computed_from_stays(store: JournalStore) -> None:
    journal = plain(store)
    journal.put(10, rows_of(10, 40), 40)
    journal.put(0, rows_of(0, 60, version=1), 60)
    journal.put(20, rows_of(20, 30, version=2), 30)
    journal.put(0, rows_of(0, 5, version=3), 5)
    assert (journal.start, journal.end) == (10, 60)
    assert bytes(await journal.read(10, 60)) == bytes(rows_of(10, 40)) + bytes(rows_of(50, 10, version=1))


async def test_rows_that_were_read_outlive_a_rollback(store: JournalStore) -> None:
    journal = plain(store)
    journal.put(0, rows_of(0, 10), 10)
    journal.put(10, rows_of(10, 40), 40)
    read = [await journal.read(0, 10), await journal.read(10, 50), await journal.read(5, 20)]
    journal.truncate(3)
    journal.put(3, rows_of(3, 60, version=1), 60)
    assert [bytes(rows) for rows in read] == [
        bytes(rows_of(0, 10)),
        bytes(rows_of(10, 40)),
        bytes(rows_of(5, 15)),
    ]


def test_many_rows_that_are_all_of_their_buffer_are_not_copied(store: JournalStore) -> None:
    journal, data = plain(store), rows_of(0, PAGE_ROWS)
    journal.put(0, data, PAGE_ROWS)
    assert asyncio.run(read_all(journal)).obj is data.obj


@pytest.mark.parametrize("count", [1, PAGE_ROWS])
def test_a_large_buffer_is_not_kept_for_a_slice(store: JournalStore, count: int) -> None:
    journal, data = plain(store), rows_of(0, 1000)
    journal.put(0, data[: count * ROW], count)
    assert store.bytes == PAGE_ROWS * ROW
    kept = [segment.place.obj for segment in journal._segments if isinstance(segment.place, memoryview)]
    assert [memoryview(buffer).nbytes for buffer in kept] == [PAGE_ROWS * ROW]


def test_a_page_that_takes_no_more_rows_keeps_no_room_for_them(store: JournalStore) -> None:
    journal = plain(store)
    journal.put(0, rows_of(0, 3), 3)
    journal.put(3, rows_of(3, 50), 50)
    assert store.bytes == 53 * ROW


def test_the_rows_cut_off_a_segment_free_their_memory(store: JournalStore) -> None:
    journal = plain(store)
    journal.put(0, rows_of(0, 500), 500)
    journal.truncate(40)
    assert store.bytes == 40 * ROW


async def test_the_oldest_of_all_sessions_is_spilled_first_then_forgotten() -> None:
    store = JournalStore(memory_limit=100 * ROW, disk_limit=100 * ROW)
    early, late = plain(store), plain(store)
    early.put(0, rows_of(0, 80), 80)
    late.put(0, rows_of(0, 80, version=1), 80)
    assert (store.bytes, store.spilled_bytes) == (80 * ROW, 80 * ROW)
    assert bytes(await early.read(30, 50)) == bytes(rows_of(30, 20))
    late.put(80, rows_of(80, 80, version=1), 80)
    assert (early.start, early.end) == (80, 80)
    assert bytes(await late.read(0, 160)) == bytes(rows_of(0, 160, version=1))
    store.close()


async def test_without_a_disk_the_beginning_is_forgotten() -> None:
    store = JournalStore(memory_limit=3 * PAGE_ROWS * ROW, disk_limit=0)
    journal = plain(store)
    for at in range(10 * PAGE_ROWS):
        journal.put(at, rows_of(at, 1), 1)
    assert (journal.start, journal.end) == (7 * PAGE_ROWS, 10 * PAGE_ROWS)
    assert not journal.covers(journal.start - 1, journal.end)
    assert bytes(await read_all(journal)) == bytes(rows_of(journal.start, 3 * PAGE_ROWS))


async def test_a_journal_that_keeps_nothing_goes_on_where_it_is() -> None:
    journal = plain(JournalStore(0, 0))
    journal.put(0, rows_of(0, 40), 40)
    journal.put(40, rows_of(40, 1), 1)
    assert (journal.start, journal.end) == (41, 41)


@pytest.mark.parametrize("failing", ["pwrite", "pread"])
async def test_a_disk_that_fails_costs_what_was_on_it(monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    def fail(*_: object) -> int:
        raise OSError("no space left on device")

    store = JournalStore(memory_limit=60 * ROW, disk_limit=AMPLE)
    journal = plain(store)
    monkeypatch.setattr(os, failing, fail)
    journal.put(0, rows_of(0, 50), 50)
    journal.put(50, rows_of(50, 50), 50)
    if failing == "pread":
        with pytest.raises(LookupError, match="no space left"):
            await journal.read(10, 60)
    assert (journal.start, journal.end, store.spilled_bytes) == (50, 100, 0)
    assert bytes(await read_all(journal)) == bytes(rows_of(50, 50))
    store.close()


async def test_a_full_disk_is_told_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> int:
        raise OSError("no space left on device")

    store = JournalStore(memory_limit=0, disk_limit=AMPLE)
    journal = plain(store)
    monkeypatch.setattr(os, "pwrite", fail)
    for start in range(0, 200, 50):
        journal.put(start, rows_of(start, 50), 50)
    assert [record.message for record in caplog.records] == [
        "journals lose their oldest parts: the disk takes no more: no space left on device"
    ]
    store.close()


async def test_rows_forgotten_while_they_are_read_are_read_all_the_same() -> None:
    store = JournalStore(memory_limit=0, disk_limit=100 * ROW)
    journal, other = plain(store), plain(store)
    journal.put(0, rows_of(0, 90), 90)
    reading = asyncio.create_task(journal.read(0, 90))
    await asyncio.sleep(0)  # lets it begin
    journal.release()
    other.put(0, rows_of(0, 90, version=1), 90)
    assert bytes(await reading) == bytes(rows_of(0, 90))
    assert store.spilled_bytes == 0
    store.close()


async def test_a_reading_that_is_given_up_gives_the_room_back() -> None:
    store = JournalStore(memory_limit=0, disk_limit=AMPLE)
    journal = plain(store)
    journal.put(0, rows_of(0, 90), 90)
    reading = asyncio.create_task(journal.read(0, 90))
    await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    journal.release()
    async with asyncio.timeout(5):
        while store.spilled_bytes:  # noqa: ASYNC110 - the thread reads on for a moment
            await asyncio.sleep(0.001)
    store.close()


async def test_a_closed_store_keeps_nothing() -> None:
    store = JournalStore(memory_limit=60 * ROW, disk_limit=AMPLE)
    journal, idle = plain(store), plain(store)
    journal.put(0, rows_of(0, 100), 100)
    reading = asyncio.create_task(journal.read(0, 100))
    await asyncio.sleep(0)
    store.close()
    store.close()
    journal.put(100, rows_of(100, 1), 1)
    idle.put(0, rows_of(0, 100), 100)
    assert bytes(await reading) == bytes(rows_of(0, 100))
    assert (store.bytes, store.spilled_bytes, journal.covers(0, 1), idle.covers(0, 1)) == (0, 0, False, False)


def test_a_released_journal_keeps_nothing(store: JournalStore) -> None:
    journal = plain(store)
    journal.put(0, rows_of(0, 100), 100)
    journal.release()
    journal.release()
    journal.put(100, rows_of(100, 1), 1)
    assert (store.bytes, journal.covers(99, 100)) == (0, False)


def test_rows_of_another_size_are_refused(store: JournalStore) -> None:
    with pytest.raises(ValueError, match="2 rows in 160 bytes instead of 320"):
        plain(store).put(0, rows_of(0, 1), 2)


def test_a_decoded_row_costs_next_to_nothing(store: JournalStore) -> None:
    journal, row = Journal(store, 576, "float32", "raw"), memoryview(bytes(2304))
    started = time.process_time()
    for at in range(320):
        journal.put(at, row, 1)
    assert (
        time.process_time() - started < 320 * 100e-6
    )  # some microseconds each, with room for a busy machine
    assert store.bytes == 320 * 2304


async def read_all(journal: Journal) -> memoryview:
    return await journal.read(journal.start, journal.end)


@given(st.lists(st.integers(1, 30)), st.randoms(use_true_random=False))
def test_free_space_never_overlaps_and_is_all_found_again(sizes: list[int], luck: random.Random) -> None:
    space, taken = FreeSpace(200), list[Extent]()
    for size in sizes:
        extent = space.take(size)
        if extent is None or luck.random() < 0.4:
            luck.shuffle(taken)
            for _ in range(len(taken) // 2):
                space.give(taken.pop())
        if extent is not None:
            taken.append(extent)
        used = [at for offset, length in taken for at in range(offset, offset + length)]
        assert len(set(used)) == len(used) == space.in_use
        assert space.end == max(used, default=-1) + 1 <= 200
    for extent in taken:
        space.give(extent)
    assert space.take(200) == Extent(0, 200)


async def test_a_file_cut_short_is_an_error() -> None:
    file = SpillFile(100)
    extent = file.write([b"x" * 60])
    assert extent is not None
    assert file._file is not None
    file._file.truncate(10)
    with pytest.raises(OSError, match="not in its file"):
        await file.read([Wanted(extent.offset, memoryview(bytearray(60)))])
    file.close()
