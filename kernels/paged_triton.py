"""Attention over pages on a GPU: keys and values are read where they lie, and never copied together.

The flat batch is cut in tiles, each some rows of one segment with the query heads that share a KV head. A
program takes a tile and a part of its pages: one part where the tiles alone fill the GPU, more where they
do not, so that a few long sessions use all of it too; a second kernel then combines the parts. Scores, the
softmax and the sums are float32. Knows nothing of sessions, of the pool, or of what a page holds besides.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor

from swarm.kernels.pages import PAGE, Segments
from swarm.kernels.triton_programs import LOG2E, append_rows, attend_tile, combine_parts

APPENDED = 16
"""Rows that one program of `append` writes."""

PROGRAMS_A_PROCESSOR = 2
"""Pages are shared out in parts until each multiprocessor has so many programs."""

MOST_PARTS = 64
PART_BYTES = 32 * 2**20
"""What the parts of a batch may take together before they are combined."""

MOST_HEADS = 16
"""Query heads of one KV head in a tile; more are further tiles."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """`queries`: (row, head) pairs of a tile, `pages`: read at a time; `warps` and `stages` as Triton's."""

    queries: int
    pages: int
    warps: int
    stages: int


def runs_on(device: torch.device) -> bool:
    """Whether these are made for `device`: an NVIDIA GPU since Ampere."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def append(keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor, segments: Segments) -> None:
    """Write each row's keys and values to where its position stands in its segment's pages.

    Args:
        keys: [pages, kv_heads, key_dim, 32].
        values: [pages, kv_heads, 32, value_dim].
        new_keys: [rows, kv_heads, key_dim].
        new_values: [rows, kv_heads, value_dim].
    """
    rows, kv_heads, key_dim = new_keys.shape
    if rows == 0:
        return
    value_dim = new_values.shape[2]
    append_rows[(triton.cdiv(rows, APPENDED), kv_heads)](
        keys,
        values,
        new_keys,
        new_values,
        segments.starts,
        segments.firsts,
        segments.tables,
        segments.tables.shape[1],
        rows,
        len(segments.parts),
        len(segments.parts).bit_length(),
        keys.stride(),
        values.stride(),
        new_keys.stride(),
        new_values.stride(),
        PAGE=PAGE,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        ROWS=APPENDED,
        KEYS=triton.next_power_of_2(key_dim),
        VALUES=triton.next_power_of_2(value_dim),
        enable_fp_fusion=True,
    )


def attend_pages(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    segments: Segments,
    *,
    scale: float,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of a flat batch over its pages, [rows, heads, value_dim].

    Args:
        query: [rows, heads, key_dim], the rows of all segments behind each other; heads is a multiple of
            kv_heads.
        keys: [pages, kv_heads, key_dim, 32].
        values: [pages, kv_heads, 32, value_dim]. What `append` did not write is not looked at.
        segments: their rows are in the pages already.
        scale, window, chunk, softcap, sinks: as in `swarm.kernels.pages.attend_pages`.
    """
    rows, heads, key_dim = query.shape
    out = query.new_empty(rows, heads, values.shape[3])
    few, many = tilings(key_dim, values.shape[3], keys.dtype)
    heads_a_tile = min(heads // keys.shape[1], MOST_HEADS)
    most, tile = few.queries // heads_a_tile, many.queries // heads_a_tile
    count, long = len(segments.parts), [part.rows for part in segments.parts if part.rows > most]
    tensors, options = (query, keys, values, out), (scale, window, chunk, softcap, sinks)
    if len(long) < count:
        _launch(few, (1, most), count, count - len(long), tensors, segments, options)
    if long:
        filled = sum(triton.cdiv(part, tile) for part in long)
        _launch(many, (most + 1, rows), rows // tile + count, filled, tensors, segments, options)
    return out


def tilings(key_dim: int, value_dim: int, dtype: torch.dtype) -> tuple[Tiling, Tiling]:
    """How to cut segments of few rows, and of many.

    Chosen so that registers hold a tile and 99 KiB of shared memory its pages, as GPUs have since Ampere.
    """
    dims = key_dim + value_dim
    if dtype == torch.float32:  # by scalar arithmetic: tensor cores would round
        return Tiling(16, 1, 8, 1), Tiling(32 if dims <= 256 else 16, 1, 8, 1)
    if dims <= 256:
        return Tiling(16, 2, 4, 3), Tiling(128, 2, 8, 2)
    if dims <= 512:
        return Tiling(16, 1, 4, 3), Tiling(64, 1, 8, 2)
    return Tiling(16, 1, 8, 2), Tiling(16, 1, 8, 2)


def key_dims(key_dim: int) -> tuple[int, int]:
    """Two powers of two that together hold `key_dim`: 192 is 128 and 64. The second may be 0."""
    whole = max(16, 1 << key_dim.bit_length() - 1)
    return whole, max(16, triton.next_power_of_2(key_dim - whole)) if key_dim > whole else 0


def parts_for(tiles: int, most_pages: int, processors: int) -> int:
    """In how many parts the pages of each tile are read; 1 where the tiles fill the GPU."""
    wanted = PROGRAMS_A_PROCESSOR * processors // tiles
    return max(1, min(wanted, most_pages // 4, MOST_PARTS))


def _launch(
    tiling: Tiling,
    taken: tuple[int, int],
    tiles: int,
    filled: int,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    segments: Segments,
    options: tuple[float, int | None, int | None, float | None, Tensor | None],
) -> None:
    """Attention of the segments with `taken` rows, ends included: `tiles`, of which `filled` have rows."""
    query, keys, values, out = tensors
    scale, window, chunk, softcap, sinks = options
    kv_heads, heads, value_dim = keys.shape[1], *out.shape[1:]
    group = heads // kv_heads
    fold = min(group, MOST_HEADS)
    columns = kv_heads * triton.cdiv(group, fold)
    slots = tiles * (tiling.queries // fold) if taken[0] == 1 else len(query)
    bounds = [n // PAGE + 2 for n in (window, chunk) if n is not None]
    parts = min(
        parts_for(filled * columns, min([segments.tables.shape[1], *bounds]), _processors(query.device)),
        max(1, PART_BYTES // (slots * heads * value_dim * 4)),
    )
    whole, rest = key_dims(keys.shape[2])
    shape = {
        "GROUP": group,
        "FOLD": fold,
        "QUERIES": tiling.queries,
        "LEAST": taken[0],
        "VALUE_DIM": value_dim,
    }
    target, weights = out, None
    if parts > 1:
        target, weights = (
            query.new_empty((slots, heads, parts, *dims), dtype=torch.float32) for dims in ((value_dim,), ())
        )
    attend_tile[(tiles, columns, parts)](
        query,
        keys,
        values,
        target,
        weights,
        segments.starts,
        segments.firsts,
        segments.tables,
        segments.tables.shape[1],
        len(segments.parts),
        taken[1],
        parts,
        scale * LOG2E.value,
        window,
        chunk,
        None if softcap is None else softcap * LOG2E.value,
        sinks,
        query.stride(),
        keys.stride(),
        values.stride(),
        out.stride(),
        KEY_DIM=keys.shape[2],
        KEYS=whole,
        REST=rest,
        VALUES=max(16, triton.next_power_of_2(value_dim)),
        PAGE=PAGE,
        PAGES=tiling.pages,
        **shape,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        enable_fp_fusion=True,
    )
    if weights is not None:
        combine_parts[(tiles, columns, tiling.queries // fold * fold)](
            target,
            weights,
            out,
            segments.starts,
            len(segments.parts),
            taken[1],
            parts,
            out.stride(),
            VALUES=triton.next_power_of_2(value_dim),
            PARTS=MOST_PARTS,
            **shape,
            enable_fp_fusion=True,
        )


@lru_cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
