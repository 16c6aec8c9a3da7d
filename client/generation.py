"""Generation: from a prompt's tokens to an answer's text, token by token.

Owns when an answer ends and what is reported of it. The conversation moves hidden states; embeddings,
head and sampling run on one compute thread, in one trip a token. Where the likeliest token is wanted, and
the last hop tells it, none of these is needed.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import Executor
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self, TypeAlias

import torch
from jinja2 import TemplateError
from torch import Tensor

from swarm.client.conversation import Conversation, Ends, Outcome
from swarm.client.leg import HopTimes
from swarm.client.options import GenerationOptions
from swarm.client.route import Hop
from swarm.client.sampling import Sampler
from swarm.client.text import Detokenizer, StopScanner
from swarm.errors import InputError
from swarm.spans import Span

FinishReason: TypeAlias = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class HopReport:
    """What one hop did for an answer: mean milliseconds a step on the network, in its queue, computing."""

    peer: str
    name: str
    blocks: Span
    rtt_ms: float
    compute_ms: float
    queue_ms: float

    @property
    def label(self) -> str:
        """How people see the hop: the peer's name, or the end of its id, and its blocks."""
        return f"{self.name or '…' + self.peer[-6:]} [{self.blocks}]"

    @classmethod
    def of(cls, hop: Hop, times: HopTimes) -> Self:
        return cls(hop.peer, hop.announcement.name, hop.span, times.rtt_ms, times.compute_ms, times.queue_ms)


@dataclass(frozen=True)
class Generation:
    """A finished answer. `token_ids` are the new tokens alone, an end-of-text token included.

    `ttft_ms` is the time to the first token, the opening of the session included; `tokens_per_s` the
    rate of the tokens after it. The hops held `cached_tokens` of the
    prompt's tokens already.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: FinishReason
    ttft_ms: float
    tokens_per_s: float
    route: tuple[HopReport, ...]
    recoveries: int = 0
    cached_tokens: int = 0

    def as_json(self) -> dict[str, Any]:
        """The contract of `--json`."""
        return {
            "text": self.text,
            "token_ids": list(self.token_ids),
            "finish_reason": self.finish_reason,
            "usage": {
                "prompt_tokens": self.prompt_tokens,
                "completion_tokens": len(self.token_ids),
                "cached_tokens": self.cached_tokens,
            },
            "timing": {"ttft_ms": round(self.ttft_ms, 2), "tokens_per_s": round(self.tokens_per_s, 2)},
            "route": [
                {
                    "peer": hop.peer,
                    "blocks": list(hop.blocks),
                    "rtt_ms": round(hop.rtt_ms, 3),
                    "compute_ms": round(hop.compute_ms, 3),
                    "queue_ms": round(hop.queue_ms, 3),
                }
                for hop in self.route
            ],
            "recoveries": self.recoveries,
        }


class TextStream:
    """An answer as it is written: iterate it for pieces of text, then read `generation`.

    `stop` ends the answer after the running step, with what there is by then.
    """

    def __init__(
        self,
        conversation: Conversation,
        ends: "TextEnds",
        compute: Executor,
        prompt: Sequence[int],
        options: GenerationOptions,
        *,
        is_last: bool = False,
        on_end: Callable[[Generation], None] = lambda answer: None,
        clock: Callable[[], float],
    ):
        """`is_last` closes the conversation after this answer; `on_end` is told a finished answer."""
        self.generation: Generation | None = None
        self._answer = _Answer(ends, prompt, options)
        self._conversation = conversation
        self._ends = ends
        self._compute = compute
        self._sampler = Sampler(options.sampling)
        self._is_last = is_last
        self._on_end = on_end
        self._now = clock
        self._pieces = self._run()

    def __aiter__(self) -> AsyncIterator[str]:
        return self._pieces

    def stop(self) -> None:
        self._answer.finish("cancelled")

    async def aclose(self) -> None:
        """Give the answer up. Safe to call again."""
        await self._pieces.aclose()

    async def result(self) -> Generation:
        """The whole answer, once it is finished."""
        async with aclosing(self._pieces) as pieces:
            async for _ in pieces:
                pass
        assert self.generation is not None
        return self.generation

    async def _run(self) -> AsyncGenerator[str, None]:
        try:
            async with aclosing(self._write()) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            if self._is_last:
                await self._conversation.close()

    async def _write(self) -> AsyncGenerator[str, None]:
        loop, answer, conversation = asyncio.get_running_loop(), self._answer, self._conversation
        clock = _Clock(self._now())
        turn, outcome, cached_tokens = await conversation.begin(
            answer.prompt, answer.options.max_new_tokens, likeliest=self._sampler.takes_likeliest
        )
        session = conversation.session
        assert session is not None
        session.reset_times()
        choose: Callable[[Outcome], tuple[int, Tensor | None]]
        choose = self._choose if session.takes_token_ids else self._choose_and_embed
        embedded: Tensor | None
        while answer.finish_reason is None:
            if isinstance(outcome, int) and session.takes_token_ids:
                token, embedded = outcome, None
            else:
                token, embedded = await loop.run_in_executor(self._compute, choose, outcome)
            clock.tick(self._now())
            if piece := answer.push(token, conversation.has_room(answer.length + 2)):
                yield piece
            if answer.finish_reason is None:
                outcome = await conversation.append(turn, token, embedded)
        if piece := answer.flush():
            yield piece
        route = tuple(HopReport.of(hop, times) for hop, times in session.times())
        self.generation = answer.generation(clock, route, cached_tokens)
        self._on_end(self.generation)

    def _choose(self, outcome: Outcome) -> tuple[int, None]:
        """The next token, which needs no embedding; runs on the compute thread."""
        if isinstance(outcome, int):
            return outcome, None
        return self._sampler.choose(self._answer.tokens, self._ends.logits(outcome)[-1]), None

    def _choose_and_embed(self, outcome: Outcome) -> tuple[int, Tensor]:
        """The next token and its embedding [1, hidden]; runs on the compute thread."""
        token, _ = self._choose(outcome)
        return token, self._ends.embed(torch.tensor([token]))


class TextEnds(Ends, Protocol):
    """The ends of a model with its tokenizer, as `swarm.blocks.head.Head` has them."""

    tokenizer: Any
    generation_config: Any


@dataclass
class _Clock:
    """Times of an answer's tokens, in seconds."""

    started: float
    first: float | None = None
    last: float = 0.0
    ticks: int = 0

    def tick(self, now: float) -> None:
        self.ticks += 1
        self.last = now
        if self.first is None:
            self.first = now

    @property
    def ttft_ms(self) -> float:
        return 0.0 if self.first is None else (self.first - self.started) * 1000

    @property
    def tokens_per_s(self) -> float:
        if self.first is None or self.last <= self.first:
            return 0.0
        return (self.ticks - 1) / (self.last - self.first)


