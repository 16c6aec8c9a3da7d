"""The fast way for a few tokens: a span's decoder layers in one native call.

Whether it knows their kind is found out by trying: before a span is used, a few tokens go both ways, through
transformers' layers and through the native call, and only a span for which both agree is decoded so.
"""

import logging
from typing import Any

import torch
from torch import Tensor

from swarm.blocks.kv import SessionKV
from swarm.kernels.decode import FusedLayers, LayerParts, LayerShape
from swarm.kernels.linear import LeanLinear
from swarm.spans import Span

logger = logging.getLogger(__name__)

KNOWN_LAYERS = frozenset(
    {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TRIED_TOKENS = 5
TOLERANCE = 1e-4
"""Largest difference of the two ways that is rounding, relative to the largest value."""


class FusedSpan:
    """A span's model whose layers run natively. Shares all tensors with it."""

    def __init__(self, module: Any, layers: FusedLayers):
        self.max_rows = layers.max_rows
        self._rotary = module.rotary_emb
        self._layers = layers

    def run(self, hidden: Tensor, session: SessionKV, positions: Tensor) -> Tensor:
        """At most `max_rows` hidden states [rows, hidden] through the session's blocks, from its end on.

        `positions` are those of the rows: [rows].
        """
        shape = self._layers.shape
        cos, sin = (part[0].contiguous() for part in self._rotary(hidden[None], position_ids=positions[None]))
        out = hidden.clone(memory_format=torch.contiguous_format)
        slabs = session.addresses(shape.kv_heads, shape.dim, hidden)
        self._layers.run(session.blocks.start, out, cos, sin, slabs, session.length, session.capacity)
        session.grow(len(hidden))
        return out


@torch.inference_mode()
def fuse(module: Any) -> FusedSpan | None:
    """`module`, what `load_span` gives, made ready for the native call; None where that does not fit."""
    if any(type(layer).__name__ not in KNOWN_LAYERS for layer in module.layers):
        return None
    try:
        layers = FusedLayers([_parts(module, layer) for layer in module.layers], _shape(module))
    except (ValueError, AttributeError) as reason:
        logger.debug("the span is decoded by transformers' layers alone: %s", reason)
        return None
    fused = FusedSpan(module, layers)
    if not _agrees(module, fused):
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


def _agrees(module: Any, fused: FusedSpan) -> bool:
    """Whether a few random tokens come out alike both ways, decoded one by one."""
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(TRIED_TOKENS, module.config.hidden_size, generator=rng)
    positions = torch.arange(TRIED_TOKENS)
    span = Span(0, len(module.layers))
    plain = module(
        inputs_embeds=hidden[None],
        position_ids=positions[None],
        past_key_values=SessionKV(span, TRIED_TOKENS),
        use_cache=True,
    ).last_hidden_state[0]
    session = SessionKV(span, TRIED_TOKENS)
    rows = [fused.run(hidden[at : at + 1], session, positions[at : at + 1]) for at in range(TRIED_TOKENS)]
    return bool((torch.cat(rows) - plain).abs().max() <= TOLERANCE * plain.abs().max())
