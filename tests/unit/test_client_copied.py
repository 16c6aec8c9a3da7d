"""What a client believes of a standby: never more than that holds of the sequence, whenever it is told."""

import random
from collections import deque

import pytest

from swarm.client.copied import MAX_CUTS, Copied
from swarm.page_keys import PAGE_TOKENS
from swarm.server.copying import next_piece

PAGE = PAGE_TOKENS


def copied(number: int = 0, length: int = 0) -> Copied:
    return Copied(number, length)


def test_what_is_told_counts() -> None:
    known = copied()
    assert known.tokens == 0
    known.told(1, 2 * PAGE)
    assert known.tokens == 2 * PAGE
    known.told(2, 3 * PAGE)
    assert (known.tokens, known.total) == (3 * PAGE, 3 * PAGE)


def test_what_was_held_before_anybody_looked_counts_after_the_next_step_alone() -> None:
    known = copied(number=7, length=PAGE)
    known.told(7, 3 * PAGE)
    assert known.tokens == PAGE
    known.told(8, 3 * PAGE)
    assert known.tokens == 3 * PAGE


def test_what_is_taken_back_counts_no_more_whenever_it_was_told() -> None:
    known = copied()
    known.told(3, 4 * PAGE)
    known.cut(3, 2 * PAGE + 5)
    assert known.tokens == 2 * PAGE, "of a page that is not whole nothing counts: the standby may lose it"
    known.told(3, 5 * PAGE)
    assert known.tokens == 2 * PAGE, "this was under way when it was taken back"
    known.told(4, 3 * PAGE)
    assert known.tokens == 3 * PAGE


def test_cuts_of_different_ages_hold_each_for_what_is_older() -> None:
    known = copied()
    known.cut(3, PAGE)
    known.cut(5, 3 * PAGE)
    known.told(3, 9 * PAGE)
    assert known.tokens == PAGE
    known.told(4, 9 * PAGE)
    assert known.tokens == 3 * PAGE
    known.told(6, 9 * PAGE)
    assert known.tokens == 9 * PAGE


def test_many_cuts_take_little_memory_and_count_for_no_more() -> None:
    known = copied(length=PAGE)
    for number in range(1, 1000):
        known.cut(number, number * PAGE)
    assert len(known._cuts) <= MAX_CUTS + 1
    known.told(500, 5000 * PAGE)
    assert 0 < known.tokens <= 500 * PAGE
    known.told(1000, 5000 * PAGE)
    assert known.tokens == 5000 * PAGE


class Standing:
    """A hop and its standby as they are: of each position the number of the step that wrote it there."""

    def __init__(self) -> None:
        self.hop: list[int] = []
        self.standby: list[int] = []
        self.sent = 0
        self.taken = 0

    def step(self, number: int, at: int, tokens: int) -> None:
        assert at <= len(self.hop)
        self.taken = number
        self.hop[at:] = [number] * tokens
        self.sent = min(self.sent, at)

    def piece(self) -> tuple[int, list[int], int] | None:
        first, end = next_piece(self.sent, len(self.hop), 2 * PAGE)
        if end == first:
            return None
        self.sent = end
        return first, self.hop[first:end], self.taken

    def adopt(self, first: int, content: list[int]) -> None:
        assert first <= len(self.standby)
        self.standby[first:] = content


@pytest.mark.parametrize("seed", range(200))
def test_a_standby_never_holds_less_than_is_believed(seed: int) -> None:
    """Steps, pieces and notices are late by any time, each in their order; the client rolls back whenever."""
    rng = random.Random(seed)
    both, known = Standing(), copied()
    sequence: list[int] = []
    steps: deque[tuple[int, int, int]] = deque()
    piece: tuple[int, list[int], int] | None = None
    notices: deque[tuple[int, int]] = deque()
    number = 0
    for _ in range(400):
        match rng.randrange(4):
            case 0:
                at = len(sequence)
                if rng.random() < 0.4:
                    at = rng.randint(0, at)
                tokens = rng.choice((1, 3, 20, 50))
                if at < len(sequence):
                    known.cut(number, at)
                number += 1
                sequence[at:] = [number] * tokens
                steps.append((number, at, tokens))
            case 1 if steps:
                both.step(*steps.popleft())
            case 2:
                if piece is None:
                    piece = both.piece()
                else:
                    first, content, taken = piece
                    both.adopt(first, content)
                    notices.append((taken, first + len(content)))
                    piece = None
            case 3 if notices:
                known.told(*notices.popleft())
        believed = min(known.tokens, len(sequence))
        assert both.standby[:believed] == sequence[:believed]
    while steps:
        both.step(*steps.popleft())
    if piece is not None:
        both.adopt(piece[0], piece[1])
        notices.append((piece[2], piece[0] + len(piece[1])))
    while (last := both.piece()) is not None:
        both.adopt(last[0], last[1])
        notices.append((last[2], last[0] + len(last[1])))
    while notices:
        known.told(*notices.popleft())
    if len(sequence) >= PAGE and known.tokens:
        assert both.standby[: known.tokens] == sequence[: known.tokens]
