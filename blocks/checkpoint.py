"""The tensors of a safetensors checkpoint: which file holds each, at which bytes, and reading them.

Headers are parsed here rather than through the safetensors library because byte ranges are what
makes reading a span cheap: the bytes go straight into the tensor, several tensors at once, and no
file is mapped whole. Layout: https://github.com/huggingface/safetensors#format. Knows nothing of
models being run, nor of where the files came from. torch is imported when tensors are read, so
that a server can look into a checkpoint before it pays for that import.
"""

import json
import math
import os
import re
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from swarm.blocks.files import read_json
from swarm.errors import InputError
from swarm.spans import Span

if TYPE_CHECKING:
    import torch

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

MAX_HEADER_BYTES = 100_000_000
READ_CHUNK_BYTES = 16 * 2**20
DEFAULT_MEMORY_BUDGET = 512 * 2**20

# Name in the header -> (bytes an element, name in torch).
DTYPES: Mapping[str, tuple[int, str]] = {
    "BOOL": (1, "bool"),
    "U8": (1, "uint8"),
    "I8": (1, "int8"),
    "U16": (2, "uint16"),
    "I16": (2, "int16"),
    "U32": (4, "uint32"),
    "I32": (4, "int32"),
    "U64": (8, "uint64"),
    "I64": (8, "int64"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E5M2": (1, "float8_e5m2"),
    "F8_E8M0": (1, "float8_e8m0fnu"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "F32": (4, "float32"),
    "F64": (8, "float64"),
}

_BLOCK_NAME = re.compile(r"^(?P<prefix>(?:.+\.)?layers\.)(?P<block>\d+)\.")
_DECODER_ENDINGS = ("embed_tokens.weight", "norm.weight")
_RECOMPUTED_ENDING = ".rotary_emb.inv_freq"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: its bytes are `[start, end)` of `file`, counted from the beginning of the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensor table of one safetensors file, every entry checked against the file's size.

    Raises:
        InputError: the file is missing, truncated, or not a well-formed safetensors file.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise _truncated(path)
            if length > MAX_HEADER_BYTES:
                raise _malformed(path, "its header is larger than 100 MB")
            text = file.read(length)
    except FileNotFoundError as error:
        raise missing_file(path) from error
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror}.", "Check the file and the disk."
        ) from error
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _malformed(path, "its header is not JSON") from error
    if not isinstance(header, dict):
        raise _malformed(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    table = {name: _entry(path, name, value, 8 + length) for name, value in header.items()}
    _check_layout(path, table, 8 + length, size)
    return table


def _entry(path: Path, name: str, value: object, data_start: int) -> TensorEntry:
    match value:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(end)]}:
            pass
        case _:
            raise _malformed(path, f"the entry of '{name}' lacks its dtype, shape or offsets")
    if dtype not in DTYPES:
        raise _malformed(path, f"'{name}' has the unknown dtype '{dtype}'")
    if not all(type(side) is int and side >= 0 for side in shape):
        raise _malformed(path, f"'{name}' has an impossible shape")
    if not 0 <= start <= end or end - start != math.prod(shape) * DTYPES[dtype][0]:
        raise _malformed(path, f"the bytes of '{name}' do not match its shape")
    return TensorEntry(name, path, dtype, tuple(shape), data_start + start, data_start + end)


def _check_layout(path: Path, table: Mapping[str, TensorEntry], data_start: int, size: int) -> None:
    position = data_start
    for entry in sorted(table.values(), key=lambda entry: (entry.start, entry.end)):
        if entry.start < position:
            raise _malformed(path, f"the bytes of '{entry.name}' overlap another tensor's")
        position = entry.end
    if position > size:
        raise _truncated(path)


def missing_file(path: Path) -> InputError:
    return InputError(
        f"The weights file {path} is missing.", "Get the missing file, or the whole checkpoint, again."
    )


def _truncated(path: Path) -> InputError:
    return InputError(f"The weights file {path} is truncated.", "Get the file again.")


def _malformed(path: Path, reason: str) -> InputError:
    return InputError(f"{path} is not a usable safetensors file: {reason}.", "Get the file again.")


