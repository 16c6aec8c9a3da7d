"""Which of several models needs a server most: decided from who holds what."""

import pytest

from swarm.server.needs import Need, Switch, most_needed, switch
from swarm.server.placement import Holder, State, settled, state, turn
from swarm.spans import Span

BLOCKS = 6
ME = "me"
EARLIER = next(f"peer {n}" for n in range(100) if turn(f"peer {n}") < turn(ME))
LATER = next(f"peer {n}" for n in range(100) if turn(f"peer {n}") > turn(ME))


def held(*spans: tuple[int, int], serves: bool = True) -> tuple[Holder, ...]:
    return tuple(
        Holder(f"peer {number}", Span(*span), 60.0, serves=serves) for number, span in enumerate(spans)
    )


def wanting(*spans: tuple[int, int], size: int = 3) -> Need:
    """A model that the server would serve `size` blocks of."""
    return Need(BLOCKS, held(*spans), Holder(ME, Span(0, size), 60.0, serves=False))


def served(*spans: tuple[int, int], mine: tuple[int, int] = (0, 6), others_serve: bool = True) -> Need:
    """The model that it serves, with what the others hold."""
    return Need(BLOCKS, held(*spans, serves=others_serve), Holder(ME, Span(*mine), 60.0), is_there=True)


def test_what_a_model_carries_is_nothing_while_it_lacks_a_block() -> None:
    assert state(held((0, 3), (3, 5)), BLOCKS) == State(missing=1, carried=0.0)
    assert state((), BLOCKS) == State(missing=6, carried=0.0)
    assert state(held((0, 3), (3, 6)), BLOCKS) == State(missing=0, carried=pytest.approx(20.0))


WHOLE, STRONG = wanting((0, 6)), wanting((0, 6), (0, 6))
HALF, EMPTY, THIRD = wanting((0, 3)), wanting(), wanting((0, 2))


@pytest.mark.parametrize(
    ("needs", "expected"),
    [
        ([WHOLE, HALF], 1),
        ([EMPTY, HALF], 1),
        ([WHOLE, EMPTY], 1),
        ([EMPTY, THIRD], 0),
        ([EMPTY, wanting((0, 4), size=1)], 0),
        ([wanting(size=1), wanting((0, 2), size=1)], 1),
        ([STRONG, WHOLE], 1),
        ([WHOLE, STRONG], 0),
        ([EMPTY, EMPTY], 0),
        ([WHOLE, WHOLE], 0),
    ],
)
def test_a_newcomer_takes_the_model_that_lacks_it_most(needs: list[Need], expected: int) -> None:
    assert most_needed(dict(enumerate(needs))) == expected


@pytest.mark.parametrize(
    ("here", "there", "expected"),
    [
        (served((0, 6)), HALF, Switch(1, is_urgent=True)),
        (served((0, 6)), EMPTY, None),
        (served((0, 6)), wanting(size=6), Switch(1, is_urgent=True)),
        (served(), HALF, None),
        (served((0, 3)), HALF, None),
        (served((0, 6), others_serve=False), HALF, None),
        (served((0, 3), mine=(0, 3)), HALF, Switch(1, is_urgent=True)),
        (served((0, 6), (0, 6)), wanting((0, 6), size=6), Switch(1, is_urgent=False)),
        (served((0, 6)), wanting((0, 6), size=6), None),
        (served((0, 6), (0, 6)), wanting((0, 6), (0, 6), size=6), None),
    ],
)
def test_another_model_is_worth_it_if_that_becomes_whole_or_the_weaker_one_stronger(
    here: Need, there: Need, expected: Switch | None
) -> None:
    assert switch({0: here, 1: there}, 0) == expected


def test_what_becomes_whole_comes_before_what_becomes_stronger() -> None:
    here = served((0, 6), (0, 6))
    weak = wanting((0, 6), size=6)
    assert switch({0: here, 1: weak, 2: HALF}, 0) == Switch(2, is_urgent=True)
    assert switch({0: weak, 1: HALF, 2: here}, 2) == Switch(1, is_urgent=True)


def test_who_chooses_before_is_counted_where_it_will_be() -> None:
    undecided = [Holder(name, Span(0, 3), serves=False) for name in (LATER, EARLIER)]
    found = settled(held((0, 3)), undecided, BLOCKS, ME)
    assert [(one.peer, one.span) for one in found] == [("peer 0", Span(0, 3)), (EARLIER, Span(3, 6))]
