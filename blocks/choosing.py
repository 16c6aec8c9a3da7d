"""Choosing a token by its logits: the likeliest, or one that is sampled as transformers' generate would.

The logits processors are transformers' own, in the order its `generate` applies them, save where those take
longer than a model's head does.
"""

import numpy as np
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from swarm.sampling import Sampling


def choose(logits: Tensor, sampling: Sampling, position: int) -> int:
    """The token at `position`, for the float32 `logits` [vocabulary] of the one before it."""
    if sampling.is_greedy:
        return int(logits.numpy().argmax())
    return _inverted(processed(logits, sampling).softmax(-1), sampling.number(position))


def processed(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits [vocabulary] in which what is not to be sampled is minus infinity, and the rest is scaled."""
    processors = LogitsProcessorList()
    if sampling.temperature != 1:
        processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k is not None:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None and sampling.top_p < 1:
        processors.append(_TopP(sampling.top_p))
    if sampling.min_p is not None:
        processors.append(MinPLogitsWarper(sampling.min_p))
    return processors(torch.LongTensor([[]]), logits[None])[0]


def _inverted(probabilities: Tensor, number: float) -> int:
    """The token of [vocabulary] at `number` of [0, 1): torch.multinomial would take 30 times as long."""
    reached = probabilities.cumsum(-1, dtype=torch.float64)
    return int(torch.searchsorted(reached, number * reached[-1], right=True))


class _TopP(LogitsProcessor):
    """Keeps the likeliest tokens that make up `top_p`, as transformers does, but sorted by numpy: faster."""

    def __init__(self, top_p: float):
        self._rest = 1 - top_p

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """`scores` [1, vocabulary] with minus infinity for what is left out."""
        probabilities = scores[0].softmax(-1)
        ascending = np.sort(probabilities.numpy())
        unlikely = int((ascending.cumsum() <= self._rest).sum())
        least = float(ascending[min(unlikely, len(ascending) - 1)])
        return scores.masked_fill(probabilities < least, -torch.inf)  # type: ignore[return-value]
