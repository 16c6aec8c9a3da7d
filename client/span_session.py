"""A session on some of the blocks, or all of them, for a sequence that is given as hidden states.

Owns how far the sequence is, and cuts what is given into steps. Nobody knows its tokens: hops keep nothing
of it for later sessions, and who takes the first one's place is brought it again from the journal.
"""

import torch
from torch import Tensor

from swarm.client.session import Session
from swarm.errors import InputError, SwarmError

STEP_TOKENS = 512
"""Tokens that a step has at most: as many results come back."""


class SpanSession:
    """A sequence of hidden states on the hops of `session`, which was opened without tokens."""

    def __init__(self, session: Session):
        self.session = session
        self._position = 0

    @property
    def position(self) -> int:
        """How many tokens the hops hold. Setting it to less forgets those after it."""
        return self._position

    @position.setter
    def position(self, position: int) -> None:
        if not 0 <= position <= self._position:
            raise InputError(
                f"The session cannot go to position {position}.", f"It holds {self._position} tokens."
            )
        self._position = position

    async def step(self, hidden: Tensor) -> Tensor:
        """What the blocks make of `hidden` [tokens, hidden], at the positions that follow: the same shape.

        Raises:
            InputError: the session was not opened for so many tokens.
            SwarmError: a hop was lost for which there is no other, or the session has ended.
        """
        if not self.session.is_open:
            raise SwarmError("This session has ended.", "Begin a new one.")
        room = self.session.max_tokens - self._position
        if len(hidden) > room:
            raise InputError(
                f"{len(hidden)} tokens do not fit: the session has room for {room} more.",
                "Open one for more tokens, or set its position back.",
            )
        size = min(STEP_TOKENS, self.session.max_step_tokens)
        return torch.cat([await self._step(part) for part in hidden.split(size)]) if len(hidden) else hidden

    async def close(self) -> None:
        """Tell the hops that the session is over. Safe to call again."""
        await self.session.close()

    async def _step(self, hidden: Tensor) -> Tensor:
        unknown = [0] * len(hidden)
        result = await self.session.step(unknown, self._position, hidden, rows=len(hidden))
        self._position += len(hidden)
        return result
