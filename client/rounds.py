"""The rounds that a session's hops go by themselves: the last one brings its token to the first, and so on.

Owns which steps those are, and what they told that nobody has asked for yet. Must not know of hops.
"""

from collections.abc import Iterator

from msgspec.structs import replace

from swarm.client.inputs import Wired
from swarm.net.messages import Step
from swarm.page_keys import PAGE_TOKENS


class Rounds:
    """`count` rounds after step `number`, which is brought to the hops and whose position is before `end`.

    They take one position each: what a step before position p tells is the token at p.
    """

    def __init__(self, number: int, end: int, count: int):
        self._number = number
        self._end = end
        self._last = end + count
        self._told: dict[int, Wired] = {}
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

    def tell(self, end: int, token: Wired) -> None:
        """The step before `end` has told `token`."""
        self._told[end] = token
        self._next = end + 1

    def told(self, end: int) -> Wired | None:
        """What the step before `end` has told, if it has."""
        return self._told.get(end)

    def is_on_its_way(self, token: int, position: int) -> bool:
        """Whether the hops go on with that token at `position`. What was told before that is let go."""
        told = self._told.get(position)
        if told is None or position >= self._last or token_of(told) != token:
            return False
        self._told = {end: token for end, token in self._told.items() if end >= position}
        return True

    def stop(self) -> None:
        """There are no others than those that have told something."""
        self._last = self._next - 1


def token_of(told: Wired) -> int:
    """The token that a step for one row has told."""
    return told.data.cast("B").cast("I")[0]


def further_rounds(step: Step) -> Iterator[Step]:
    """What a hop is asked in each of the rounds after `step`, which is for one position."""
    for at in range(1, step.rounds + 1):
        rounds = step.rounds - at
        yield replace(step, number=step.number + at, seq_pos=step.seq_pos + at, page_keys=b"", rounds=rounds)


def whole_rounds(count: int, end: int) -> int:
    """Of `count` rounds from position `end` on, those before one that fills a page, whose key hops lack."""
    return min(count, PAGE_TOKENS - 1 - end % PAGE_TOKENS)
