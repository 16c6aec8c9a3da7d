"""The choices of a request, written at the same time: what each tells, as it comes.

Owns the streams of the choices and the tasks that follow them. What is made of the pieces is not known here.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeAlias

from swarm.client.generation import AnswerToken, Generation, TextStream
from swarm.client.http.refusals import RETRY_AFTER, Refusal, wrong
from swarm.client.progress import Progress
from swarm.client.scores import TokenScore

BOUND = 64
"""Pieces that may wait for a slow reader; then the choices wait."""

REFRESH = 1.0
"""Seconds after which a route is told anew while text comes, since its times are others by then."""


@dataclass(frozen=True)
class Choice:
    """Number `index` of the answers to a request, which answers its prompt number `prompt`.

    With `tells_route` it tells who computes it.
    """

    index: int
    prompt: int
    begin: Callable[[], TextStream]
    tells_route: bool = False


@dataclass(frozen=True)
class Routed:
    """Who computes a choice, and how it is coming along. The first one comes before the choice begins."""

    index: int
    progress: Progress


@dataclass(frozen=True)
class Begin:
    """A choice has begun; the scores of its prompt's tokens from the second on, where they are wanted."""

    index: int
    prompt_scores: tuple[TokenScore, ...]


@dataclass(frozen=True)
class Piece:
    """More text of a choice, and the tokens that it shows."""

    index: int
    text: str
    tokens: tuple[AnswerToken, ...]


@dataclass(frozen=True)
class End:
    """A choice has ended; the tokens that came with no piece, those that its text does not show included."""

    index: int
    tokens: tuple[AnswerToken, ...]
    answer: Generation


Event: TypeAlias = Begin | Piece | End
"""What a choice tells: that it has begun, pieces, and that it has ended."""


class Seats:
    """How many answers may be written at a time."""

    def __init__(self, most: int):
        self.most = most
        self.taken = 0

    def take(self, count: int, param: str) -> None:
        """
        Raises:
            Refusal: there is no room for so many, which are due to the parameter `param`.
        """
        if count > self.most:
            raise wrong(param, f"This asks for {count} answers; {self.most} are written at a time.")
        if self.taken + count > self.most:
            message = f"{self.taken} answers are being written, of {self.most} at most. Try again soon."
            raise Refusal(429, message, code="no_capacity", retry_after=RETRY_AFTER)
        self.taken += count

    def leave(self, count: int) -> None:
        self.taken -= count


class _Routes:
    """Notes on one choice's route: one waits to be told at most, which then says what is so by then."""

    def __init__(self, index: int, stream: TextStream, put: Callable[["_Routes"], None]):
        self._index = index
        self._stream = stream
        self._put = put
        self._now = asyncio.get_running_loop().time
        self._is_noted = False
        self._told_at = self._now()

    @property
    def are_old(self) -> bool:
        return self._now() >= self._told_at + REFRESH

    def note(self) -> None:
        if not self._is_noted:
            self._is_noted = True
            self._put(self)

    def newest(self) -> Routed:
        self._is_noted = False
        self._told_at = self._now()
        return Routed(self._index, self._stream.progress)


async def written(choices: Sequence[Choice]) -> AsyncGenerator[Event | Routed, None]:
    """All that `choices` tell, until each has ended. Closing it gives them up.

    Those of one prompt wait for the first of them, so that hops compute the prompt once and find it again.

    Raises:
        SwarmError: one of them failed; the others are given up.
    """
    told: asyncio.Queue[Event | _Routes | asyncio.Task[None]] = asyncio.Queue()
    room = asyncio.Semaphore(BOUND)
    has_read = [asyncio.Event() for _ in range(1 + max(choice.prompt for choice in choices))]
    firsts = {choice.prompt: choice for choice in reversed(choices)}

    async def tell(event: Event) -> None:
        await room.acquire()
        told.put_nowait(event)

    async def follow(choice: Choice) -> None:
        if firsts[choice.prompt] is not choice:
            await has_read[choice.prompt].wait()
        async with aclosing(choice.begin()) as stream:
            routes = _Routes(choice.index, stream, told.put_nowait)
            if choice.tells_route:
                stream.tell_route(routes.note)
            shown, has_begun = 0, False
            async for text in stream:
                if not has_begun:
                    has_begun = True
                    has_read[choice.prompt].set()
                    await tell(Begin(choice.index, tuple(stream.prompt_scores)))
                tokens = tuple(stream.tokens_after(shown))
                shown += len(tokens)
                await tell(Piece(choice.index, text, tokens))
                if choice.tells_route and routes.are_old:
                    routes.note()
            has_read[choice.prompt].set()
            if not has_begun:
                await tell(Begin(choice.index, tuple(stream.prompt_scores)))
            assert stream.generation is not None
            if choice.tells_route:
                routes.note()
            await tell(End(choice.index, tuple(stream.tokens_after(shown, hidden=True)), stream.generation))

    tasks = [asyncio.create_task(follow(choice), name=f"choice {choice.index}") for choice in choices]
    for task in tasks:
        task.add_done_callback(told.put_nowait)
    try:
        left = len(tasks)
        while left:
            event = await told.get()
            if isinstance(event, asyncio.Task):
                event.result()
                left -= 1
            elif isinstance(event, _Routes):
                yield event.newest()
            else:
                room.release()
                yield event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
