"""transformers' layers that do not fit a batch of many sessions as they are, adapted.

Each is a subclass with the same weights under the same names, which computes the same. They hand their
queries, keys and values to the attention function of the config like every other layer. Knows nothing of
sessions, nor of how attention reads what was kept.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    apply_rotary_pos_emb,
    apply_rotary_pos_emb_interleave,
)
from transformers.models.llama4.modeling_llama4 import Llama4TextAttention, Llama4TextMoe


class _Weight(nn.Module):
    """A matrix that is not used as a linear layer, under the name that it has in one."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)


class LatentAttention(DeepseekV3Attention):
    """DeepSeek's attention over its latents themselves.

    transformers expands the latent of every token so far to keys and values of all heads, in each step.
    Here the expanding matrices are folded into the query and the output, so that all heads share one key
    [kv_lora_rank + qk_rope_head_dim] and one value [kv_lora_rank] a token, and what is kept is read in place.
    Source: DeepSeek-V2 (https://arxiv.org/abs/2405.04434), section 2.1.2.
    """

    def __init__(self, config: Any, layer_idx: int):
        super().__init__(config, layer_idx)
        self.kv_b_proj = _Weight(self.kv_b_proj.weight)  # type: ignore[assignment]
        self.num_key_value_groups = self.num_heads

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states [1, tokens, hidden] in and out."""
        query, key, value = self._projected(hidden_states, position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        mixed, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
        _, to_value = self._expanding()
        out = mixed.transpose(1, 2) @ to_value.transpose(1, 2)
        return self.o_proj(out.transpose(1, 2).flatten(2)), weights

    def _projected(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [1, heads, tokens, dim], keys [1, 1, tokens, dim], values [1, 1, tokens, kv_lora_rank]."""
        query = hidden_states
        for project in (self.q_proj, self.q_a_proj, self.q_a_layernorm, self.q_b_proj):
            query = query if project is None else project(query)
        query = query.unflatten(2, (self.num_heads, self.qk_head_dim)).transpose(1, 2)
        still, turned = query.split([self.qk_nope_head_dim, self.qk_rope_head_dim], -1)
        compressed = self.kv_a_proj_with_mqa(hidden_states)[:, None]
        latent, shared = compressed.split([self.kv_lora_rank, self.qk_rope_head_dim], -1)
        latent = self.kv_a_layernorm(latent)
        rotate = apply_rotary_pos_emb_interleave if self.config.rope_interleave else apply_rotary_pos_emb
        turned, shared = rotate(turned, shared, *position_embeddings)
        to_key, _ = self._expanding()
        return torch.cat((still @ to_key, turned), -1), torch.cat((latent, shared), -1), latent

    def _expanding(self) -> tuple[Tensor, Tensor]:
        """What expands a latent to each head's key and value: [heads, dim, kv_lora_rank] both."""
        weight: Tensor = self.kv_b_proj.weight.view(self.num_heads, -1, self.kv_lora_rank)
        to_key, to_value = weight.split([self.qk_nope_head_dim, self.v_head_dim], 1)
        return to_key, to_value


class Llama4Attention(Llama4TextAttention):
    """Llama 4's: a query sees its own chunk of `chunk` positions alone, or all where that is None.

    transformers' layer counts positions on from one session's length to temper its queries, and leaves the
    chunks to a mask. Here both are left to the attention function: see `temper` and `chunk`.
    """

    def __init__(self, config: Any, layer_idx: int):
        super().__init__(config, layer_idx)
        is_chunked = config.layer_types[layer_idx] == "chunked_attention"
        self.chunk: int | None = config.attention_chunk_size if is_chunked else None
        self.is_tempered = bool(self.attn_temperature_tuning and not self.use_rope)
        self.attn_temperature_tuning = False

    def temper(self, query: Tensor, positions: Tensor) -> Tensor:
        """Queries [..., tokens, dim] at `positions` [tokens], scaled as these ask for."""
        if not self.is_tempered:
            return query
        steps = torch.floor((positions.float() + 1.0) / self.floor_scale)
        scales = torch.log1p(steps) * self.attn_scale + 1.0
        return (query * scales[:, None]).to(query.dtype)


class Llama4Moe(Llama4TextMoe):
    """Llama 4's experts, each given the rows that chose it; transformers gives every expert every row."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [1, tokens, hidden] to [tokens, hidden], and the router's [tokens, experts]."""
        rows = hidden_states.reshape(-1, self.hidden_dim)
        scores, logits = self.router(rows)
        out: Tensor = self.shared_expert(rows)
        chosen = logits.topk(self.top_k, dim=-1).indices
        for expert in chosen.unique().tolist():
            hit = (chosen == expert).any(-1).nonzero()[:, 0]
            taken = rows[hit] * scores[hit, expert, None]
            gate, up = (taken @ self.experts.gate_up_proj[expert]).chunk(2, -1)
            out.index_add_(0, hit, (up * self.experts.act_fn(gate)) @ self.experts.down_proj[expert])
        return out, logits


def adapt(layer: nn.Module, config: Any, block: int) -> None:
    """Give decoder layer `block` of a model not yet loaded our parts where transformers' do not fit."""
    if type(getattr(layer, "self_attn", None)) is DeepseekV3Attention:
        layer.self_attn = LatentAttention(config, block)
    if type(getattr(layer, "self_attn", None)) is Llama4TextAttention:
        layer.self_attn = Llama4Attention(config, block)
    if type(getattr(layer, "feed_forward", None)) is Llama4TextMoe:
        layer.feed_forward = Llama4Moe(config)


def temper(module: nn.Module, query: Tensor, positions: Tensor) -> Tensor:
    """Queries [..., tokens, dim] of attention layer `module`, scaled by position where it asks for that."""
    return module.temper(query, positions) if isinstance(module, Llama4Attention) else query


def chunk_of(module: nn.Module) -> int | None:
    """Positions of a chunk where a query of attention layer `module` sees its own chunk alone."""
    return module.chunk if isinstance(module, Llama4Attention) else None
