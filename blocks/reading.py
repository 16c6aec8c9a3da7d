"""Reading tensors by byte range: several at once, few bytes ahead, each of shared storage once.

The bytes go straight into the tensor, and no file is mapped whole. torch is imported when tensors are
read, so that a server can look into a checkpoint before it pays for that import.
"""

import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, TypeAlias

from swarm.blocks.entries import DTYPES, Piece, TensorEntry
from swarm.blocks.storage import OpenFile, Storage

if TYPE_CHECKING:
    import torch

READ_CHUNK_BYTES = 8 * 2**20
DEFAULT_MEMORY_BUDGET = 512 * 2**20

_Place: TypeAlias = tuple[str, tuple[int, ...], tuple[Piece, ...]]


def read_ahead(
    storage: Storage, entries: Sequence[TensorEntry], threads: int, memory_budget: int
) -> "Iterator[tuple[str, torch.Tensor]]":
    """The tensors of `entries` by name and in their order, `threads` being read at a time.

    At most `memory_budget` bytes are read ahead or in the consumer's hands at once; a tensor is counted
    until the next one is asked for, and kept for as long as one that shares its storage is to come.
    A tensor larger than the budget goes alone. Closing the iterator stops the threads.

    Raises:
        InputError: a file is missing, unreadable, or shorter than its header says.
        SwarmError: what gives a file does not answer.
    """
    with ExitStack() as files:
        stop = threading.Event()
        needed = {piece.file for entry in entries for piece in entry.pieces}
        opened = {file: files.enter_context(storage.open(file)) for file in sorted(needed)}
        pool = ThreadPoolExecutor(threads, thread_name_prefix="read-weights")
        files.callback(pool.shutdown, wait=True, cancel_futures=True)
        files.callback(stop.set)
        yield from _Window(opened, pool, stop, memory_budget).over(entries)


class _Window:
    """What is being read or was read and not yet passed on, kept to a budget."""

    def __init__(
        self,
        opened: Mapping[str, OpenFile],
        pool: ThreadPoolExecutor,
        stop: threading.Event,
        memory_budget: int,
    ):
        self._opened, self._pool, self._stop = opened, pool, stop
        self._budget = memory_budget
        self._bytes = 0
        self._tensors: dict[_Place, Future[torch.Tensor]] = {}

    def over(self, entries: Sequence[TensorEntry]) -> "Iterator[tuple[str, torch.Tensor]]":
        uses = Counter(map(_place, entries))
        waiting, reading = deque(entries), deque[TensorEntry]()
        while waiting or reading:
            while waiting and (not reading or self._has_room(waiting[0])):
                self._start(waiting[0])
                reading.append(waiting.popleft())
            entry = reading.popleft()
            place = _place(entry)
            uses[place] -= 1
            future = self._tensors[place] if uses[place] else self._tensors.pop(place)
            yield entry.name, future.result()
            del future
            if not uses[place]:
                self._bytes -= entry.nbytes

    def _has_room(self, entry: TensorEntry) -> bool:
        return _place(entry) in self._tensors or self._bytes + entry.nbytes <= self._budget

    def _start(self, entry: TensorEntry) -> None:
        import torch

        if _place(entry) in self._tensors:
            return
        self._bytes += entry.nbytes
        # Made on this thread: memory from a heap of each reading thread would stay behind unused.
        buffer = torch.empty(entry.nbytes, dtype=torch.uint8)
        self._tensors[_place(entry)] = self._pool.submit(read_tensor, self._opened, entry, buffer, self._stop)


def _place(entry: TensorEntry) -> _Place:
    """What is equal for tensors that share their storage."""
    return entry.dtype, entry.shape, entry.pieces


def read_tensor(
    opened: Mapping[str, OpenFile], entry: TensorEntry, buffer: "torch.Tensor", stop: threading.Event
) -> "torch.Tensor":
    """Fill `buffer` with the tensor's bytes, and return it as that tensor; leave off once `stop` is set."""
    import torch

    for piece in entry.pieces:
        if piece.run:
            _read_runs(opened[piece.file], piece, buffer, stop)
        else:
            _read_together(opened[piece.file], piece, buffer, stop)
    return buffer.view(getattr(torch, DTYPES[entry.dtype][1])).reshape(entry.shape)


def _read_together(file: OpenFile, piece: Piece, buffer: "torch.Tensor", stop: threading.Event) -> None:
    view = buffer.numpy().data[piece.at : piece.at + piece.nbytes]
    for done in range(0, piece.nbytes, READ_CHUNK_BYTES):
        if stop.is_set():
            return
        file.read_into(view[done : done + READ_CHUNK_BYTES], piece.start + done)


def _read_runs(file: OpenFile, piece: Piece, buffer: "torch.Tensor", stop: threading.Event) -> None:
    import torch

    columns = buffer.view(-1, piece.stride)[:, piece.at : piece.at + piece.run]
    step = max(1, READ_CHUNK_BYTES // piece.run)
    chunk = torch.empty(min(step, len(columns)), piece.run, dtype=torch.uint8)
    for row in range(0, len(columns), step):
        if stop.is_set():
            return
        rows = chunk[: len(columns) - row]
        file.read_into(rows.view(-1).numpy().data, piece.start + row * piece.run)
        columns[row : row + len(rows)] = rows
