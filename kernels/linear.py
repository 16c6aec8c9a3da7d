"""Linear layers for decoding on CPU, where a step is as fast as its weights come from memory.

A `LeanLinear` keeps its weights as float16 or float32 and computes in float32: float16 halves the memory
traffic and loses only the rounding of the weights. Few rows go through our native loops where the
processor has them, many rows through torch's float32 product. Without the native loops float16 weights
are packed for torch's own kernel.
"""

from types import ModuleType
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

native: ModuleType | None
try:
    from swarm.kernels import _native
except ImportError:
    native = None
else:
    native = _native

FEW_ROWS = {torch.float16: 16, torch.float32: 2}
"""Up to how many rows the native loops beat torch, by the dtype of the weights."""


def has_native() -> bool:
    """Whether the native loops were built and this processor runs them."""
    return native is not None and bool(native.is_supported())


def can_keep_half() -> bool:
    """Whether float16 weights are fast here: natively, or packed by torch."""
    return has_native() or "fbgemm" in torch.backends.quantized.supported_engines


class LeanLinear(nn.Module):
    """`nn.Linear` on CPU with float32 activations and sums; weights [out, in] as `dtype`."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight.detach().to(dtype).contiguous())
        self.register_buffer("bias", None if bias is None else bias.detach().float().contiguous())
        self._few_rows = FEW_ROWS[dtype]
        self._is_half = int(dtype == torch.float16)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], both float32."""
        rows = x.numel() // self.in_features
        if rows > self._few_rows or not rows:
            return linear(x, self.weight.float(), self.bias)
        assert native is not None
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], self.out_features)
        bias = 0 if self.bias is None else self.bias.data_ptr()
        native.linear(
            x.data_ptr(),
            self.weight.data_ptr(),
            bias,
            out.data_ptr(),
            rows,
            self.out_features,
            self.in_features,
            self._is_half,
            torch.get_num_threads(),
        )
        return out


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
        if isinstance(child, nn.Linear):
            setattr(module, name, lean_linear(child, dtype))
        else:
            make_linears_lean(child, dtype)
