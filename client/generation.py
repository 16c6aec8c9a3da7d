"""Generation: from a prompt's tokens to an answer's text, piece by piece.

Owns what is told of an answer while it is written, and what is reported of it. The tokens come from
`decoding`; when they end, and what text they are, `answer` knows.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import Executor
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError

from swarm.client.answer import Answer, FinishReason, TextEnds
from swarm.client.conversation import Conversation
from swarm.client.decoding import Decoding, NewDrafter, Scoring
from swarm.client.drafting import prompt_lookup
from swarm.client.options import GenerationOptions
from swarm.client.progress import HopReport, Progress
from swarm.client.sampling import Sampler
from swarm.client.scores import TokenScore
from swarm.client.speculation import SpeculationReport
from swarm.errors import InputError


@dataclass(frozen=True)
class AnswerToken:
    """A token of an answer, its score if that is wanted, and the `offset` at which its text begins."""

    token: int
    offset: int
    score: TokenScore | None = None


@dataclass(frozen=True)
class Generation:
    """A finished answer. `token_ids` are the new tokens alone, an end-of-text token included.

    `ttft_ms` is the time to the first token, the opening of the session included; `tokens_per_s` the
    rate of the tokens after it. The hops held `cached_tokens` of the prompt's tokens already. Lost hops were
    replaced `recoveries` times, for which `replayed_tokens` were sent again; `journal_bytes` are what the
    session keeps to be able to.
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
    replayed_tokens: int = 0
    journal_bytes: int = 0
    speculation: SpeculationReport = field(default_factory=SpeculationReport)

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
            "speculation": self.speculation.as_json(),
            "recoveries": self.recoveries,
            "replayed_tokens": self.replayed_tokens,
            "journal_bytes": self.journal_bytes,
        }


class TextStream:
    """An answer as it is written: iterate it for pieces of text, then read `generation`.

    `stop` ends the answer after the running step, with what there is by then.
    """

    def __init__(
        self,
        conversation: Conversation,
        ends: TextEnds,
        compute: Executor,
        prompt: Sequence[int],
        options: GenerationOptions,
        *,
        drafter: NewDrafter = prompt_lookup,
        is_last: bool = False,
        on_end: Callable[[Generation], None] = lambda answer: None,
        clock: Callable[[], float],
    ):
        """`is_last` closes the conversation after this answer; `on_end` is told a finished answer.

        `drafter` makes what drafts tokens, if the options want that.
        """
        self.generation: Generation | None = None
        self._answer = Answer(ends, prompt, options, conversation.context)
        self._conversation = conversation
        constraint = options.grammar.constraint() if options.grammar is not None else None
        sampler = Sampler(options.sampling, first=len(prompt), constraint=constraint)
        speculates = drafter if options.speculate else None
        scoring = Scoring(options.logprobs, options.score_prompt) if options.logprobs is not None else None
        self._decoding = Decoding(
            conversation, ends, compute, sampler, speculates, clock, scoring, self._answer.ends_at
        )
        self._is_last = is_last
        self._on_end = on_end
        self._now = clock
        self._clock = _Clock(clock())
        self._pieces = self._run()

    def __aiter__(self) -> AsyncIterator[str]:
        return self._pieces

    @property
    def prompt_scores(self) -> Sequence[TokenScore]:
        """Those of the prompt's tokens from the second on, once the first piece is there, if wanted."""
        return self._decoding.prompt_scores

    def tokens_after(self, count: int, *, hidden: bool = False) -> list[AnswerToken]:
        """The answer's tokens from number `count` on of which its text shows something by now.

        Those that end the answer, are part of a stop string or of half a character are `hidden`.
        """
        found = enumerate(self._answer.tokens_after(count, hidden=hidden), count)
        scores = self._decoding.scores
        return [AnswerToken(token, offset, scores[at] if scores else None) for at, (token, offset) in found]

    @property
    def progress(self) -> Progress:
        """How the answer is coming along, once it has hops."""
        answer, decoding, losses = self._answer, self._decoding, self._decoding.losses
        return Progress(
            route=tuple(HopReport.of(hop, times) for hop, times in decoding.session.times()),
            changes=tuple(decoding.changes),
            prompt_tokens=len(answer.prompt),
            new_tokens=len(answer.new_tokens),
            cached_tokens=decoding.cached_tokens,
            recoveries=losses.recoveries,
            replayed_tokens=losses.replayed_tokens,
            ttft_ms=self._clock.ttft_ms,
            tokens_per_s=self._clock.tokens_per_s,
            speculation=decoding.report,
        )

    def tell_route(self, on_route: Callable[[], None]) -> None:
        """Call `on_route` once the answer has hops, and again whenever they change."""
        self._decoding.on_route = on_route

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
            self._decoding.close()
            if self._is_last:
                await self._conversation.close()

    async def _write(self) -> AsyncGenerator[str, None]:
        answer, decoding = self._answer, self._decoding
        clock = self._clock = _Clock(self._now())
        chosen = [await decoding.begin(answer.prompt, answer.options.max_new_tokens)]
        while True:
            for token in chosen:
                if answer.finish_reason is None:
                    clock.tick(self._now())
                    if piece := answer.push(token):
                        yield piece
            if answer.finish_reason is not None:
                break
            chosen = await decoding.next(answer.tokens, answer.room)
        if piece := answer.flush():
            yield piece
        self.generation = self._report(answer.finish_reason)
        self._on_end(self.generation)

    def _report(self, reason: FinishReason) -> Generation:
        at_end = self.progress
        return Generation(
            text=self._answer.text,
            token_ids=self._answer.new_tokens,
            prompt_tokens=at_end.prompt_tokens,
            finish_reason=reason,
            ttft_ms=at_end.ttft_ms,
            tokens_per_s=at_end.tokens_per_s,
            route=at_end.route,
            recoveries=at_end.recoveries,
            cached_tokens=at_end.cached_tokens,
            replayed_tokens=at_end.replayed_tokens,
            journal_bytes=self._decoding.session.journal_bytes,
            speculation=at_end.speculation,
        )


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


def chat_prompt(tokenizer: Any, messages: Sequence[dict[str, Any]], **template: Any) -> list[int]:
    """The tokens of a conversation, up to where the model's answer begins; its template is told `template`.

    Raises:
        InputError: the model has no chat template, or its template refuses these messages.
    """
    if not tokenizer.chat_template:
        raise InputError("This model has no chat template.", "Give the text itself to continue, with --raw.")
    try:
        text = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=False, **template
        )
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, TemplateError) as error:
        raise InputError(
            f"The model's chat template refuses these messages: {error}.",
            "Messages are {'role': 'user' | 'assistant' | 'system', 'content': text}.",
        ) from error
    return tokenizer(text, add_special_tokens=False).input_ids


def raw_prompt(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text that the model continues."""
    return tokenizer(text).input_ids
