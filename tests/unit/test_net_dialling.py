"""What is found by connecting to a port: real sockets on loopback, to which nothing may be sent."""

import asyncio
import errno
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from swarm.net.dialling import GREETING, dial, resolve

SOON, AMPLE = 0.05, 10.0

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def listening(serve: Serve) -> AsyncIterator[tuple[int, list[bytes]]]:
    """A port on which `serve` answers, and what was sent there."""
    sent: list[bytes] = []
    has_ended = asyncio.Event()

    async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
            sent.append(await reader.read())
        except ConnectionResetError:
            pass
        finally:
            writer.close()
            has_ended.set()

    server = await asyncio.start_server(on_connection, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], sent
        await has_ended.wait()
    assert b"".join(sent) == b""


def saying(text: bytes, *, ends: bool = False) -> Serve:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(text)
        await writer.drain()
        if ends:
            writer.close()

    return serve


@pytest.mark.parametrize(
    ("serve", "timeout", "found"),
    [
        (saying(GREETING), AMPLE, "greeted"),
        (saying(GREETING + b"more"), AMPLE, "greeted"),
        (saying(b"HTTP/1.1 400 Bad Request\r\n\r\n"), AMPLE, "not_a_peer"),
        (saying(GREETING[:-1], ends=True), AMPLE, "not_a_peer"),
        (saying(b"", ends=True), AMPLE, "not_a_peer"),
        (saying(b""), SOON, "not_a_peer"),
    ],
)
async def test_who_listens_is_told_by_the_greeting(serve: Serve, timeout: float, found: str) -> None:
    async with listening(serve) as (port, _):
        assert await dial("127.0.0.1", port, timeout) == found


async def test_nobody_listens(free_port: int) -> None:
    assert await dial("127.0.0.1", free_port, AMPLE) == "refused"


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (OSError(errno.EHOSTUNREACH, "No route to host"), "no_way"),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), "no_way"),
        (OSError(errno.ETIMEDOUT, "Connection timed out"), "silent"),
    ],
)
async def test_no_way_leads_there(error: OSError, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(asyncio, "open_connection", fail)
    assert await dial("192.0.2.1", 1, AMPLE) == found


async def test_nothing_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async def wait(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(asyncio, "open_connection", wait)
    assert await dial("192.0.2.1", 1, SOON) == "silent"


async def test_names_lead_to_addresses() -> None:
    assert await resolve("localhost", socket.AF_INET, AMPLE) == ["127.0.0.1"]
    assert await resolve("x" * 64 + ".invalid", socket.AF_UNSPEC, AMPLE) == []


async def test_a_name_that_nobody_tells_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def wait(*_: object, **__: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", wait)
    assert await resolve("slow.invalid", socket.AF_UNSPEC, SOON) == []
