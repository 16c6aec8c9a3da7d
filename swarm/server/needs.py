"""Which of several models needs a server most: pure functions of what the servers of each hold.

A model that lacks blocks answers nobody, so those come first that a server makes whole, then those that it
brings nearer to it; else the one of which the swarm carries fewest tokens a second. Must not know how models
are listed, nor when a server looks or how it goes on with another one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from swarm.server.placement import MIN_GAIN, Holder, State, choose, may_leave, state


@dataclass(frozen=True)
class Need:
    """A model of `num_blocks` blocks, held by `others`, and the server in question.

    That is `mine`: as it holds blocks of the model if it `is_there`, else as it would, for a span as large.
    """

    num_blocks: int
    others: tuple[Holder, ...]
    mine: Holder
    is_there: bool = False

    @cached_property
    def without(self) -> State:
        """What the others carry."""
        return state(self.others, self.num_blocks)

    @cached_property
    def together(self) -> State:
        """What they all carry."""
        span = self.mine.span if self.is_there else choose(self.others, self.num_blocks, self.mine)
        return state([*self.others, replace(self.mine, span=span)], self.num_blocks)

    @property
    def may_leave(self) -> bool:
        """Whether the others serve all blocks that the server holds."""
        return may_leave([*self.others, self.mine], self.mine.peer)


@dataclass(frozen=True)
class Switch:
    """The model of that `index` is to be served instead; `is_urgent` if one more becomes whole by that."""

    index: int
    is_urgent: bool


def most_needed(needs: Mapping[int, Need]) -> int:
    """The index of the model that a newcomer is to serve; of equal ones the first."""
    return min(needs, key=lambda index: _rank(needs[index]))


def switch(needs: Mapping[int, Need], current: int) -> Switch | None:
    """What to serve instead of the model `current`, if that is worth it and leaves no block of it unserved.

    It is if more models are whole then, or the weaker one of both carries at least `MIN_GAIN` more.
    """
    here = needs[current]
    if not here.may_leave:
        return None
    others = sorted(needs.keys() - {current}, key=lambda index: (_rank(needs[index]), index))
    found = [one for index in others if (one := _compared(here, needs[index], index))]
    return min(found, key=lambda one: not one.is_urgent, default=None)


def _compared(here: Need, there: Need, index: int) -> Switch | None:
    before, after = (here.together, there.without), (here.without, there.together)
    whole_before, whole_after = (sum(one.is_whole for one in states) for states in (before, after))
    if whole_after > whole_before:
        return Switch(index, is_urgent=True)
    least_before, least_after = (min(one.carried for one in states) for states in (before, after))
    if whole_after == 2 and least_after >= least_before * (1 + MIN_GAIN):
        return Switch(index, is_urgent=False)
    return None


def _rank(need: Need) -> tuple[int, float]:
    """The lower, the more a model needs the server that is not there yet."""
    if need.without.is_whole:
        return 2, need.without.carried
    if need.together.is_whole:
        return 0, 0.0
    return 1, -(-need.together.missing // need.mine.span.size)
