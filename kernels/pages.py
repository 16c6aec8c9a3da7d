"""Attention over keys and values that lie in pages: append new ones, and attend where they lie.

A page is 32 tokens of one block: keys [kv_heads, key_dim, 32], values [kv_heads, 32, value_dim]. Rows of many
sequences make one flat batch; `Segments` tells which rows are whose and where their pages are. The plain way
gathers each sequence's pages; the native kernels on CPU and the Triton kernels on CUDA read them in place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from swarm.kernels.attention import attend, attend_plainly
from swarm.kernels.linear import PANEL, native

PAGE = PANEL
"""Tokens of a page."""

VALUE_LANES = 16
"""Rows of values are padded to a multiple of this."""


@dataclass(frozen=True)
class Segment:
    """Rows of one sequence: `rows` of them, at the positions from `first` on; `table` are its pages' numbers.

    `state` is what it keeps instead of pages, where it does; it means nothing here.
    """

    rows: int
    first: int
    table: Sequence[int]
    state: Any = None

    @property
    def length(self) -> int:
        """How many positions the sequence has with these rows."""
        return self.first + self.rows


@dataclass(frozen=True)
class Segments:
    """The segments of a flat batch in the order of its rows, as host numbers in `parts` and as tensors.

    starts: int32 [segments + 1], the first row of each, and the number of rows.
    firsts: int32 [segments], the position of each segment's first row.
    tables: int32 [segments, most pages], the numbers of its pages, filled up with zeros.
    positions: int64 [rows].
    """

    parts: tuple[Segment, ...]
    starts: Tensor
    firsts: Tensor
    tables: Tensor
    positions: Tensor

    @classmethod
    def of(cls, parts: Sequence[Segment], device: torch.device | str = "cpu") -> "Segments":
        starts, positions = [0], list[int]()
        for part in parts:
            starts.append(starts[-1] + part.rows)
            positions += range(part.first, part.length)
        most = max(-(-part.length // PAGE) for part in parts)
        tables = [[*part.table[:most], *[0] * (most - len(part.table))] for part in parts]
        firsts = [part.first for part in parts]
        numbers = [torch.tensor(some, dtype=torch.int32).flatten() for some in (starts, firsts, tables)]
        on_device = _upload([*numbers, torch.tensor(positions, dtype=torch.int32)], torch.device(device))
        return cls(tuple(parts), on_device[0], on_device[1], on_device[2].view(-1, most), on_device[3].long())

    @cached_property
    def slots(self) -> tuple[Tensor, Tensor]:
        """The page of each row and its place there, int64 [rows] each."""
        rows = (self.starts[1:] - self.starts[:-1]).long()
        owners = torch.repeat_interleave(torch.arange(len(self.parts), device=rows.device), rows)
        return self.tables[owners, self.positions // PAGE].long(), self.positions % PAGE

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        """What the native kernels need to know. The tensors must be kept alive."""
        tensors = (self.starts, self.firsts, self.tables)
        return len(self.parts), self.tables.shape[1], *(tensor.data_ptr() for tensor in tensors)


def _upload(tensors: Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
    """Flat int32 tensors on `device`, all in one copy that nobody waits for; each begins at 16 bytes."""
    if device.type == "cpu":
        return tensors
    sizes = [-(-len(one) // 4) * 4 for one in tensors]
    whole = torch.zeros(sum(sizes), dtype=torch.int32).pin_memory()
    for part, one in zip(whole.split(sizes), tensors, strict=True):
        part[: len(one)] = one
    parts = whole.to(device, non_blocking=True).split(sizes)
    return [part[: len(one)] for part, one in zip(parts, tensors, strict=True)]


@dataclass(frozen=True)
class Pages:
    """One block's pages: keys [pages, kv_heads, key_dim, 32], values [pages, kv_heads, 32, value_dim].

    `values` may be a view of rows that are padded.
    """

    keys: Tensor
    values: Tensor

    @classmethod
    def empty(
        cls,
        pages: int,
        heads: int,
        key_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> "Pages":
        padded = -(-value_dim // VALUE_LANES) * VALUE_LANES
        return cls(
            torch.empty(pages, heads, key_dim, PAGE, dtype=dtype, device=device),
            torch.empty(pages, heads, PAGE, padded, dtype=dtype, device=device)[..., :value_dim],
        )

    def copy(self, source: int, target: int) -> None:
        """Give page `target` what page `source` holds."""
        self.keys[target] = self.keys[source]
        self.values[target] = self.values[source]


def append(pages: Pages, keys: Tensor, values: Tensor, segments: Segments) -> None:
    """Write keys [rows, kv_heads, key_dim] and values [rows, kv_heads, value_dim] where they belong."""
    if _is_native(keys):
        assert native is not None
        keys, values = keys.contiguous(), values.contiguous()
        addresses = [tensor.data_ptr() for tensor in (pages.keys, pages.values, keys, values)]
        native.append(*native_numbers(pages, heads=keys.shape[1]), *segments.numbers, *addresses, 1.0, 0.0)
        return
    triton = _triton_kernels(keys.device)
    if triton is not None:
        triton.append(pages.keys, pages.values, keys, values, segments)
        return
    page, slot = segments.slots
    pages.keys[page, :, :, slot] = keys
    pages.values[page, :, slot] = values


def rows_of(pages: Pages, table: Sequence[int], first: int, end: int) -> tuple[Tensor, Tensor]:
    """What `append` was given for positions `[first, end)` of the sequence whose pages `table` has.

    Returns:
        Keys [rows, kv_heads, key_dim] and values [rows, kv_heads, value_dim].
    """
    touched = torch.tensor(table[first // PAGE : -(-end // PAGE)], device=pages.keys.device)
    rows = slice(first % PAGE, first % PAGE + end - first)
    keys = pages.keys[touched].permute(0, 3, 1, 2).flatten(0, 1)
    values = pages.values[touched].transpose(1, 2).flatten(0, 1)
    return keys[rows], values[rows]


def attend_pages(
    query: Tensor,
    pages: Pages,
    segments: Segments,
    *,
    scale: float,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of each row over its sequence, whose pages hold its own keys and values already.

    Args:
        query: [rows, heads, key_dim]; heads is a multiple of kv_heads.
        scale, window, chunk, softcap, sinks: as in `swarm.kernels.attention.attend`.

    Returns:
        [rows, heads, value_dim].
    """
    if _is_native(query):
        return _attend_natively(query, pages, segments, scale, window, chunk, softcap, sinks)
    options: dict[str, Any] = {
        "scale": scale,
        "window": window,
        "chunk": chunk,
        "softcap": softcap,
        "sinks": sinks,
    }
    triton = _triton_kernels(query.device)
    if triton is not None:
        out: Tensor = triton.attend_pages(query, pages.keys, pages.values, segments, **options)
        return out
    return _gathering(attend, query, pages, segments, **options)


