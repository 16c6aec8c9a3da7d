"""The rounds that a session's hops go by themselves: the last one brings its token to the first, and so on.

Owns which steps those are, and what they told that nobody has asked for yet. Must not know of hops.
"""

from collections.abc import Iterator
from typing import NamedTuple

from msgspec.structs import replace

from swarm.client.inputs import Wired
from swarm.net.messages import ResponseType, Step
from swarm.page_keys import PAGE_TOKENS


class Told(NamedTuple):
    """What a step gave, and the token with which the hops go on after it, if they do."""

    given: Wired
    token: int | None


class Rounds:
    """`count` rounds after step `number`, which is brought to the hops and whose position is before `end`.

    They take one position each: what a step before position p tells is the token at p. All are answered with
    `response_type`. The token of the step itself may be `foretold`: the sequence does not have it yet.
    """

    def __init__(
        self,
        number: int,
        end: int,
        count: int,
        response_type: ResponseType,
        foretold: int | None = None,
    ):
        self.response_type = response_type
        self._foretold = foretold
        self._number = number
        self._end = end
        self._last = end + count
        self._told: dict[int, Told] = {}
        self._next = end

    @property
    def begins_untold(self) -> tuple[int, int]:
        """Number and position of the first step that has told nothing yet."""
        return self._number + self._next - self._end, self._next - 1

    def __contains__(self, number: int) -> bool:
        return self._number <= number <= self._number + self._last - self._end

    def goes_on_after(self, end: int) -> bool:
        """Whether there is a round for the token at `end`."""
        return end < self._last

    def covers(self, end: int) -> bool:
        """Whether the step before `end` is one of them."""
        return self._end <= end <= self._last

    def tell(self, end: int, told: Told) -> None:
        """The step before `end` has told that."""
        self._told[end] = told
        self._next = end + 1

    def given(self, end: int) -> Wired | None:
        """What the step before `end` gave, if it has told that."""
        told = self._told.get(end)
        return None if told is None else told.given

    def last_token(self, end: int) -> int | None:
        """The token that the step before `end` has told, if it is the last one."""
        told = self._told.get(end)
        return None if told is None or end != self._last else told.token

    def token(self, position: int) -> int | None:
        """The token with which the hops go on at `position`, if they do and that was told.

        What was told before is let go.
        """
        if position == self._end - 1:
            return self._foretold
        told = self._told.get(position)
        if told is None or position >= self._last:
            return None
        self._told = {end: told for end, told in self._told.items() if end >= position}
        return told.token

    def stop(self) -> None:
        """There are no others than those that have told something."""
        self._last = self._next - 1


def further_rounds(step: Step) -> Iterator[Step]:
    """What a hop is asked in each of the rounds after `step`, which is for one position."""
    for at in range(1, step.rounds + 1):
        rounds = step.rounds - at
        yield replace(step, number=step.number + at, seq_pos=step.seq_pos + at, page_keys=b"", rounds=rounds)


def whole_rounds(count: int, end: int) -> int:
    """Of `count` rounds from position `end` on, those before one that fills a page, whose key hops lack."""
    return min(count, PAGE_TOKENS - 1 - end % PAGE_TOKENS)
