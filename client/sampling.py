"""Choosing the next token of an answer, by its logits and by what has been said so far.

A position that is asked for again, or before it is certain, gives the same token for the same logits. So a
draft is verified by comparing, and what is sampled does not depend on how many tokens a step verifies.

Knows nothing of sessions or text.
"""

import secrets
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from swarm.blocks.choosing import choose
from swarm.client.options import SamplingOptions
from swarm.sampling import KEY_BYTES, MAX_TOP_K, Sampling


class Constraint(Protocol):
    """Says which tokens may come next."""

    def allowed(self, tokens: Sequence[int]) -> Tensor:
        """Which may follow the answer's `tokens`: booleans [vocabulary], at least one of them true."""
        ...


class Sampler:
    """Chooses the tokens of one answer."""

    def __init__(self, options: SamplingOptions, first: int = 0, constraint: Constraint | None = None):
        """`first` is the position of the answer's first token, as many as its prompt has tokens."""
        self._first = first
        self._constraint = constraint
        self._additions = _additions(options)
        self._penalty: RepetitionPenaltyLogitsProcessor | None = None
        if options.repetition_penalty != 1:
            self._penalty = RepetitionPenaltyLogitsProcessor(float(options.repetition_penalty))
        self.sampling = _sampling(options)

    @property
    def by_logits_alone(self) -> Sampling | None:
        """How it chooses if the tokens before do not matter; None if they do."""
        hangs_on_tokens = self._additions or self._constraint or self._penalty
        return None if hangs_on_tokens else self.sampling

    def choose(self, tokens: Sequence[int], logits: Tensor) -> int:
        """The token after `tokens`, prompt included, for float32 logits [vocabulary]."""
        return choose(self.adjusted(tokens, logits), self.sampling, len(tokens))

    def adjusted(self, tokens: Sequence[int], logits: Tensor) -> Tensor:
        """`logits` [vocabulary] with what is added to them, and minus infinity for what may not come."""
        if self._additions or self._constraint:
            answer = tokens[self._first :]
            for addition in self._additions:
                logits = addition(answer, logits)
            if self._constraint is not None:
                logits = logits.masked_fill(~self._constraint.allowed(answer)[: len(logits)], -torch.inf)
        if self._penalty is not None:
            logits = self._penalty(torch.LongTensor([list(tokens)]), logits[None])[0]
        return logits


def _sampling(options: SamplingOptions) -> Sampling:
    key = secrets.token_bytes(KEY_BYTES)
    if options.seed is not None:
        key = options.seed.to_bytes(KEY_BYTES, "little")
    top_k = None if options.top_k is None else min(options.top_k, MAX_TOP_K)
    return Sampling(float(options.temperature), top_k, options.top_p, options.min_p, key)


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
