"""Choosing the next token from logits: greedy, or sampled as transformers' generate would.

The logits processors are transformers' own, in the order its `generate` applies them, save where those take
longer than a model's head does. Knows nothing of sessions or text.
"""

import numpy as np
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from swarm.client.options import SamplingOptions


class Sampler:
    """Chooses the tokens of one answer, with a random generator of its own."""

    def __init__(self, options: SamplingOptions):
        self._options = options
        self._processors = _processors(options)
        self._random = torch.Generator()
        if options.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(options.seed)

    @property
    def takes_likeliest(self) -> bool:
        """Whether it always chooses the likeliest token, whatever the tokens before."""
        return self._options.is_greedy and not self._processors

    def choose(self, tokens: list[int], logits: Tensor) -> int:
        """The token after `tokens` (prompt included) for float32 logits [vocabulary]."""
        if self._processors:
            read = tokens if self._options.repetition_penalty != 1 else []
            logits = self._processors(torch.LongTensor([read]), logits[None])[0]
        if self._options.is_greedy:
            return int(logits.numpy().argmax())
        return self._draw(logits.softmax(-1))

    def _draw(self, probabilities: Tensor) -> int:
        """One of [vocabulary], by inverting the distribution: torch.multinomial takes 30 times as long."""
        reached = probabilities.cumsum(-1, dtype=torch.float64)
        drawn = torch.rand(1, dtype=torch.float64, generator=self._random) * reached[-1]
        return int(torch.searchsorted(reached, drawn, right=True))


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


def _processors(options: SamplingOptions) -> LogitsProcessorList:
    processors = LogitsProcessorList()
    if options.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(float(options.repetition_penalty)))
    if options.is_greedy:
        return processors
    if options.temperature != 1:
        processors.append(TemperatureLogitsWarper(float(options.temperature)))
    if options.top_k is not None:
        processors.append(TopKLogitsWarper(options.top_k))
    if options.top_p is not None and options.top_p < 1:
        processors.append(_TopP(options.top_p))
    if options.min_p is not None:
        processors.append(MinPLogitsWarper(options.min_p))
    return processors
