"""A conversation: a sequence of tokens of which the hops keep what they have already computed.

Owns the session that holds the sequence, and steps each turn only from where it differs from that. Opens a
session when it needs one, and another when the sequence outgrows it.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from swarm.client.session import Session
from swarm.client.speculation import StepPace
from swarm.errors import InputError, SwarmError
from swarm.sampling import Sampling


class OpenSession(Protocol):
    """Opens a session for a sequence that begins with `tokens`, on a route that has room for it.

    It holds at most `wished` tokens, or where there is no room for so many `needed` ones.
    """

    async def __call__(self, tokens: Sequence[int], *, needed: int, wished: int) -> Session: ...


IsOutdone: TypeAlias = Callable[[Session, int, int], bool]
"""Whether a turn of so many prompt tokens and new ones is clearly better off in another session."""

OnRoute: TypeAlias = Callable[[Session], None]
"""Is told the session of a turn once there is one, and again whenever its hops change."""

Outcome: TypeAlias = Tensor | list[int]
"""What a step gives of its last tokens: hidden states [rows, hidden], or the likeliest token after each."""


MAX_ROWS = 512
"""Tokens a step has whose outcome is wanted for all of them."""


class Begun(NamedTuple):
    """The start of an answer: its turn, its session, and the outcome of the prompt's last tokens.

    `cached_tokens` of the prompt were held by the hops already.
    """

    turn: int
    session: Session
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
    `stepped` counts the tokens that were sent through the hops; `pace` is what decode steps take.
    """

    def __init__(
        self,
        ends: Ends,
        compute: Executor,
        open_session: OpenSession,
        *,
        context: int,
        room: int = 0,
        is_outdone: IsOutdone = lambda session, prompt_tokens, new_tokens: False,
    ):
        self.context = context
        self.stepped = 0
        self.pace = StepPace()
        self._ends = ends
        self._compute = compute
        self._open_session = open_session
        self._is_outdone = is_outdone
        self._room = room
        self._session: Session | None = None
        self._turn = 0
        self._likeliest = False
        self._sampling: Sampling | None = None
        self._lock = asyncio.Lock()

    @property
    def session(self) -> Session | None:
        """The open session, None where there is none."""
        return self._session if self._session and self._session.is_open else None

    async def begin(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        *,
        likeliest: bool = False,
        sampling: Sampling | None = None,
        rows: int = 1,
        on_route: OnRoute = lambda session: None,
    ) -> Begun:
        """Start an answer: bring the hops to hold `prompt`, with room for the new tokens.

        If the `likeliest` tokens are wanted, the last hop may choose them itself, in all steps of the answer;
        else it may go on with those that `sampling` chooses, which is then what the answer is made of.
        The outcome is that of the last `rows` tokens of the prompt; hidden states where there are several.
        `on_route` is told who computes the answer, until another one begins.

        Raises:
            InputError: the prompt is empty or leaves no room in the model's context.
        """
        self._turn += 1
        self._likeliest, self._sampling = likeliest and rows == 1, sampling
        turn = self._turn
        if not prompt:
            raise InputError("The prompt is empty.", "Say something to the model.")
        if len(prompt) + (max_new_tokens > 0) > self.context:
            raise InputError(
                f"The prompt has {len(prompt)} tokens; this model takes fewer than {self.context}.",
                "Shorten it, or begin a new conversation.",
            )
        async with self._lock:
            session = await self._session_for(prompt, max_new_tokens)
            session.tell_changes(partial(on_route, session))
            on_route(session)
            start = min(_common_prefix(prompt, session.tokens), len(prompt) - rows)
            is_foreseen = self._likeliest or sampling is not None
            session.expects_rounds = is_foreseen and max_new_tokens > 1
            outcome = await self._bring(session, prompt, start, rows)
            return Begun(turn, session, outcome, start)

    async def _bring(self, session: Session, prompt: Sequence[int], start: int, rows: int) -> Outcome:
        """Step `prompt` from position `start` on, for the outcome of its last `rows` tokens."""
        if rows <= MAX_ROWS:
            return await self._step(session, list(prompt[start:]), start, rows)
        parts = []
        for at in range(len(prompt) - rows, len(prompt), MAX_ROWS):
            end = min(at + MAX_ROWS, len(prompt))
            part = await self._step(session, list(prompt[start:end]), start, rows=end - at)
            assert isinstance(part, Tensor)
            parts.append(part)
            start = end
        return torch.cat(parts)

    async def append(
        self,
        turn: int,
        tokens: Sequence[int],
        seq_pos: int,
        *,
        rounds: int = 0,
        ends: Sequence[int] = (),
    ) -> Outcome:
        """One decode step of `tokens` from position `seq_pos` on, forgetting what was there and after.

        Gives an outcome for each token. Where hops can choose tokens, they may go `rounds` further by
        themselves, but not beyond a token of `ends`.

        Raises:
            Superseded: another answer has begun since.
        """
        async with self._lock:
            if turn != self._turn or self.session is None:
                raise Superseded("This answer was given up for another one.")
            return await self._step(
                self.session, list(tokens), seq_pos, rows=len(tokens), rounds=rounds, ends=ends
            )

    async def close(self) -> None:
        self._turn += 1
        await self._leave_session()

    async def _leave_session(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _step(
        self,
        session: Session,
        tokens: list[int],
        seq_pos: int,
        rows: int,
        rounds: int = 0,
        ends: Sequence[int] = (),
    ) -> Outcome:
        embedded = None if session.takes_token_ids else await self._embed(tokens)
        outcome: Outcome
        if self._likeliest and session.gives_token_ids:
            outcome = await session.next_tokens(tokens, seq_pos, embedded, rows, rounds=rounds, ends=ends)
        else:
            outcome = await session.step(
                tokens, seq_pos, embedded, rows, rounds=rounds, ends=ends, sampling=self._sampling
            )
        self.stepped += len(tokens)
        return outcome

    async def _embed(self, tokens: list[int]) -> Tensor:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._compute, self._ends.embed, torch.tensor(tokens))

    async def _session_for(self, prompt: Sequence[int], max_new_tokens: int) -> Session:
        """The session; where there is none, too small a one, or another route is clearly better, another.

        That one begins with what the hops have kept.
        """
        session, tokens = self.session, min(len(prompt) + max_new_tokens, self.context)
        is_enough = session is not None and tokens <= session.max_tokens
        if session is not None and is_enough and not self._is_outdone(session, len(prompt), max_new_tokens):
            return session
        grown = max(tokens, self._room, 0 if session is None or is_enough else 2 * session.max_tokens)
        await self._leave_session()
        self._session = await self._open_session(prompt, needed=tokens, wished=min(grown, self.context))
        return self._session


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for at, (one, other) in enumerate(zip(a, b, strict=False)):
        if one != other:
            return at
    return min(len(a), len(b))
