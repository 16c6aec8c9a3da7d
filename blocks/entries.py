"""The tensor table at the head of a safetensors file, and what is known of a tensor before it is read.

Headers are parsed here rather than through the safetensors library, since byte ranges are what makes
reading a span cheap. Layout: https://github.com/huggingface/safetensors#format. Knows nothing of models,
nor of where files lie.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from swarm.blocks.storage import Storage, truncated
from swarm.errors import InputError

MAX_HEADER_BYTES = 100_000_000
FIRST_READ_BYTES = 2**16
"""Most headers are shorter, and a storage far away is asked once."""

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


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes `[start, end)` of `file`, which belong at byte `at` of a tensor.

    They lie together there, or in runs of `run` bytes that are `stride` bytes apart.
    """

    file: str
    start: int
    end: int
    at: int = 0
    run: int = 0
    stride: int = 0

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor, put together from its pieces. Tensors with the same pieces share their storage."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype][0]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize


def read_header(storage: Storage, file: str) -> dict[str, TensorEntry]:
    """The tensor table of one safetensors file, every entry checked against the file's size.

    Raises:
        InputError: the file is missing, truncated, or not a well-formed safetensors file.
        SwarmError: what gives the file does not answer.
    """
    where = storage.where(file)
    with storage.open(file) as opened:
        head = memoryview(bytearray(min(FIRST_READ_BYTES, opened.size)))
        opened.read_into(head, 0)
        length = int.from_bytes(head[:8], "little")
        if opened.size < 8 or length > opened.size - 8:
            raise truncated(where)
        if length > MAX_HEADER_BYTES:
            raise _malformed(where, "its header is larger than 100 MB")
        text = bytearray(length)
        text[: len(head) - 8] = head[8 : 8 + length]
        if length > len(head) - 8:
            opened.read_into(memoryview(text)[len(head) - 8 :], len(head))
    table = _table(where, file, bytes(text))
    _check_layout(where, table, 8 + length, opened.size)
    return table


def _table(where: str, file: str, text: bytes) -> dict[str, TensorEntry]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _malformed(where, "its header is not JSON") from error
    if not isinstance(header, dict):
        raise _malformed(where, "its header is not a JSON object")
    header.pop("__metadata__", None)
    return {name: _entry(where, file, name, value, 8 + len(text)) for name, value in header.items()}


def _entry(where: str, file: str, name: str, value: object, data_start: int) -> TensorEntry:
    match value:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(end)]}:
            pass
        case _:
            raise _malformed(where, f"the entry of '{name}' lacks its dtype, shape or offsets")
    if dtype not in DTYPES:
        raise _malformed(where, f"'{name}' has the unknown dtype '{dtype}'")
    if not all(type(side) is int and side >= 0 for side in shape):
        raise _malformed(where, f"'{name}' has an impossible shape")
    if not 0 <= start <= end or end - start != math.prod(shape) * DTYPES[dtype][0]:
        raise _malformed(where, f"the bytes of '{name}' do not match its shape")
    return TensorEntry(name, dtype, tuple(shape), (Piece(file, data_start + start, data_start + end),))


def _check_layout(where: str, table: Mapping[str, TensorEntry], data_start: int, size: int) -> None:
    """Tensors may share all their bytes, which are then read once, but not some of them."""
    position, before = data_start, data_start
    for entry in sorted(table.values(), key=lambda entry: (entry.pieces[0].start, entry.pieces[0].end)):
        piece = entry.pieces[0]
        if piece.start < position and (piece.start, piece.end) != (before, position):
            raise _malformed(where, f"the bytes of '{entry.name}' overlap another tensor's")
        before, position = piece.start, piece.end
    if position > size:
        raise truncated(where)


def _malformed(where: str, reason: str) -> InputError:
    return InputError(f"{where} is not a usable safetensors file: {reason}.", "Get the file again.")
