"""Taking HTTP connections: they are answered, and those that ask for nothing are closed."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from swarm import listening

SLOW = 0.6
"""Seconds that a slow answer takes: longer than a request may."""


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["path"] == "/slow":
        await asyncio.sleep(SLOW)
    await PlainTextResponse("yes")(scope, receive, send)


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    bound = listening.bind("127.0.0.1", 0)
    async with listening.serving(app, bound):
        reader, writer = await asyncio.open_connection(*bound.getsockname()[:2])
        async with asyncio.timeout(10.0):
            yield reader, writer
        writer.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "REQUEST_TIMEOUT", SLOW / 4)


@pytest.mark.parametrize("begun", [b"", b"GET / HTTP/1.1\r\nHost: x\r\n"])
async def test_who_asks_for_nothing_is_left(begun: bytes) -> None:
    async with connected() as (reader, writer):
        writer.write(begun)
        assert await reader.read() == b""


async def test_who_waits_for_an_answer_gets_it_and_may_ask_again() -> None:
    async with connected() as (reader, writer):
        for path in (b"slow", b"quick", b"slow"):
            writer.write(b"GET /" + path + b" HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await reader.readuntil(b"yes")).startswith(b"HTTP/1.1 200")
        writer.write(b"GET /")
        assert await reader.read() == b""


async def test_what_is_sent_after_an_answer_is_not_taken_for_ever() -> None:
    async def send_on() -> None:
        while True:
            writer.write(bytes(1000))
            await writer.drain()
            await asyncio.sleep(0.01)

    async with connected() as (reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n")
        assert (await reader.readuntil(b"yes")).startswith(b"HTTP/1.1 200")
        with pytest.raises(ConnectionError):
            await send_on()
