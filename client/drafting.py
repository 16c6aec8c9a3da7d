"""Drafting: guesses at a sequence's next tokens, and how likely each is to be right.

`PromptLookup` finds them in the sequence itself: what followed the last time that the same few tokens came
up. Nothing here knows who verifies a draft, nor what a step costs.
"""

from collections.abc import Sequence
from typing import Protocol

from swarm.client.speculation import MAX_DRAFT, Acceptance

SIZES = (2, 3, 4, 6, 8)
"""Lengths of the token runs that are looked up, ascending."""

PRIORS = (0.2, 0.35, 0.5, 0.65, 0.8)
"""How often a run of each size is taken to be followed by what followed it before, until that was seen."""


class Drafter(Protocol):
    """Drafts the next tokens of one sequence, which it is told as it grows."""

    @property
    def seconds_each(self) -> float:
        """What drafting a token takes."""
        ...

    def push(self, token: int) -> None:
        """The sequence goes on with `token`, whatever was drafted."""
        ...

    def odds(self) -> Sequence[float]:
        """The chance of each token of the next draft to be right if those before it are; none: no draft."""
        ...

    async def draft(self, count: int) -> list[int]:
        """The next `count` tokens, as many as there are `odds` for at most."""
        ...

    def close(self) -> None:
        """The sequence has ended."""
        ...


class PromptLookup:
    """Drafts what followed the last time that the sequence's newest tokens came up, the longest run first.

    A token costs a look-up for each of `SIZES`. How often the longest run is right, by its size, is learned
    from every token, whether its draft was asked for or not.
    """

    seconds_each = 0.0

    def __init__(self, tokens: Sequence[int]):
        self._tokens: list[int] = []
        self._ends: list[dict[int, int]] = [{} for _ in SIZES]
        """For each size, by the hash of a run, the position after it where it came up last."""
        self._found: list[int | None] = [None] * len(SIZES)
        """For each size, the position after the newest run where that came up before."""
        self._acceptance = [Acceptance(prior) for prior in PRIORS]
        for token in tokens:
            self._index(token)

    def push(self, token: int) -> None:
        size = self._longest()
        if size is not None:
            self._acceptance[size].learn(self._tokens[self._continuation(size)] == token)
        self._index(token)

    def odds(self) -> Sequence[float]:
        """What is drafted further on has a longer run before it, if it is right so far."""
        size = self._longest()
        if size is None:
            return ()
        runs = range(SIZES[size], SIZES[size] + MAX_DRAFT)
        return [self._acceptance[sum(length <= run for length in SIZES) - 1].rate for run in runs]

    async def draft(self, count: int) -> list[int]:
        size = self._longest()
        if size is None:
            return []
        at = self._continuation(size)
        drafted = self._tokens[at : at + count]
        period = len(self._tokens) - at
        while len(drafted) < count:  # it ran into its own beginning, so it goes on as it began
            drafted.append(drafted[len(drafted) - period])
        return drafted

    def close(self) -> None:
        pass

    def _longest(self) -> int | None:
        """Which of `SIZES` is the longest that came up before."""
        return max((size for size, found in enumerate(self._found) if found is not None), default=None)

    def _continuation(self, size: int) -> int:
        """The position of the token that followed the run when it came up before."""
        at = self._found[size]
        assert at is not None
        return at

    def _index(self, token: int) -> None:
        self._tokens.append(token)
        end = len(self._tokens)
        for size, (length, ends) in enumerate(zip(SIZES, self._ends, strict=True)):
            if end < length:
                break
            run = hash(tuple(self._tokens[end - length :]))
            self._found[size] = ends.get(run)
            ends[run] = end


def prompt_lookup(tokens: Sequence[int], sampler: object) -> Drafter:
    """The drafter that needs no model. What it says does not depend on how tokens are chosen."""
    return PromptLookup(tokens)
