"""Choosing the next token from logits: greedy, or sampled as transformers' generate would.

The logits processors are transformers' own, in the order its `generate` applies them. Knows nothing of
sessions or text.
"""

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
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

    def choose(self, tokens: list[int], logits: Tensor) -> int:
        """The token after `tokens` (prompt included) for float32 logits [vocabulary]."""
        if self._processors:
            logits = self._processors(torch.LongTensor([tokens]), logits[None])[0]
        if self._options.is_greedy:
            return int(logits.argmax())
        return int(torch.multinomial(logits.softmax(-1), 1, generator=self._random))


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
        processors.append(TopPLogitsWarper(options.top_p))
    if options.min_p is not None:
        processors.append(MinPLogitsWarper(options.min_p))
    return processors