class Checkpoint:
    """The tensors of one model in a folder, found through the index or in the single file.

    Files that are not there yet are no error until a tensor of theirs is asked for, so that a
    peer may hold only the files of its span.
    """

    def __init__(self, folder: Path, num_blocks: int, *, ties_embeddings: bool = False):
        """Look at the index in `folder`, or settle for `model.safetensors`; no weights are read.

        `ties_embeddings`: the config says that the head shares the embeddings' tensor.

        Raises:
            InputError: the index is malformed or names a file outside the folder.
        """
        self.folder = folder
        self.num_blocks = num_blocks
        self._ties_embeddings = ties_embeddings
        self._headers: dict[str, dict[str, TensorEntry]] = {}
        self.file_of = _weight_map(folder)

    @property
    def is_indexed(self) -> bool:
        return self.file_of is not None

    @property
    def files(self) -> tuple[str, ...]:
        """The names of all weights files, sorted, whether they are in the folder or not."""
        return _files_of(self.file_of)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of all tensors, sorted."""
        return tuple(sorted(self._header(SINGLE_FILE) if self.file_of is None else self.file_of))

    @property
    def tensors(self) -> dict[str, TensorEntry]:
        """The entries of the tensors in all files; each file must be there (see `entry` for one)."""
        return {name: self.entry(name) for name in self.names}

    def entry(self, name: str) -> TensorEntry:
        """Where the tensor `name` lies.

        Raises:
            InputError: no such tensor, or its file is missing, truncated or malformed.
        """
        file = SINGLE_FILE if self.file_of is None else self.file_of.get(name, "")
        entry = self._header(file).get(name) if file else None
        if entry is None:
            raise InputError(
                f"The checkpoint in {self.folder} has no tensor '{name}'.",
                "The config.json and the weights are not of the same model: get both again.",
            )
        return entry

    def files_for(self, names: Iterable[str]) -> tuple[str, ...]:
        """The names of the files that hold the tensors `names`, sorted."""
        if self.file_of is None:
            return (SINGLE_FILE,)
        return tuple(sorted({self.file_of[name] for name in names}))

    def _header(self, file: str) -> dict[str, TensorEntry]:
        if file not in self._headers:
            self._headers[file] = read_header(self.folder / file)
        return self._headers[file]

    @cached_property
    def block_prefix(self) -> str:
        """What the names of block tensors begin with, before the block's number: `model.layers.`

        Raises:
            InputError: no family of tensors is numbered like this model's blocks.
        """
        blocks: dict[str, set[int]] = {}
        for name in self.names:
            if found := _BLOCK_NAME.match(name):
                blocks.setdefault(found["prefix"], set()).add(int(found["block"]))
        complete = [prefix for prefix, seen in blocks.items() if seen.issuperset(range(self.num_blocks))]
        decoders = [p for p in complete if f"{p.removesuffix('layers.')}embed_tokens.weight" in self.names]
        if not decoders:
            raise InputError(
                f"The checkpoint in {self.folder} does not hold {self.num_blocks} blocks with embeddings.",
                "The config.json and the weights are not of the same model: get both again.",
            )
        return min(decoders, key=len)

    @property
    def base_prefix(self) -> str:
        """What the names of the decoder's tensors begin with: `model.`"""
        return self.block_prefix.removesuffix("layers.")

    @property
    def is_tied(self) -> bool:
        """Whether the head shares the embeddings' tensor."""
        return self._ties_embeddings or not any(map(_is_lm_head, self.names))

    def block_tensors(self, span: Span) -> dict[int, list[str]]:
        """The names of the tensors of each block in `span`, leaving out what is recomputed at load."""
        names: dict[int, list[str]] = {block: [] for block in span.blocks}
        for name in self.names:
            if not name.startswith(self.block_prefix) or name.endswith(_RECOMPUTED_ENDING):
                continue
            block = int(name.removeprefix(self.block_prefix).partition(".")[0])
            if block in names:
                names[block].append(name)
        return names

    def head_tensors(self) -> list[str]:
        """The names of the tensors a client needs: embeddings, final norm and, unless tied, the head."""
        wanted = {self.base_prefix + ending for ending in _DECODER_ENDINGS}
        return [name for name in self.names if name in wanted or (_is_lm_head(name) and not self.is_tied)]

    def read(
        self, names: Iterable[str], *, threads: int = 4, memory_budget: int = DEFAULT_MEMORY_BUDGET
    ) -> "Iterator[tuple[str, torch.Tensor]]":
        """Read tensors by byte range, `threads` at a time, and yield them in the order asked for.

        At most `memory_budget` bytes are read ahead or in the consumer's hands at once; a tensor is
        counted until the next one is asked for. A tensor larger than the budget goes alone. Closing
        the iterator stops the threads.

        Raises:
            InputError: a tensor or its file is missing, malformed, or shorter than its header says.
        """
        yield from _read_ahead([self.entry(name) for name in names], threads, memory_budget)


