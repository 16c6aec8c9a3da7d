"""One row of a batch as the hops hold it: a sequence of tokens, or one of hidden states.

Async, on the swarm's own loop. Knows nothing of batches, padding or what the results are for.
"""

from typing import Protocol

from torch import Tensor

from swarm.client.conversation import MAX_ROWS
from swarm.client.facade import Swarm
from swarm.client.span_session import SpanSession
from swarm.spans import Span


class Row(Protocol):
    """A sequence of which the hops hold the first `position` elements, or can be brought them again."""

    @property
    def position(self) -> int: ...

    async def run(self, given: Tensor, wanted: int) -> Tensor:
        """Bring `given`, which follows, through the blocks.

        Returns:
            Hidden states [wanted, hidden] after its last ones.

        Raises:
            SwarmError: as the session's step.
        """
        ...

    def rewind(self, position: int) -> None:
        """Forget what comes after `position`."""
        ...

    async def close(self) -> None: ...


class TokenRow:
    """Implements `Row` for token ids [tokens], through all blocks.

    Its session is opened for `room` tokens, and for more once the sequence outgrows them.
    """

    def __init__(self, swarm: Swarm, room: int):
        self._tokens: list[int] = []
        self._room = room
        self._conversation = swarm.conversation(room)
        self._turn = 0

    @property
    def position(self) -> int:
        return len(self._tokens)

    async def run(self, given: Tensor, wanted: int) -> Tensor:
        new = given.tolist()
        sequence, rows = [*self._tokens, *new], max(wanted, 1)
        if self._may_append(len(new), rows):
            outcome = await self._conversation.append(self._turn, new, len(self._tokens))
        else:
            room = max(self._room - len(sequence), 0)
            begun = await self._conversation.begin(sequence, room, rows=rows)
            self._turn, outcome = begun.turn, begun.outcome
        assert isinstance(outcome, Tensor)
        self._tokens = sequence
        return outcome[rows - wanted :]

    def rewind(self, position: int) -> None:
        del self._tokens[position:]

    async def close(self) -> None:
        await self._conversation.close()

    def _may_append(self, count: int, rows: int) -> bool:
        """Whether it takes one step, all of whose results are wanted."""
        session = self._conversation.session
        fits = session is not None and len(self._tokens) + count <= session.max_tokens
        return fits and count == rows <= MAX_ROWS


class HiddenRow:
    """Implements `Row` for hidden states [tokens, hidden], through the blocks of `span`; `room` at most."""

    def __init__(self, swarm: Swarm, span: Span, room: int):
        self._swarm = swarm
        self._span = span
        self._room = room
        self._session: SpanSession | None = None

    @property
    def position(self) -> int:
        return self._session.position if self._session is not None else 0

    async def run(self, given: Tensor, wanted: int) -> Tensor:
        if self._session is None:
            self._session = await self._swarm.open_span_session(self._span, self._room)
        return (await self._session.step(given))[len(given) - wanted :]

    def rewind(self, position: int) -> None:
        if self._session is not None:
            self._session.position = position

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
