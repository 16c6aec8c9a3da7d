"""Tensors as bytes on the wire and back, little-endian, in the dtype both sides agreed on.

`raw` is the values as they are: exact. `scaled` is for float16: one float32 scale a token, then the
values divided by it, since activations of some models (Gemma 3 reaches 103,821) overflow float16.
"""

import sys

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


def _view(tensor: Tensor) -> memoryview:
    return tensor.view(torch.uint8).numpy().data.cast("B")


def _tensor(data: memoryview | bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data) if memoryview(data).readonly else data, dtype=dtype)