def _read_ahead(
    entries: Sequence[TensorEntry], threads: int, memory_budget: int
) -> "Iterator[tuple[str, torch.Tensor]]":
    import torch

    waiting = deque(entries)
    reading: deque[tuple[TensorEntry, Future[torch.Tensor]]] = deque()
    in_flight = 0
    stop = threading.Event()
    with ExitStack() as files:
        descriptors = {file: _open(files, file) for file in {entry.file for entry in entries}}
        pool = ThreadPoolExecutor(threads, thread_name_prefix="read-weights")
        files.callback(pool.shutdown, wait=True, cancel_futures=True)
        files.callback(stop.set)
        while waiting or reading:
            while waiting and (not in_flight or in_flight + waiting[0].nbytes <= memory_budget):
                entry = waiting.popleft()
                in_flight += entry.nbytes
                # Made on this thread: memory from a heap of each reading thread would stay behind unused.
                buffer = torch.empty(entry.nbytes, dtype=torch.uint8)
                future = pool.submit(_read_tensor, descriptors[entry.file], entry, buffer, stop)
                reading.append((entry, future))
                del buffer
            entry, future = reading.popleft()
            yield entry.name, future.result()
            del future
            in_flight -= entry.nbytes


def _open(files: ExitStack, path: Path) -> int:
    try:
        return files.enter_context(path.open("rb", buffering=0)).fileno()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror}.", "Check the file and the disk."
        ) from error


def _read_tensor(
    descriptor: int, entry: TensorEntry, buffer: "torch.Tensor", stop: threading.Event
) -> "torch.Tensor":
    """Fill `buffer` with the bytes of the tensor, and return it as that tensor."""
    import torch

    view = buffer.numpy().data
    done = 0
    while done < entry.nbytes and not stop.is_set():
        chunk = view[done : done + READ_CHUNK_BYTES]
        try:
            got = os.preadv(descriptor, [chunk], entry.start + done)
        except OSError as error:
            raise InputError(
                f"{entry.file} cannot be read: {error.strerror}.", "Check the file and the disk."
            ) from error
        if not got:
            raise _truncated(entry.file)
        done += got
    return buffer.view(getattr(torch, DTYPES[entry.dtype][1])).reshape(entry.shape)


def weights_files(folder: Path) -> tuple[str, ...]:
    """The names of all weights files that belong in `folder`, sorted, by its index or without one.

    Raises:
        InputError: the index is malformed or names a file outside the folder.
    """
    return _files_of(_weight_map(folder))


def _files_of(weight_map: Mapping[str, str] | None) -> tuple[str, ...]:
    return (SINGLE_FILE,) if weight_map is None else tuple(sorted(set(weight_map.values())))


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Tensor name -> file name, or None where there is no index."""
    index = folder / INDEX_FILE
    if not index.exists():
        return None
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} holds no weight map.", "Get the file again.")
    for name, file in weight_map.items():
        if not _is_plain_file_name(file):
            raise InputError(
                f"{index} places the tensor '{name}' in {file!r}, which is no weights file of that folder.",
                "Do not use this checkpoint unless you trust where it comes from.",
            )
    return weight_map


def _is_plain_file_name(file: object) -> bool:
    return (
        isinstance(file, str)
        and file.endswith(".safetensors")
        and not file.startswith(".")
        and not set(file) & set("/\\:\0")
    )


def _is_lm_head(name: str) -> bool:
    return name == "lm_head.weight" or name.endswith(".lm_head.weight") or name == "lm_head.bias"