class _Answer:
    """The answer so far: its tokens, its text, and why it ended."""

    def __init__(self, ends: TextEnds, prompt: Sequence[int], options: GenerationOptions):
        self.prompt = tuple(prompt)
        self.tokens = list(prompt)
        self.options = options
        self.finish_reason: FinishReason | None = None
        self._eos = frozenset() if options.ignore_eos else end_tokens(ends)
        self._detokenizer = Detokenizer(ends.tokenizer)
        self._scanner = StopScanner(options.stop)
        self._text = ""

    @property
    def length(self) -> int:
        return len(self.tokens)

    def finish(self, reason: FinishReason) -> None:
        if self.finish_reason is None:
            self.finish_reason = reason

    def push(self, token: int, has_room: bool) -> str:
        """Take the next token; what of the text may be shown now. `has_room`: another token would fit."""
        self.tokens.append(token)
        if token in self._eos:
            self.finish("stop")
            return ""
        shown = self._scanner.push(self._detokenizer.push(token))
        if self._scanner.has_stopped:
            self.finish("stop")
        elif not has_room or len(self.tokens) - len(self.prompt) >= self.options.max_new_tokens:
            self.finish("length")
        self._text += shown
        return shown

    def flush(self) -> str:
        if self._scanner.has_stopped:
            return ""
        shown = self._scanner.push(self._detokenizer.flush()) + self._scanner.flush()
        self._text += shown
        return shown

    def generation(self, clock: _Clock, route: tuple[HopReport, ...], cached_tokens: int) -> Generation:
        return Generation(
            text=self._text,
            token_ids=tuple(self.tokens[len(self.prompt) :]),
            prompt_tokens=len(self.prompt),
            finish_reason=self.finish_reason or "cancelled",
            ttft_ms=clock.ttft_ms,
            tokens_per_s=clock.tokens_per_s,
            route=route,
            cached_tokens=cached_tokens,
        )


def end_tokens(ends: TextEnds) -> frozenset[int]:
    """The tokens that end an answer, by the model's generation config and its tokenizer."""
    configured = ends.generation_config.eos_token_id
    listed = configured if isinstance(configured, list | tuple) else [configured]
    return frozenset(token for token in (*listed, ends.tokenizer.eos_token_id) if token is not None)


def chat_prompt(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[int]:
    """The tokens of a conversation, up to where the model's answer begins.

    Raises:
        InputError: the model has no chat template, or its template refuses these messages.
    """
    if not tokenizer.chat_template:
        raise InputError("This model has no chat template.", "Give the text itself to continue, with --raw.")
    try:
        text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    except (TypeError, ValueError, KeyError, TemplateError) as error:
        raise InputError(
            f"The model's chat template refuses these messages: {error}.",
            "Messages are {'role': 'user' | 'assistant' | 'system', 'content': text}.",
        ) from error
    return tokenizer(text, add_special_tokens=False).input_ids


def raw_prompt(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text that the model continues."""
    return tokenizer(text).input_ids
