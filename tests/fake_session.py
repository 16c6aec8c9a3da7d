"""A session and the two ends of a model whose next token hangs on the two before: for tests of decoding.

A step's hidden state names the sequence it stands for, so that a wrong position or a forgotten rollback makes
another answer.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from swarm.client.changes import Change
from swarm.client.conversation import Conversation
from swarm.client.generation import Generation, TextStream
from swarm.client.leg import HopTimes
from swarm.client.options import GenerationOptions
from swarm.client.route import Hop
from swarm.sampling import Sampling

VOCABULARY = 12
EOS = 11


class Letters:
    """Token 0 is `a`; the last of the vocabulary ends a text."""

    chat_template = None
    eos_token_id = EOS

    def decode(self, token_ids: list[int], **_: bool) -> str:
        return "".join(chr(97 + token) for token in token_ids if token != EOS)


class FakeEnds:
    """Logits by the last two tokens; `sharpness` makes few likely. `seen` are sequences by number."""

    def __init__(self, seed: int = 0, sharpness: float = 2.0, eos: float = -3.0):
        random = torch.Generator().manual_seed(seed)
        self.tokenizer: Any = Letters()
        self.generation_config = SimpleNamespace(eos_token_id=EOS)
        self.seen: list[tuple[int, ...]] = []
        self.embedded: list[int] = []
        self._table = sharpness * torch.randn(VOCABULARY, VOCABULARY, VOCABULARY, generator=random)
        self._table[:, :, EOS] = eos * sharpness

    def embed(self, ids: Tensor) -> Tensor:
        self.embedded += ids.tolist()
        return ids.float()[:, None]

    def logits(self, hidden: Tensor) -> Tensor:
        return torch.stack([self.after(self.seen[int(row)]) for row in hidden[:, 0]])

    def after(self, tokens: Sequence[int]) -> Tensor:
        """Logits [vocabulary] after a sequence."""
        return self._table[tokens[-2] if len(tokens) > 1 else 0, tokens[-1]].clone()


@dataclass
class FakeSession:
    """Holds tokens, and takes `fixed` seconds for a step of one row and `per_row` for each further one."""

    ends: FakeEnds
    max_tokens: int
    fixed: float = 0.1
    per_row: float = 0.001
    takes_token_ids: bool = True
    gives_token_ids: bool = True
    is_open: bool = True
    went_round: bool = False
    expects_rounds: bool = False
    recoveries: int = 0
    replayed_tokens: int = 0
    journal_bytes: int = 0
    changes: Sequence[Change] = ()
    on_change: Callable[[], None] = lambda: None
    tokens: list[int] = field(default_factory=list)
    steps: list[tuple[int, int]] = field(default_factory=list)

    def goes_round(self, sampling: Sampling | None = None) -> bool:
        return False

    async def step(
        self,
        tokens: Sequence[int],
        seq_pos: int,
        hidden: Tensor | None = None,
        rows: int = 1,
        *,
        rounds: int = 0,
        ends: Sequence[int] = (),
        sampling: Sampling | None = None,
    ) -> Tensor:
        end = seq_pos + len(tokens)
        assert self.is_open
        assert seq_pos <= len(self.tokens)
        assert end <= self.max_tokens, "more than the session was opened for"
        assert 1 <= rows <= len(tokens) <= 16 or rows == 1
        assert self.takes_token_ids or (hidden is not None and hidden[:, 0].tolist() == list(tokens))
        self.steps.append((seq_pos, len(tokens)))
        self.tokens[seq_pos:] = tokens
        await asyncio.sleep(self.fixed + self.per_row * (len(tokens) - 1))
        first = len(self.ends.seen)
        self.ends.seen += [tuple(self.tokens[: end - rows + 1 + row]) for row in range(rows)]
        return torch.arange(first, first + rows, dtype=torch.float32)[:, None]

    async def next_tokens(
        self,
        tokens: Sequence[int],
        seq_pos: int,
        hidden: Tensor | None = None,
        rows: int = 1,
        *,
        rounds: int = 0,
        ends: Sequence[int] = (),
    ) -> list[int]:
        assert self.gives_token_ids
        states = await self.step(tokens, seq_pos, hidden, rows)
        return self.ends.logits(states).argmax(-1).tolist()

    def tell_changes(self, on_change: Callable[[], None]) -> None:
        self.on_change = on_change

    def reset_times(self) -> None:
        pass

    def times(self) -> list[tuple[Hop, HopTimes]]:
        return []

    async def close(self) -> None:
        self.is_open = False


@dataclass
class Talk:
    """One conversation over fake sessions; the newest is the last of `sessions`."""

    ends: FakeEnds
    conversation: Conversation
    compute: ThreadPoolExecutor
    sessions: list[FakeSession]

    def stream(self, prompt: Sequence[int], options: GenerationOptions, **more: Any) -> TextStream:
        clock = asyncio.get_running_loop().time
        return TextStream(self.conversation, self.ends, self.compute, prompt, options, clock=clock, **more)

    async def answer(self, prompt: Sequence[int], options: GenerationOptions, **more: Any) -> Generation:
        return await self.stream(prompt, options, **more).result()


@asynccontextmanager
async def talk(
    ends: FakeEnds | None = None, *, context: int = 500, room: int = 0, **session: Any
) -> AsyncIterator[Talk]:
    """A conversation whose sessions are as `session` says."""
    model, sessions = ends or FakeEnds(), list[FakeSession]()

    async def open_session(tokens: Sequence[int], *, needed: int, wished: int) -> Any:
        sessions.append(FakeSession(model, max(needed, wished), **session))
        return sessions[-1]

    with ThreadPoolExecutor(1) as compute:
        conversation = Conversation(model, compute, open_session, context=context, room=room)
        yield Talk(model, conversation, compute, sessions)
        await conversation.close()
