"""An imprint: 256 bytes that tell how far apart two computations of the same activations are.

Rows are brought to a like scale, outliers tamed, and multiplied by signs that are the same everywhere. What
comes of it differs by about as much as the rows do, root mean square: rows of other kernels or another dtype
leave nearly the same imprint, rows of other weights another one. It is no hash: who has computed the true
rows can make others with the same imprint.

Source of the idea to commit to activations by a few numbers that survive rounding: TOPLOC (arXiv 2501.16007),
which keeps the largest 128 of 32 tokens. Of the projection: Johnson and Lindenstrauss, by signs (Achlioptas).
"""

from functools import lru_cache
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float32]

SHAPES = 48
"""Numbers that tell of what rows are like but for their scale."""

SCALES = 16
"""Numbers that tell of the scale of rows."""

IMPRINT_BYTES = 4 * (SHAPES + SCALES)
TINY = np.float32(1e-30)


class Difference(NamedTuple):
    """Root mean squares over rows: `shape` over channels, of values near 1; `scale` in powers of two."""

    shape: float
    scale: float


def projected(rows: Floats) -> Floats:
    """What is kept of each row of [rows, width]: [rows, SHAPES + 1], the last of them its scale."""
    sizes = np.abs(rows)
    scale = np.maximum(sizes.mean(axis=1, keepdims=True), TINY)
    sizes /= scale
    sizes += 1
    np.sqrt(sizes, out=sizes)
    tamed = rows / scale
    tamed /= sizes
    shapes = tamed @ _channel_signs(rows.shape[1])
    return np.concatenate([shapes, np.log2(scale)], axis=1)


def imprint(kept: Floats, first: int) -> bytes:
    """The imprint of rows that are the positions from `first` on of a sequence, from what is kept of them."""
    return _summed(kept, first).astype("<f4").tobytes()


def difference(imprinted: bytes, kept: Floats, first: int) -> Difference:
    """How far the rows that left an imprint are from those of which this is kept, at the same positions."""
    apart = np.frombuffer(imprinted, "<f4") - _summed(kept, first)
    return Difference(_root_mean_square(apart[:SHAPES]), _root_mean_square(apart[SHAPES:]))


def differences(kept: Floats, other: Floats) -> list[Difference]:
    """How far rows are apart, one by one, from what is kept of each."""
    apart = kept - other
    shapes = np.sqrt(np.square(apart[:, :SHAPES], dtype=np.float64).mean(axis=1))
    return list(map(Difference, shapes.tolist(), np.abs(apart[:, SHAPES]).tolist()))


def is_imprint(data: bytes) -> bool:
    """Whether it is the bytes of an imprint, and numbers."""
    return len(data) == IMPRINT_BYTES and bool(np.isfinite(np.frombuffer(data, "<f4")).all())


def _summed(kept: Floats, first: int) -> Floats:
    """Sums of what is kept, each row with signs of its position, so that rows do not cancel out."""
    signs = _signs(np.arange(first, first + len(kept), dtype=np.uint64) + np.uint64(1 << 40))
    parts = (signs[:, :SHAPES] * kept[:, :SHAPES], signs[:, SHAPES:] * kept[:, SHAPES:])
    summed: Floats = np.concatenate([part.sum(axis=0, dtype=np.float32) for part in parts])
    return summed / np.float32(np.sqrt(len(kept)))


@lru_cache(maxsize=8)
def _channel_signs(width: int) -> Floats:
    """Of each channel [width, SHAPES], over the root of the width."""
    return _signs(np.arange(width, dtype=np.uint64))[:, :SHAPES] / np.float32(np.sqrt(width))


def _signs(numbers: "npt.NDArray[np.uint64]") -> Floats:
    """64 signs of each number, [numbers, 64], by the bits of its splitmix64 (Steele, Lea and Flood)."""
    with np.errstate(over="ignore"):
        mixed = numbers * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed = mixed ^ (mixed >> np.uint64(31))
    bits = (mixed[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    return (bits.astype(np.float32) * 2 - 1).astype(np.float32)


def _root_mean_square(values: Floats) -> float:
    return float(np.sqrt(np.square(values, dtype=np.float64).mean()))
