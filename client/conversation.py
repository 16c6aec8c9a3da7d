"""A conversation: a sequence of tokens of which the hops keep what they have already computed.

Owns the session that holds the sequence, and steps each turn only from where it differs from that. Opens a
session when it needs one, and another when the sequence outgrows it.
"""

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from swarm.client.faults import RemoteFault
from swarm.client.session import Session
from swarm.errors import InputError, SwarmError

logger = logging.getLogger(__name__)


class OpenSession(Protocol):
    """Opens a session for a sequence that begins with `tokens`, on a route that has room for it.

    It holds at most `wished` tokens, or where there is no room for so many `needed` ones.
    """

    async def __call__(self, tokens: Sequence[int], *, needed: int, wished: int) -> Session: ...


Outcome: TypeAlias = Tensor | int
"""What a step gives of its last token: its hidden state [1, hidden], or the likeliest token after it."""


class Begun(NamedTuple):
    """The start of an answer: its turn, and the outcome of the prompt's last token.

    `cached_tokens` of the prompt were held by the hops already.
    """

    turn: int
    outcome: Outcome
    cached_tokens: int


class Ends(Protocol):
    """The two ends of a model, as `swarm.blocks.head.Head` has them. Its methods block."""

    def embed(self, ids: Tensor) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...


class Superseded(SwarmError):
    """The conversation has moved on to another answer."""


class Conversation:
    """One sequence that grows turn by turn. One answer at a time: a new one supersedes the one before.

    `context` is the most tokens the model can take, `room` how many a session is opened for at least.
    `stepped` counts the tokens that were sent through the hops.
    """

    def __init__(
        self, ends: Ends, compute: Executor, open_session: OpenSession, *, context: int, room: int = 0
    ):
        self.stepped = 0
        self._ends = ends
        self._compute = compute
        self._open_session = open_session
        self._context = context
        self._room = room
        self._session: Session | None = None
        self._turn = 0
        self._likeliest = False
        self._lock = asyncio.Lock()

    @property
    def session(self) -> Session | None:
        """The open session, None where there is none."""
        return self._session if self._session and self._session.is_open else None

    async def begin(self, prompt: Sequence[int], max_new_tokens: int, *, likeliest: bool = False) -> Begun:
        """Start an answer: bring the hops to hold `prompt`, with room for the new tokens.

        If the `likeliest` tokens are wanted, the last hop may choose them itself, in all steps of the answer.

        Raises:
            InputError: the prompt is empty or leaves no room in the model's context.
        """
        self._turn += 1
        self._likeliest = likeliest
        turn = self._turn
        if not prompt:
            raise InputError("The prompt is empty.", "Say something to the model.")
        if len(prompt) >= self._context:
            raise InputError(
                f"The prompt has {len(prompt)} tokens; this model takes fewer than {self._context}.",
                "Shorten it, or begin a new conversation.",
            )
        async with self._lock:
            was_kept = self.session is not None
            try:
                return await self._hold(turn, prompt, max_new_tokens)
            except RemoteFault as fault:
                if not was_kept:
                    raise
                logger.info("the kept session has ended, opening another: %s", fault)
            return await self._hold(turn, prompt, max_new_tokens)

    async def append(self, turn: int, token: int, embedded: Tensor | None) -> Outcome:
        """One decode step. `embedded` [1, hidden] may be None where the session takes token ids.

        Raises:
            Superseded: another answer has begun since.
        """
        async with self._lock:
            if turn != self._turn or self.session is None:
                raise Superseded("This answer was given up for another one.")
            return await self._step(self.session, [token], len(self.session.tokens), embedded)

    def has_room(self, tokens: int) -> bool:
        """Whether the sequence may have `tokens` tokens, the last of them not stepped."""
        return tokens <= self._context

    async def close(self) -> None:
        self._turn += 1
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _hold(self, turn: int, prompt: Sequence[int], max_new_tokens: int) -> Begun:
        """Bring the hops to hold `prompt`."""
        session = await self._session_for(prompt, min(len(prompt) + max_new_tokens, self._context))
        start = min(_common_prefix(prompt, session.tokens), len(prompt) - 1)
        rest = list(prompt[start:])
        embedded = None if session.takes_token_ids else await self._embed(rest)
        return Begun(turn, await self._step(session, rest, start, embedded), start)

    async def _embed(self, tokens: list[int]) -> Tensor:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._compute, self._ends.embed, torch.tensor(tokens))

    async def _step(
        self, session: Session, tokens: list[int], seq_pos: int, embedded: Tensor | None
    ) -> Outcome:
        outcome: Outcome
        if self._likeliest and session.gives_token_ids:
            outcome = await session.next_token(tokens, seq_pos, embedded)
        else:
            outcome = (await session.step(tokens, seq_pos, embedded))[-1:]
        self.stepped += len(tokens)
        return outcome

    async def _session_for(self, prompt: Sequence[int], tokens: int) -> Session:
        """The session; where there is none, or too small a one, another, which begins with what is kept."""
        session = self.session
        if session is not None and tokens <= session.max_tokens:
            return session
        grown = max(tokens, self._room, 2 * session.max_tokens if session else 0)
        if session is not None:
            await session.close()
        self._session = None
        self._session = await self._open_session(prompt, needed=tokens, wished=min(grown, self._context))
        return self._session


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for at, (one, other) in enumerate(zip(a, b, strict=False)):
        if one != other:
            return at
    return min(len(a), len(b))
