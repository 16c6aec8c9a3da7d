"""Answering a request: from what is asked to a response, over one client of a swarm.

Owns what the answers share: the seats, and the vocabulary for grammars and log-probabilities. Knows nothing
of paths, nor of who may ask.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from functools import partial
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from swarm.client.answer import end_tokens
from swarm.client.facade import Swarm, context_length
from swarm.client.generation import TextStream
from swarm.client.grammar import Grammar, Vocabulary
from swarm.client.http.chat_shape import ChatShape
from swarm.client.http.choices import Choice, Event, Routed, Seats, written
from swarm.client.http.completion_shape import CompletionShape
from swarm.client.http.prompts import chat_tokens, completion_prompts
from swarm.client.http.refusals import wrong
from swarm.client.http.requests import Asked, ChatRequest, CompletionRequest
from swarm.client.http.route_shape import route_chunk
from swarm.client.http.streaming import EventStream, while_asked
from swarm.client.http.translation import chat_options, completion_options, grammar_of, needs_grammar
from swarm.client.options import GenerationOptions

logger = logging.getLogger(__name__)


class Shape(Protocol):
    """Makes of a request's events what its answer looks like. `named` says what its chunks belong to."""

    named: dict[str, Any]

    def chunks(self, event: Event) -> list[dict[str, Any]]: ...
    def end(self) -> list[dict[str, Any]]: ...
    def whole(self, events: Sequence[Event]) -> dict[str, Any]: ...


class Answering:
    """Answers to requests for `model`, as it is listed.

    `max_answers` are written at a time; a chat's answer has `default_tokens` where nothing else is asked for;
    servers with room are waited for `patience` seconds. Answers end once `over` is set.
    """

    def __init__(self, swarm: Swarm, model: str, *, max_answers: int, default_tokens: int, patience: float):
        self.seats = Seats(max_answers)
        self.over = asyncio.Event()
        self.context = context_length(swarm.model)
        self._swarm = swarm
        self._model = model
        self._default_tokens = default_tokens
        self._patience = patience
        self._vocabulary: Vocabulary | None = None
        self._loading = asyncio.Lock()

    async def chat(self, request: Request, asked: ChatRequest) -> Response:
        """
        Raises:
            Refusal, SwarmError: there is no answer.
            Gone: nobody waits for it any more.
        """
        return await self._seated(asked, asked.n, "n", partial(self._chat, request, asked))

    async def complete(self, request: Request, asked: CompletionRequest) -> Response:
        """As `chat`."""
        count, param = asked.n * len(asked.prompts), "n" if asked.n > 1 else "prompt"
        return await self._seated(asked, count, param, partial(self._complete, request, asked))

    async def _seated(
        self, asked: Asked, count: int, param: str, answer: Callable[[AsyncExitStack], Awaitable[Response]]
    ) -> Response:
        """`answer` with seats for the `count` answers that `param` wants, left when they have ended."""
        if asked.user:
            logger.info("a request for %d answers is of user %r", count, asked.user[:64])
        if max(asked.logit_bias, default=0) >= self._swarm.model.vocab_size:
            raise wrong("logit_bias", f"This model has no token {max(asked.logit_bias)}.")
        async with AsyncExitStack() as resources:
            self.seats.take(count, param)
            resources.callback(self.seats.leave, count)
            return await answer(resources)

    async def _chat(self, request: Request, asked: ChatRequest, resources: AsyncExitStack) -> Response:
        swarm = self._swarm
        tokens = await asyncio.to_thread(chat_tokens, asked, swarm.ends, swarm.model.vocab_size, self.context)
        grammar = await self._grammar(asked)
        shape = ChatShape(
            f"chatcmpl-{secrets.token_hex(12)}",
            int(time.time()),
            self._model,
            asked.n,
            reads_calls=asked.calls_tools,
            bytes_of=(await self._known_vocabulary()).bytes_of if asked.logprobs else None,
            tells_usage=asked.tells_usage,
        )
        choices = [
            self._choice(asked, index, 0, tokens, chat_options(asked, index, self._default_tokens, grammar))
            for index in range(asked.n)
        ]
        return await self._answer(request, asked, shape, choices, resources)

    async def _complete(
        self, request: Request, asked: CompletionRequest, resources: AsyncExitStack
    ) -> Response:
        swarm = self._swarm
        prompts = await asyncio.to_thread(
            completion_prompts, asked, swarm.ends, swarm.model.vocab_size, self.context
        )
        shape = CompletionShape(
            f"cmpl-{secrets.token_hex(12)}",
            int(time.time()),
            self._model,
            prompts,
            asked.n,
            echoes=asked.echo,
            tells_answer=asked.max_tokens > 0,
            bytes_of=(await self._known_vocabulary()).bytes_of if asked.logprobs is not None else None,
            tells_usage=asked.tells_usage,
        )
        places = [divmod(index, asked.n)[0] for index in range(asked.n * len(prompts))]
        choices = [
            self._choice(asked, index, at, prompts[at].tokens, completion_options(asked, index))
            for index, at in enumerate(places)
        ]
        return await self._answer(request, asked, shape, choices, resources)

    def _choice(
        self, asked: Asked, index: int, prompt: int, tokens: Sequence[int], options: GenerationOptions
    ) -> Choice:
        def begin() -> TextStream:
            return self._swarm.stream_tokens(tokens, options, patience=self._patience)

        return Choice(index, prompt, begin, asked.tells_route)

    async def _grammar(self, asked: ChatRequest) -> Grammar | None:
        if not needs_grammar(asked):
            return None
        return await asyncio.to_thread(grammar_of, asked, await self._known_vocabulary())

    async def _known_vocabulary(self) -> Vocabulary:
        """The model's vocabulary, made when it is first asked for."""
        async with self._loading:
            if self._vocabulary is None:
                ends, size = self._swarm.ends, self._swarm.model.vocab_size
                self._vocabulary = await asyncio.to_thread(Vocabulary, ends.tokenizer, size, end_tokens(ends))
        return self._vocabulary

    async def _answer(
        self,
        request: Request,
        asked: Asked,
        shape: Shape,
        choices: Sequence[Choice],
        resources: AsyncExitStack,
    ) -> Response:
        """Nothing of a stream is sent before its first token, so that what fails until then has a status.

        One that tells its route begins with that, as soon as there is one.
        """
        if not asked.stream:
            return JSONResponse(shape.whole(await while_asked(request.receive, self.over, _all(choices))))
        events = _chunks(shape, choices)
        resources.push_async_callback(events.aclose)
        first = await while_asked(request.receive, self.over, anext(events))
        return EventStream(first, events, self.over, resources.pop_all())


async def _all(choices: Sequence[Choice]) -> list[Event]:
    async with aclosing(written(choices)) as events:
        return [event async for event in events if not isinstance(event, Routed)]


async def _chunks(shape: Shape, choices: Sequence[Choice]) -> AsyncGenerator[list[dict[str, Any]], None]:
    """The chunks of a stream, as they come."""
    async with aclosing(written(choices)) as events:
        async for event in events:
            if isinstance(event, Routed):
                yield [route_chunk(event, shape.named)]
            elif chunks := shape.chunks(event):
                yield chunks
    if chunks := shape.end():
        yield chunks
