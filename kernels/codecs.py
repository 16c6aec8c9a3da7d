"""Tensors as bytes on the wire and back, little-endian, in the dtype both sides agreed on.

`raw` is the values as they are: exact. `scaled` is for float16: one float32 scale a token, then the
values divided by it, since activations of some models (Gemma 3 reaches 103,821) overflow float16. `blocks`
is for int8: one float16 scale for every `BLOCK_VALUES` values of a token, then the values divided by theirs.
The scales of all tokens come before the values.
"""

import sys

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.dlpack import from_dlpack

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "uint32": torch.int32,
}
SCALED_PEAK = 16384.0
"""The largest magnitude of a scaled token: far from float16's limit, with its full precision."""

MAX_SCALE = np.finfo(np.float32).max / np.float32(np.finfo(np.float16).max)
"""The largest scale with which every float16 stays a number."""

BLOCK_VALUES = 32
"""Values of a token that share a scale in `blocks`."""

BLOCK_PEAK = 127
"""The largest magnitude of an int8. With float16's greatest scale it stands for 8.3 million."""

HALF_ULP = 2.0**-25
"""Half the distance of the smallest float16s: with it added, rounding leaves no scale too small."""

SHARED_BYTES = 256 * 1024
"""Read-only bytes from so many on are not copied; with fewer, a copy is cheaper than to go without."""

HALF_EXPONENTS = {"float16": 0x7C00, "bfloat16": 0x7F80}
"""The bits of an exponent, which are all set in what is not a number."""

if sys.byteorder != "little":
    raise ImportError("Swarm sends tensors as little-endian bytes and does not run on big-endian machines.")


def to_wire(tensor: Tensor, dtype: str, codec: str = "raw") -> memoryview:
    """The bytes of a tensor [tokens, width] as `dtype`; no copy where it is already so in CPU memory.

    What is not a number, or beyond what `blocks` can stand for, `is_finite` tells of the bytes.
    """
    tensor = tensor.detach()
    if codec == "raw":
        return _view(tensor.to("cpu", DTYPES[dtype]))
    parts = (_scaled if codec == "scaled" else _in_blocks)(tensor.float())
    return memoryview(b"".join(map(_view, parts)))


def from_wire(data: memoryview | bytes, shape: tuple[int, ...], dtype: str, codec: str = "raw") -> Tensor:
    """A CPU tensor of `shape` from the bytes: with scales a float32 one, raw one that may lie over them.

    The caller has checked the length against `swarm.net.messages.body_bytes`. Whoever writes to the tensor
    may change the bytes.
    """
    if codec == "scaled":
        scales = _tensor(data[: 4 * shape[0]], torch.float32).view(-1, 1)
        return _tensor(data[4 * shape[0] :], torch.float16).view(shape).float().mul_(scales)
    if codec == "blocks":
        blocks = _blocks(shape[-1])
        split = 2 * shape[0] * blocks
        scales = _tensor(data[:split], torch.float16).view(-1, blocks).float()
        return _from_blocks(_tensor(data[split:], torch.int8).view(shape), scales)
    return _tensor(data, DTYPES[dtype]).view(shape)


def is_finite(data: memoryview | bytes, shape: tuple[int, ...], dtype: str, codec: str = "raw") -> bool:
    """Whether the bytes of a tensor of `shape` hold numbers only, told without making a tensor of them.

    The caller has checked the length against `swarm.net.messages.body_bytes`.
    """
    if codec == "scaled":
        scales = np.abs(np.frombuffer(data, np.float32, shape[0]))
        return bool((scales <= MAX_SCALE).all()) and _halves_are_finite(data[4 * shape[0] :], "float16")
    if codec == "blocks":
        return _halves_are_finite(data[: 2 * shape[0] * _blocks(shape[-1])], "float16")
    if dtype == "float32":
        return bool(np.isfinite(np.frombuffer(data, np.float32)).all())
    return _halves_are_finite(data, dtype)


def _halves_are_finite(data: memoryview | bytes, dtype: str) -> bool:
    exponents = HALF_EXPONENTS[dtype]
    return bool((np.frombuffer(data, np.uint16) & exponents).max() < exponents)


def _scaled(values: Tensor) -> tuple[Tensor, Tensor]:
    """Scales, and the values divided by them, as both travel."""
    peaks = values.abs().amax(-1, keepdim=True)
    scales = torch.where(peaks > 0, peaks / SCALED_PEAK, torch.ones_like(peaks))
    return scales, (values / scales).half()


def _in_blocks(values: Tensor) -> tuple[Tensor, Tensor]:
    """As `_scaled`. Where a block has what is no number, or too large a one, its scale is none either."""
    tokens, width = values.shape
    if width % BLOCK_VALUES:
        values = pad(values, (0, -width % BLOCK_VALUES))
    blocks = values.view(tokens, -1, BLOCK_VALUES)
    scales = blocks.abs().amax(-1, keepdim=True).div_(BLOCK_PEAK).add_(HALF_ULP).half()
    inverse = scales.float().clamp_min_(HALF_ULP).reciprocal_()  # the scale of nothing but zeros is zero
    rounded = (blocks * inverse).round_().to(torch.int8)
    return scales, rounded.view(tokens, -1)[:, :width]


def _from_blocks(values: Tensor, scales: Tensor) -> Tensor:
    tokens, width = values.shape
    if width % BLOCK_VALUES:
        return values.float().mul_(scales.repeat_interleave(BLOCK_VALUES, -1)[:, :width])
    blocks = values.view(tokens, -1, BLOCK_VALUES)
    return blocks.float().mul_(scales[..., None]).view(tokens, width)


def _blocks(width: int) -> int:
    return -(-width // BLOCK_VALUES)


def _view(tensor: Tensor) -> memoryview:
    return tensor.cpu().contiguous().view(torch.uint8).numpy().data.cast("B")


def _tensor(data: memoryview | bytes, dtype: torch.dtype) -> Tensor:
    if not memoryview(data).readonly:
        return torch.frombuffer(data, dtype=dtype)
    if len(data) < SHARED_BYTES:
        return torch.frombuffer(bytearray(data), dtype=dtype)
    return from_dlpack(np.frombuffer(data, np.uint8)).view(dtype)
