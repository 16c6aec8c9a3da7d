"""Weights kept as int8 or nf4, and turned back where they are used: activations are never quantised.

So a row's result does not depend on the rows beside it. int8 keeps one scale a row, as bitsandbytes stores
it; nf4 is bitsandbytes' own, one scale for 64 values. Besides linears, stacks of experts are kept so: they
give one expert's matrix at a time. Knows nothing of models or devices' memory.
"""

import importlib
import logging
import math
import sys
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

QUANTISATIONS = ("int8", "nf4")
NF4_BLOCK = 64
"""Values that share a scale."""

ROWS = 4096
"""Rows that are quantised at once, through a copy in float32."""

CACHED_BYTES = 512 * 2**10
"""What a CPU's core keeps close to it, with room for the rest."""


class Int8Weight(nn.Module):
    """A matrix [..., rows, columns] as int8 with a scale a row."""

    values: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor):
        super().__init__()
        values = torch.empty_like(weight, dtype=torch.int8)
        largest = weight.abs().amax(-1, keepdim=True).float()
        scales = largest.clamp_(min=torch.finfo(torch.float32).tiny) / 127
        columns = weight.shape[-1]
        parts = zip(weight.view(-1, columns).split(ROWS), scales.view(-1, 1).split(ROWS), strict=True)
        for place, (rows, scale) in zip(values.view(-1, columns).split(ROWS), parts, strict=True):
            place.copy_((rows / scale).round_())
        self.register_buffer("values", values)
        self.register_buffer("scales", scales)

    def __getitem__(self, index: int | Tensor) -> Tensor:
        """One matrix of a stack, in float32."""
        return self.values[index] * self.scales[index]

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """[..., columns] times the transposed matrix, in the dtype of `x`."""
        if x.dtype == torch.float16:  # whose sums of values without their scales could overflow
            return linear(x, (self.values * self.scales).to(x.dtype), bias)
        out = (self._unscaled(x) * self.scales[:, 0]).to(x.dtype)
        return out if bias is None else out + bias

    def _unscaled(self, x: Tensor) -> Tensor:
        """The product without the scales; on a CPU in slices that stay in its cache once they are wide."""
        if x.device.type != "cpu":
            return linear(x, self.values.to(x.dtype))
        rows = max(1, CACHED_BYTES // (self.values.shape[1] * x.element_size()))
        return torch.cat([linear(x, part.to(x.dtype)) for part in self.values.split(rows)], -1)


class Nf4Weight(nn.Module):
    """A matrix [..., rows, columns] as nf4, each of a stack for itself."""

    packed: Tensor
    scales: Tensor
    code: Tensor

    def __init__(self, weight: Tensor):
        super().__init__()
        functional = bitsandbytes().functional
        self.shape = weight.shape[-2:]
        parts = [
            functional.quantize_4bit(in_blocks(matrix), blocksize=NF4_BLOCK, quant_type="nf4")
            for matrix in weight.reshape(-1, *self.shape)
        ]
        self.register_buffer("packed", torch.stack([packed for packed, _ in parts]))
        self.register_buffer("scales", torch.stack([state.absmax for _, state in parts]))
        self.register_buffer("code", parts[0][1].code)

    def __getitem__(self, index: int | Tensor) -> Tensor:
        """One matrix of a stack, in float32."""
        # As blocks: bitsandbytes' CPU loops go wrong where a block spans two rows.
        state = self._state(index, torch.Size((self.scales.shape[1], NF4_BLOCK)), torch.float32)
        values: Tensor = bitsandbytes().functional.dequantize_4bit(self.packed[index], state)
        return values.flatten()[: self.shape.numel()].view(self.shape)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """[..., columns] times the transposed matrix, in the dtype of `x`."""
        if self.shape[1] % NF4_BLOCK:
            return linear(x, self[0].to(x.dtype), bias)
        state = self._state(0, self.shape, x.dtype)
        out: Tensor = bitsandbytes().matmul_4bit(x, self.packed[0], quant_state=state, bias=bias)
        return out

    def _state(self, index: int | Tensor, shape: torch.Size, dtype: torch.dtype) -> Any:
        return bitsandbytes().functional.QuantState(
            absmax=self.scales[index],
            shape=shape,
            code=self.code,
            blocksize=NF4_BLOCK,
            quant_type="nf4",
            dtype=dtype,
        )


def in_blocks(matrix: Tensor) -> Tensor:
    """The values of `matrix`, row by row, as [blocks, NF4_BLOCK], the last filled up with zeros."""
    return pad(matrix.flatten(), (0, -matrix.numel() % NF4_BLOCK)).view(-1, NF4_BLOCK)


class QuantisedLinear(nn.Module):
    """`nn.Linear` with quantised weights [out, in]."""

    bias: Tensor | None

    def __init__(self, layer: nn.Linear, kind: str):
        super().__init__()
        self.weight = _quantised(layer.weight, kind)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], in the dtype of `x`."""
        return self.weight.product(x, self.bias)


class QuantisedStack(nn.Module):
    """The matrices of all experts [experts, rows, columns]; `stack[expert]` is one of them, as `dtype`."""

    def __init__(self, weight: Tensor, kind: str):
        super().__init__()
        self.weight = _quantised(weight, kind)
        self.dtype = weight.dtype

    def __getitem__(self, expert: int | Tensor) -> Tensor:
        return self.weight[expert].to(self.dtype)


def quantise(module: nn.Module, kind: str) -> None:
    """Replace every loaded linear and every stack of experts below `module`, one after the other.

    Args:
        kind: one of `QUANTISATIONS`.
    """
    for name, child in list(module.named_children()):
        if type(child) is nn.Linear:
            setattr(module, name, QuantisedLinear(child, kind))
        else:
            quantise(child, kind)
    for name, parameter in list(module.named_parameters(recurse=False)):
        if is_stack(parameter):
            delattr(module, name)
            setattr(module, name, QuantisedStack(parameter.detach(), kind))


def is_stack(parameter: Tensor) -> bool:
    """Whether a parameter that is no linear's holds one matrix an expert, rather than a convolution."""
    return parameter.dim() == 3 and min(parameter.shape[1:]) > 1


def quantised_bytes(shape: torch.Size, kind: str) -> int:
    """What a linear's weight or a stack of `shape` takes as `kind`."""
    count = math.prod(shape)
    if kind == "int8":
        return count + 4 * math.prod(shape[:-1])
    blocks = -(-math.prod(shape[-2:]) // NF4_BLOCK)
    return math.prod(shape[:-2]) * blocks * (NF4_BLOCK // 2 + 4)


def has_bitsandbytes() -> bool:
    """Whether the package that nf4 needs can be imported."""
    try:
        bitsandbytes()
    except ImportError:
        return False
    return True


@cache
def bitsandbytes() -> ModuleType:
    """The package, imported when first needed: it is optional and takes a second.

    On some processors it would fetch code from a model hub, through a package `kernels`, and run it: it
    does without, while that cannot be imported.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says so, and what is not of interest
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "kernels"}
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("bitsandbytes")
    finally:
        del sys.modules["kernels"]
        sys.modules.update(hidden)


def _quantised(weight: Tensor, kind: str) -> Int8Weight | Nf4Weight:
    return Int8Weight(weight.detach()) if kind == "int8" else Nf4Weight(weight.detach())
