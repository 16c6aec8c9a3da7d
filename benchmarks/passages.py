"""Prompts and their greedy answers, known in advance, of which nobody can be in doubt.

A passage's answer ends before the first token whose lead over the next best is so small that another order
of adding up could change it: every right implementation gives it to the token. Many passages begin alike.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.reference import Reference

CLEAR_LEAD = 1e-3
"""Logits by which each token of an answer leads; float32 sums in another order differ by a tenth of it."""

SHORTEST_ANSWER = 8
FAMILY = 4
"""Passages that begin alike."""

PREFIX_TOKENS = 33, 160
OWN_TOKENS = 5, 60
"""Fewest and most tokens of the beginnings that passages share, and of what each has for itself."""


@dataclass(frozen=True)
class Question:
    """A prompt, and the tokens that a greedy answer must begin with."""

    prompt: tuple[int, ...]
    expected: tuple[int, ...]


@dataclass(frozen=True)
class Passage:
    """A prompt and its answer. Each of its questions begins somewhere in the answer."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    def question(self, rng: random.Random) -> Question:
        start = rng.randrange(len(self.answer))
        end = rng.randint(start + 1, len(self.answer))
        return Question(self.prompt + self.answer[:start], self.answer[start:end])


def draw_passages(
    reference: Reference, text: Sequence[int], rng: random.Random, count: int, answer_tokens: int
) -> list[Passage]:
    """`count` passages cut from `text`, family by family, with answers of at most `answer_tokens` tokens."""
    prefixes = [_cut(text, rng, PREFIX_TOKENS) for _ in range(0, count, FAMILY)]
    passages: list[Passage] = []
    while len(passages) < count:
        prompt = prefixes[len(passages) // FAMILY] + _cut(text, rng, OWN_TOKENS)
        _, answer = reference.generate(prompt, answer_tokens)
        clear = clear_tokens(reference, prompt, answer)
        if clear >= SHORTEST_ANSWER:
            passages.append(Passage(prompt, tuple(answer[:clear])))
    return passages


def clear_tokens(reference: Reference, prompt: Sequence[int], answer: Sequence[int]) -> int:
    """How many tokens of `answer`, from its first on, lead clearly."""
    best = reference.logits(prompt, answer).topk(2)
    leads = (best.values[:, 0] - best.values[:, 1]).tolist()
    choices = best.indices[:, 0].tolist()
    for number, (token, choice, lead) in enumerate(zip(answer, choices, leads, strict=True)):
        if token != choice or lead < CLEAR_LEAD:
            return number
    return len(answer)


def _cut(text: Sequence[int], rng: random.Random, sizes: tuple[int, int]) -> tuple[int, ...]:
    size = rng.randint(*sizes)
    start = rng.randrange(len(text) - size)
    return tuple(text[start : start + size])
