"""The fast way on CPU: a span's decoder layers in one native call.

Whether it knows their kind is found out by trying: before a span is used, a few tokens go both ways, through
transformers' layers and through the native call, and only a span for which both agree runs so.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from swarm.kernels.layers import FusedLayers, LayerParts, LayerShape
from swarm.kernels.linear import LeanLinear
from swarm.kernels.pages import Pages, Segment, Segments
from swarm.spans import Span

logger = logging.getLogger(__name__)

KNOWN_LAYERS = frozenset(
    {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TRIED_TOKENS = 5
TOLERANCE = 1e-4
"""Largest difference of the two ways that is rounding, relative to the largest value."""

Run: TypeAlias = Callable[[Tensor, Span, Sequence[Pages], Segments], Tensor]
"""Hidden states [rows, hidden] of segments through blocks of the span's model, which keep pages."""


class FusedSpan:
    """A span's model whose layers run natively. Shares all tensors with it."""

    def __init__(self, module: Any, layers: FusedLayers):
        self._rotary = module.rotary_emb
        self._layers = layers

    def run(self, hidden: Tensor, blocks: Span, pages: Sequence[Pages], segments: Segments) -> Tensor:
        """Hidden states [rows, hidden] through `blocks` of the model; `pages` are those of all its blocks."""
        positions = segments.positions[None]
        cos, sin = (part[0].contiguous() for part in self._rotary(hidden[None], position_ids=positions))
        out = hidden.clone(memory_format=torch.contiguous_format)
        self._layers.run(blocks.start, out, cos, sin, pages[blocks.start : blocks.end], segments)
        return out


@torch.inference_mode()
def fuse(module: Any, plainly: Run) -> FusedSpan | None:
    """`module`, what `load_span` gives, made ready for the native call; None where that does not fit.

    `plainly` runs it by transformers' layers.
    """
    if any(type(layer).__name__ not in KNOWN_LAYERS for layer in module.layers):
        return None
    try:
        layers = FusedLayers([_parts(module, layer) for layer in module.layers], _shape(module))
    except (ValueError, AttributeError) as reason:
        logger.debug("the span runs by transformers' layers alone: %s", reason)
        return None
    fused = FusedSpan(module, layers)
    if not _agree(module, fused, plainly):
        logger.warning("the native layers disagree with transformers' own, which are used instead")
        return None
    return fused


def _parts(module: Any, layer: Any) -> LayerParts:
    attention, mlp = layer.self_attn, layer.mlp
    linears = tuple(getattr(attention if name[0] in "qkvo" else mlp, name) for name in LINEARS)
    if not all(isinstance(linear, LeanLinear) for linear in linears):
        raise ValueError("its linears are not lean")
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    is_mistral = type(layer).__name__ == "MistralDecoderLayer"
    return LayerParts(
        attention_norm=layer.input_layernorm.weight,
        mlp_norm=layer.post_attention_layernorm.weight,
        q_norm=None if q_norm is None else q_norm.weight,
        k_norm=None if k_norm is None else k_norm.weight,
        linears=linears,
        window=module.config.sliding_window if is_mistral else getattr(attention, "sliding_window", None),
    )


def _shape(module: Any) -> LayerShape:
    layer, config = module.layers[0], module.config
    attention = layer.self_attn
    return LayerShape(
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        dim=attention.head_dim,
        intermediate=config.intermediate_size,
        eps=layer.input_layernorm.variance_epsilon,
        scale=attention.scaling,
    )


def _agree(module: Any, fused: FusedSpan, plainly: Run) -> bool:
    """Whether a few random tokens of two sessions come out alike both ways, the last one on its own."""
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(TRIED_TOKENS, module.config.hidden_size, generator=rng)
    first = Segments.of([Segment(1, 0, [1]), Segment(TRIED_TOKENS - 2, 0, [0])])
    last = Segments.of([Segment(1, TRIED_TOKENS - 2, [0])])
    span, shape = Span(0, len(module.layers)), _shape(module)

    def outcome(run: Run) -> Tensor:
        pages = [
            Pages.empty(2, shape.kv_heads, shape.dim, shape.dim, torch.float32, "cpu") for _ in module.layers
        ]
        return torch.cat([run(hidden[:-1], span, pages, first), run(hidden[-1:], span, pages, last)])

    plain = outcome(plainly)
    return bool((outcome(fused.run) - plain).abs().max() <= TOLERANCE * plain.abs().max())
