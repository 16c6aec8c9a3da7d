"""Causal attention of new tokens over a session's keys and values.

Queries are the last positions of the sequence: query `i` of `t` stands at position `length - t + i`.
Grouped-query attention is folded into the batch, so that keys and values are never repeated.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

SCORE_BYTES = 32 * 2**20
"""The plain path takes queries in slices whose scores stay below this."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention output of shape [heads, tokens, value_dim], by the fastest way that gives it.

    Args:
        query: [heads, tokens, dim].
        key: [kv_heads, length, dim]; heads is a multiple of kv_heads.
        value: [kv_heads, length, value_dim].
        scale: factor on the scores.
        window: a query sees this many positions, its own included; None sees all.
        chunk: a query at position p sees none before `p // chunk * chunk` (Llama 4).
        softcap: scores are bounded to ±softcap by a tanh (Gemma 2).
        sinks: [heads], one extra score a head that takes weight and gives no value (GPT-OSS).
    """
    tokens, length = query.shape[1], key.shape[1]
    if window is not None and length > window + tokens - 1:
        key, value = key[:, length - window - tokens + 1 :], value[:, length - window - tokens + 1 :]
        length = key.shape[1]
    if chunk is not None and length > chunk:
        first = (length - tokens) // chunk * chunk
        key, value, length = key[:, first:], value[:, first:], length - first
    if softcap is not None or sinks is not None:
        return attend_plainly(
            query, key, value, scale=scale, window=window, chunk=chunk, softcap=softcap, sinks=sinks
        )
    if tokens == 1 and query.device.type == "cpu" and query.dtype == torch.float32:
        return _attend_one(query, key, value, scale)
    sees_all = (window is None or length <= window) and (chunk is None or length <= chunk)
    mask = None
    if tokens > 1 and (tokens != length or not sees_all):
        mask = _bias(tokens, length, window, chunk, query.dtype, query.device)
    return scaled_dot_product_attention(
        query[None],
        key[None],
        value[None],
        attn_mask=mask,
        is_causal=tokens > 1 and mask is None,
        scale=scale,
        enable_gqa=query.shape[0] != key.shape[0],
    )[0]


def attend_plainly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The reference: the same result as `attend`, written as the formula."""
    heads, tokens, dim = query.shape
    kv_heads, length, _ = key.shape
    folded = query.reshape(kv_heads, heads // kv_heads, tokens, dim)
    slice_tokens = max(1, SCORE_BYTES // (4 * heads * length))
    out = folded.new_empty(*folded.shape[:3], value.shape[2])
    for start in range(0, tokens, slice_tokens):
        part = folded[:, :, start : start + slice_tokens]
        seen = length - tokens + start + part.shape[2]
        scores = (part @ key[:, None, :seen].transpose(-1, -2)).float() * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores + _bias(part.shape[2], seen, window, chunk, torch.float32, query.device)
        if sinks is not None:
            column = sinks.float().reshape(kv_heads, -1, 1, 1).expand(-1, -1, part.shape[2], 1)
            scores = torch.cat([scores, column], dim=-1)
        weights = scores.softmax(-1)[..., :seen].to(value.dtype)
        out[:, :, start : start + slice_tokens] = weights @ value[:, None, :seen]
    return out.reshape(heads, tokens, -1)


def _attend_one(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """One query over all keys, the heads of a group as the rows of one product."""
    heads, _, dim = query.shape
    folded = query.reshape(key.shape[0], heads // key.shape[0], dim)
    weights = torch.bmm(folded, key.transpose(1, 2)).mul_(scale).softmax(-1)
    return torch.bmm(weights, value).reshape(heads, 1, -1)


@lru_cache(maxsize=4)
def _bias(
    tokens: int,
    length: int,
    window: int | None,
    chunk: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """[tokens, length]: 0 where the query sees the position, else -inf. Shared by the blocks of a step."""
    at = torch.arange(length - tokens, length, device=device)[:, None]
    position = torch.arange(length, device=device)[None, :]
    hidden = position > at
    if window is not None:
        hidden |= position <= at - window
    if chunk is not None:
        hidden |= position < at // chunk * chunk
    return torch.zeros(tokens, length, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
