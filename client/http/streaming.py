"""Sending answers: as server-sent events, and never longer than somebody waits for them.

Knows ASGI; nothing of what the events say.
"""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import AsyncExitStack, aclosing, suppress
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from swarm.client.http.refusals import Ending, refusal_of
from swarm.errors import SwarmError

T = TypeVar("T")

SEND_TIMEOUT = 60.0
"""Seconds that a reader may take for a piece; then it is taken to be gone."""

DONE = b"data: [DONE]\n\n"


class Gone(Exception):
    """Nobody waits for the answer any more."""


async def while_asked(receive: Receive, over: asyncio.Event, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives; it is cancelled when the client disconnects, or all is `over`.

    Raises:
        Gone: the client has disconnected.
        Ending: all is over.
    """
    working = asyncio.create_task(work, name="answer")
    leaving = asyncio.create_task(_until_gone(receive), name="watch for a disconnect")
    ending = asyncio.create_task(over.wait(), name="watch for the end")
    try:
        await asyncio.wait((working, leaving, ending), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Ending() if ending.done() else Gone
    finally:
        for task in (working, leaving, ending):
            task.cancel()
        await asyncio.gather(working, leaving, ending, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A stream of JSON events, which ends with `[DONE]`, or with an error that comes too late for a status.

    `first` events are there already. It ends early once all is `over`. `resources` are closed after it,
    however it ends.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        first: list[dict[str, Any]],
        events: AsyncGenerator[list[dict[str, Any]], None],
        over: asyncio.Event,
        resources: AsyncExitStack,
    ):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._first = first
        self._events = events
        self._over = over
        self._resources = resources

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._resources:
            with suppress(Gone):
                start: Message = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                await _sent(send, start)
                try:
                    await while_asked(receive, self._over, self._stream(send))
                except SwarmError as error:
                    await self._send(send, encoded([refusal_of(error).body()]))
                await _sent(send, {"type": "http.response.body", "body": b"", "more_body": False})

    async def _stream(self, send: Send) -> None:
        await self._send(send, encoded(self._first))
        async with aclosing(self._events) as events:
            async for some in events:
                await self._send(send, encoded(some))
        await self._send(send, DONE)

    async def _send(self, send: Send, body: bytes) -> None:
        await _sent(send, {"type": "http.response.body", "body": body, "more_body": True})


async def _sent(send: Send, message: Message) -> None:
    try:
        async with asyncio.timeout(SEND_TIMEOUT):
            await send(message)
    except (TimeoutError, OSError) as error:
        raise Gone from error


def encoded(events: list[dict[str, Any]]) -> bytes:
    """Server-sent events, one for each."""
    return b"".join(b"data: %b\n\n" % msgspec.json.encode(event) for event in events)
