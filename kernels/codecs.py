"""Tensors as bytes on the wire and back, little-endian, in the dtype both sides agreed on.

`raw` is the values as they are: exact. `scaled` is for float16: one float32 scale a token, then the
values divided by it, since activations of some models (Gemma 3 reaches 103,821) overflow float16.
"""

import sys

import numpy as np
import torch
from torch import Tensor

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "uint32": torch.int32,
}
SCALED_PEAK = 16384.0
"""The largest magnitude of a scaled token: far from float16's limit, with its full precision."""

MAX_SCALE = np.finfo(np.float32).max / np.float32(np.finfo(np.float16).max)
"""The largest scale with which every float16 stays a number."""

HALF_EXPONENTS = {"float16": 0x7C00, "bfloat16": 0x7F80}
"""The bits of an exponent, which are all set in what is not a number."""

if sys.byteorder != "little":
    raise ImportError("Swarm sends tensors as little-endian bytes and does not run on big-endian machines.")


def to_wire(tensor: Tensor, dtype: str, codec: str = "raw") -> memoryview:
    """The bytes of a tensor [tokens, width] as `dtype`; no copy where it is already so in CPU memory."""
    if codec == "scaled":
        peaks = tensor.float().abs().amax(-1, keepdim=True)
        scales = torch.where(peaks > 0, peaks / SCALED_PEAK, torch.ones_like(peaks))
        return memoryview(
            _view(scales.cpu()).tobytes() + _view((tensor.float() / scales).half().cpu()).tobytes()
        )
    return _view(tensor.detach().to("cpu", DTYPES[dtype]).contiguous())


def from_wire(data: memoryview | bytes, shape: tuple[int, ...], dtype: str, codec: str = "raw") -> Tensor:
    """A CPU tensor of `shape` over (raw) or from (scaled, as float32) the bytes.

    The caller has checked the length against `swarm.net.messages.body_bytes`.
    """
    if codec == "scaled":
        scales = _tensor(data[: 4 * shape[0]], torch.float32).view(-1, 1)
        return _tensor(data[4 * shape[0] :], torch.float16).view(shape).float() * scales
    return _tensor(data, DTYPES[dtype]).view(shape)


def is_finite(data: memoryview | bytes, shape: tuple[int, ...], dtype: str, codec: str = "raw") -> bool:
    """Whether the bytes of a tensor of `shape` hold numbers only, told without making a tensor of them.

    The caller has checked the length against `swarm.net.messages.body_bytes`.
    """
    if codec == "scaled":
        scales = np.abs(np.frombuffer(data, np.float32, shape[0]))
        return bool((scales <= MAX_SCALE).all()) and _halves_are_finite(data[4 * shape[0] :], "float16")
    if dtype == "float32":
        return bool(np.isfinite(np.frombuffer(data, np.float32)).all())
    return _halves_are_finite(data, dtype)


def _halves_are_finite(data: memoryview | bytes, dtype: str) -> bool:
    exponents = HALF_EXPONENTS[dtype]
    return bool((np.frombuffer(data, np.uint16) & exponents).max() < exponents)


def _view(tensor: Tensor) -> memoryview:
    return tensor.view(torch.uint8).numpy().data.cast("B")


def _tensor(data: memoryview | bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data) if memoryview(data).readonly else data, dtype=dtype)
