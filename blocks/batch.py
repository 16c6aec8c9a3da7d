"""Which rows of which steps the next iteration takes: pure decisions over the steps that are ready.

Decode goes first, then prefill in chunks, up to the rows that the pace allows: one prompt after the other, as
none ends later for that and most end sooner, but a long one makes way for others now and then. Knows no
tensors, no pages and no time but what it is told.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Generic, Protocol, TypeVar

DECODE_ROWS = 16
"""A step of at most so many tokens is a decode step: one token, or a few that are verified at once."""

MAX_ROWS = 512
"""Rows of one iteration at most."""

PATIENCE = 1.0
"""Seconds after which a bulk step is treated like any other."""

TURN_ROWS = 512
"""Rows of prefill after which a session makes way for others."""

TURN_GAP = 0.5
"""Seconds without prefill after which a session's turn is over: the next step of a prompt comes sooner."""


class Ready(Protocol):
    """A step that is ready: `rows` of it are still to be run. `arrived` is in seconds."""

    @property
    def rows(self) -> int: ...
    @property
    def client(self) -> Hashable: ...
    @property
    def session(self) -> Hashable: ...
    @property
    def is_decode(self) -> bool: ...
    @property
    def is_bulk(self) -> bool: ...
    @property
    def arrived(self) -> float: ...


Step = TypeVar("Step", bound=Ready)


@dataclass(frozen=True)
class Share(Generic[Step]):
    """`rows` of a step that an iteration runs, the next ones that are to be run."""

    step: Step
    rows: int


@dataclass(slots=True)
class _Turn:
    """A session's prefill goes on: since when, when it last got rows, and how many by now."""

    since: float
    last: float
    rows: int = 0


class Fairness:
    """How many rows each client was given, so that those who had least come first, and whose turn it is.

    A client that comes, or comes back, starts level with the one that had least of those who are there. A
    session whose prefill has begun goes on before those that wait, until it has had `TURN_ROWS`.
    """

    def __init__(self) -> None:
        self._given: dict[Hashable, int] = {}
        self._turns: dict[Hashable, _Turn] = {}

    def meet(self, clients: Iterable[Hashable]) -> None:
        """These, and no others, have steps that are ready."""
        present = set(clients)
        least = min((given for client, given in self._given.items() if client in present), default=0)
        self._given = {client: self._given.get(client, least) for client in present}

    def be_alone(self, client: Hashable) -> None:
        """It alone has a step that is ready, and gets what it wants: others will start level with it."""
        self._given = {client: 0}

    def given(self, client: Hashable) -> int:
        return self._given.get(client, 0)

    def give(self, client: Hashable, rows: int) -> None:
        self._given[client] = self._given.get(client, 0) + rows

    def turn(self, session: Hashable) -> float:
        """When the session's turn began, infinity if it has none."""
        turn = self._turns.get(session)
        return turn.since if turn else inf

    def prefill(self, session: Hashable, rows: int, now: float) -> None:
        """The session gets so many rows of prefill: its turn begins with them, goes on, or ends."""
        turn = self._turns.setdefault(session, _Turn(since=now, last=now))
        turn.last, turn.rows = now, turn.rows + rows
        if turn.rows >= TURN_ROWS:
            del self._turns[session]

    def end_turns(self, now: float) -> None:
        """End the turns of those that brought nothing for a while."""
        self._turns = {one: turn for one, turn in self._turns.items() if now - turn.last <= TURN_GAP}


def form_batch(ready: Sequence[Step], fairness: Fairness, prefill_rows: int, now: float) -> list[Share[Step]]:
    """The shares of the next iteration, none only if nothing is ready.

    `prefill_rows` is how many rows of prefill may go along. A prefill that is alone gets at least one.
    """
    if len(ready) == 1 and ready[0].is_decode:
        fairness.be_alone(ready[0].client)
        return [Share(ready[0], ready[0].rows)]
    fairness.meet(step.client for step in ready)
    fairness.end_turns(now)

    def place(step: Step) -> tuple[bool, float, int, float]:
        waits_back = step.is_bulk and now - step.arrived < PATIENCE
        return waits_back, fairness.turn(step.session), fairness.given(step.client), step.arrived

    shares: list[Share[Step]] = []
    room = MAX_ROWS
    for step in sorted((step for step in ready if step.is_decode), key=place):
        if step.rows <= room:
            shares.append(Share(step, step.rows))
            room -= step.rows
    room = min(room, prefill_rows if shares else max(prefill_rows, 1))
    for step in sorted((step for step in ready if not step.is_decode), key=place):
        if room > 0:
            shares.append(Share(step, min(step.rows, room)))
            room -= shares[-1].rows
            fairness.prefill(step.session, shares[-1].rows, now)
    for share in shares:
        fairness.give(share.step.client, share.rows)
    return shares