def attend_pages_plainly(query: Tensor, pages: Pages, segments: Segments, **options: Any) -> Tensor:
    """The reference: the same result as `attend_pages`, by the formula on gathered pages."""
    return _gathering(attend_plainly, query, pages, segments, **options)


def _gathering(
    attend_one: Callable[..., Tensor], query: Tensor, pages: Pages, segments: Segments, **options: Any
) -> Tensor:
    """Each sequence for itself."""
    rows = query.split([part.rows for part in segments.parts])
    return torch.cat(
        [
            attend_one(own.transpose(0, 1), *_gathered(pages, part), **options).transpose(0, 1)
            for own, part in zip(rows, segments.parts, strict=True)
        ]
    )


def _gathered(pages: Pages, part: Segment) -> tuple[Tensor, Tensor]:
    """Keys and values of one sequence, [kv_heads, length, dim] each."""
    table = torch.tensor(part.table[: -(-part.length // PAGE)], device=pages.keys.device)
    keys = pages.keys[table].permute(1, 0, 3, 2).flatten(1, 2)
    values = pages.values[table].transpose(0, 1).flatten(1, 2)
    return keys[:, : part.length], values[:, : part.length]


def _attend_natively(
    query: Tensor,
    pages: Pages,
    segments: Segments,
    scale: float,
    window: int | None,
    chunk: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    assert native is not None
    query = query.contiguous()
    sinks = None if sinks is None else sinks.float().contiguous()
    out = query.new_empty(query.shape[0], query.shape[1], pages.values.shape[3])
    numbers = native_numbers(pages, heads=query.shape[1], window=window, chunk=chunk, sinks=sinks)
    addresses = [tensor.data_ptr() for tensor in (pages.keys, pages.values, query, out)]
    native.attend(*numbers, *segments.numbers, *addresses, torch.get_num_threads(), scale, softcap or 0.0)
    return out


def native_numbers(
    pages: Pages,
    *,
    heads: int,
    window: int | None = None,
    chunk: int | None = None,
    sinks: Tensor | None = None,
) -> tuple[int, ...]:
    """What the native kernels need to know of attention, scale and softcap aside."""
    _, kv_heads, key_dim, _ = pages.keys.shape
    value_dim, stride = pages.values.shape[3], pages.values.stride(2)
    address = 0 if sinks is None else sinks.data_ptr()
    return heads, kv_heads, key_dim, value_dim, stride, window or 0, chunk or 0, address


def _is_native(tensor: Tensor) -> bool:
    return native is not None and tensor.device.type == "cpu" and tensor.dtype == torch.float32


@cache
def _triton_kernels(device: torch.device) -> Any:
    """The Triton kernels, None where there is no Triton or they do not run on `device`."""
    if device.type != "cuda":
        return None
    try:
        kernels = import_module("swarm.kernels.paged_triton")
    except ImportError:
        return None
    return kernels if kernels.runs_on(device) else None
