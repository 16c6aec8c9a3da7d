"""Linear layers for CPU, where a step on few rows is as fast as its weights come from memory.

A `LeanLinear` keeps its weights as float16 or float32 and computes in float32: float16 halves the memory
traffic and loses only the rounding of the weights. Our native kernels read the weights in panels of rows
that lie together; what a row of the input gives does not depend on the rows beside it. Without the native
kernels float16 weights are packed for torch's own.
"""

from types import ModuleType
from typing import cast

import torch
from torch import Tensor, nn

native: ModuleType | None
try:
    from swarm.kernels import _native
except ImportError:
    native = None
else:
    native = _native if _native.instruction_sets() else None

PANEL = 32
"""Rows of a weight that the native kernels take together, and tokens of a page."""


def has_native() -> bool:
    """Whether the native kernels were built and this processor runs them."""
    return native is not None


def can_keep_half() -> bool:
    """Whether float16 weights are fast here: natively, or packed by torch."""
    return has_native() or "fbgemm" in torch.backends.quantized.supported_engines


class LeanLinear(nn.Module):
    """`nn.Linear` on CPU with float32 activations and sums, and weights in `panels` [panels, in, 32]."""

    panels: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        """`weight` is [out, in], of any floating dtype; it is kept as `dtype`."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("panels", in_panels(weight.detach(), dtype))
        self.register_buffer("bias", None if bias is None else bias.detach().float().contiguous())
        self._is_half = int(dtype == torch.float16)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], both float32."""
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], self.out_features)
        assert native is not None
        assert x.dtype == torch.float32
        if x.numel():
            native.multiply(
                x.data_ptr(),
                self.panels.data_ptr(),
                0 if self.bias is None else self.bias.data_ptr(),
                out.data_ptr(),
                x.numel() // self.in_features,
                self.out_features,
                self.in_features,
                self._is_half,
                torch.get_num_threads(),
            )
        return out


def in_panels(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[out, in] as the native kernels read it: [panels, in, 32], the last panel filled up with zeros."""
    rows, columns = weight.shape
    panels = weight.new_zeros(-(-rows // PANEL), columns, PANEL, dtype=dtype)
    for at in range(0, rows, PANEL):  # panel by panel, so that no second copy of the weight is made
        part = weight[at : at + PANEL]
        panels[at // PANEL, :, : len(part)] = part.T
    return panels


class PackedLinear(nn.Module):
    """The same with float16 weights in the layout of torch's own kernel."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        bias = None if bias is None else bias.detach().float()
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight.detach().float().contiguous(), bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], both float32."""
        return cast(Tensor, torch.ops.quantized.linear_dynamic_fp16(x, self._packed))


def lean_linear(layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
    """The fastest layer on this CPU with float32 activations and weights as `dtype` (float16 or float32)."""
    if has_native():
        return LeanLinear(layer.weight, layer.bias, dtype)
    return PackedLinear(layer.weight, layer.bias) if dtype == torch.float16 else layer


def make_linears_lean(module: nn.Module, dtype: torch.dtype) -> None:
    """Replace every loaded `nn.Linear` below `module` by `lean_linear`."""
    for name, child in list(module.named_children()):
        if type(child) is nn.Linear:  # a subclass computes something else, like a router
            setattr(module, name, lean_linear(child, dtype))
        else:
            make_linears_lean(child, dtype)
