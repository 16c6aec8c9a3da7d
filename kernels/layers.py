"""Rows of many sessions through decoder layers of the Llama family in one native call, on CPU.

On few rows, the dozens of small operations of a layer take longer than its weights take to come from
memory. The plain reference is the layer itself: the result is the same up to floating-point rounding, and
for each row the same bit for bit whatever rows are beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swarm.kernels.linear import LeanLinear, native
from swarm.kernels.pages import Pages, Segments, native_numbers


@dataclass(frozen=True)
class LayerParts:
    """What a layer is made of: norms [hidden] (or [dim] and optional, for queries and keys) and linears.

    `linears` are query, key, value, output, gate, up and down; `window` is how many positions a query
    sees, its own included, None for all.
    """

    attention_norm: Tensor
    mlp_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    linears: tuple[LeanLinear, ...]
    window: int | None

    def tensors(self) -> list[Tensor | None]:
        """In the order of the native struct."""
        weights = [layer.panels for layer in self.linears]
        biases = [layer.bias for layer in self.linears]
        return [self.attention_norm, self.mlp_norm, self.q_norm, self.k_norm, *weights, *biases]


@dataclass(frozen=True)
class LayerShape:
    """Sizes that all layers share; `eps` is that of the norms, `scale` the factor on attention scores."""

    hidden: int
    heads: int
    kv_heads: int
    dim: int
    intermediate: int
    eps: float
    scale: float


class FusedLayers:
    """Layers made ready for the native call. Keeps their tensors alive."""

    def __init__(self, layers: Sequence[LayerParts], shape: LayerShape):
        """
        Raises:
            ValueError: there is no native call here, or it does not take such layers.
        """
        if native is None:
            raise ValueError("the native kernels were not built, or not for this processor")
        _check(layers, shape)
        self.shape = shape
        self._layers = layers
        self._is_half = int(layers[0].linears[0].panels.dtype == torch.float16)
        self._structs = torch.tensor(
            [[*map(_address, layer.tensors()), layer.window or 0] for layer in layers], dtype=torch.int64
        )

    def run(
        self, first: int, x: Tensor, cos: Tensor, sin: Tensor, pages: Sequence[Pages], segments: Segments
    ) -> None:
        """`x` [rows, hidden] through the layers from `first` on, as many as there are `pages`; in place.

        Keys and values of all rows are written to the pages. `cos` and `sin` are rotary embeddings
        [rows, dim]; all three contiguous float32.
        """
        shape, rows = self.shape, x.shape[0]
        assert native is not None
        assert first + len(pages) <= len(self._layers)
        assert x.shape == (rows, shape.hidden)
        assert cos.shape == sin.shape == (rows, shape.dim)
        assert all(tensor.is_contiguous() and tensor.dtype == torch.float32 for tensor in (x, cos, sin))
        addresses = torch.tensor([[one.keys.data_ptr(), one.values.data_ptr()] for one in pages])
        native.run_layers(
            *native_numbers(pages[0], heads=shape.heads),
            *segments.numbers,
            self._structs[first].data_ptr(),
            addresses.data_ptr(),
            len(pages),
            x.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            rows,
            shape.hidden,
            shape.intermediate,
            self._is_half,
            torch.get_num_threads(),
            shape.scale,
            0.0,
            shape.eps,
        )


def _check(layers: Sequence[LayerParts], shape: LayerShape) -> None:
    wide, narrow = shape.heads * shape.dim, shape.kv_heads * shape.dim
    sizes = [(wide, shape.hidden), *[(narrow, shape.hidden)] * 2, (shape.hidden, wide)]
    sizes += [*[(shape.intermediate, shape.hidden)] * 2, (shape.hidden, shape.intermediate)]
    dtype = layers[0].linears[0].panels.dtype
    if shape.dim % 2:
        raise ValueError("heads of an odd size cannot be rotated in halves")
    for layer in layers:
        if [(linear.out_features, linear.in_features) for linear in layer.linears] != sizes:
            raise ValueError("the linears do not have the sizes of such a layer")
        if any(linear.panels.dtype != dtype for linear in layer.linears):
            raise ValueError("the linears are not of one dtype")
        norms = (layer.attention_norm, layer.mlp_norm, layer.q_norm, layer.k_norm)
        widths = (shape.hidden, shape.hidden, shape.dim, shape.dim)
        for norm, width in zip(norms, widths, strict=True):
            if norm is not None and (norm.shape != (width,) or norm.dtype != torch.float32):
                raise ValueError("a norm does not have the size or dtype of such a layer's")


def _address(tensor: Tensor | None) -> int:
    assert tensor is None or tensor.is_contiguous()
    return 0 if tensor is None else tensor.data_ptr()
