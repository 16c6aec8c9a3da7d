"""Choosing the next token from logits: greedy, or sampled as transformers' generate would.

The randomness of a token belongs to its position, not to the moment it is asked for: a position that is asked
for again, or before it is certain, gives the same token for the same logits. So a draft is verified by
comparing, and what is sampled does not depend on how many tokens a step verifies.

The logits processors are transformers' own, in the order its `generate` applies them, save where those take
longer than a model's head does. Knows nothing of sessions or text.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

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


class Constraint(Protocol):
    """Says which tokens may come next."""

    def allowed(self, tokens: Sequence[int]) -> Tensor:
        """Which may follow the answer's `tokens`: booleans [vocabulary], at least one of them true."""
        ...


class Sampler:
    """Chooses the tokens of one answer, with a random generator of its own."""

    def __init__(self, options: SamplingOptions, first: int = 0, constraint: Constraint | None = None):
        """`first` is the position of the answer's first token, as many as its prompt has tokens."""
        self._first = first
        self._constraint = constraint
        self._additions = _additions(options)
        self._numbers: list[float] = []
        """For each position of the answer in turn, where in [0, 1) of the distribution its token lies."""
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
        is_plain = not (self._processors or self._additions or self._constraint)
        return self._options.is_greedy and is_plain

    def choose(self, tokens: Sequence[int], logits: Tensor) -> int:
        """The token after `tokens`, prompt included, for float32 logits [vocabulary]."""
        logits = self._restricted(tokens, logits)
        if self._processors:
            read = tokens if self._options.repetition_penalty != 1 else []
            logits = self._processors(torch.LongTensor([list(read)]), logits[None])[0]
        if self._options.is_greedy:
            return int(logits.numpy().argmax())
        return _inverted(logits.softmax(-1), self._number(len(tokens) - self._first))

    def _restricted(self, tokens: Sequence[int], logits: Tensor) -> Tensor:
        """`logits` [vocabulary] with what is added to them, and minus infinity for what may not come."""
        if self._additions or self._constraint:
            answer = tokens[self._first :]
            for addition in self._additions:
                logits = addition(answer, logits)
            if self._constraint is not None:
                logits = logits.masked_fill(~self._constraint.allowed(answer)[: len(logits)], -torch.inf)
        return logits

    def _number(self, at: int) -> float:
        """The number of the answer's token `at`; drawn in order, whatever the order they are asked for in."""
        while len(self._numbers) <= at:
            self._numbers.append(float(torch.rand(1, dtype=torch.float64, generator=self._random)))
        return self._numbers[at]


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


class Addition(Protocol):
    """Adds to logits by the tokens of the answer so far."""

    def __call__(self, answer: Sequence[int], logits: Tensor) -> Tensor:
        """New logits [vocabulary]; those given stay as they are."""
        ...


class _Penalties:
    """Takes from the logits of the answer's tokens: once for each, and again for each time it came."""

    def __init__(self, presence: float, frequency: float):
        self._presence = presence
        self._frequency = frequency

    def __call__(self, answer: Sequence[int], logits: Tensor) -> Tensor:
        if not answer:
            return logits
        tokens, counts = torch.tensor(answer).unique(return_counts=True)
        return logits.index_add(0, tokens, -(self._presence + self._frequency * counts.float()))


class _Bias:
    """Adds to the logits of some tokens; those that the vocabulary does not have are left out."""

    def __init__(self, bias: Mapping[int, float]):
        self._tokens = torch.tensor(list(bias))
        self._values = torch.tensor(list(bias.values()), dtype=torch.float32)

    def __call__(self, answer: Sequence[int], logits: Tensor) -> Tensor:
        known = self._tokens < len(logits)
        return logits.index_add(0, self._tokens[known], self._values[known])


def _additions(options: SamplingOptions) -> list[Addition]:
    additions: list[Addition] = []
    if options.logit_bias:
        additions.append(_Bias(options.logit_bias))
    if options.presence_penalty or options.frequency_penalty:
        additions.append(_Penalties(options.presence_penalty, options.frequency_penalty))
    return additions


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
