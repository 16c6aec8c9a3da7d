"""Taking HTTP connections: a socket that is ours, and uvicorn on it without its own signals and logs.

Knows an ASGI application by its type alone.
"""

import asyncio
import errno
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from swarm.errors import InputError

MAX_CONNECTIONS = 600
KEEP_ALIVE = 15
BACKLOG = 512
CLOSE_TIMEOUT = 3
"""Seconds that answers on their way get when this ends."""

REQUEST_TIMEOUT = 30.0
"""Seconds in which a connection must have asked for something: silent ones would take all places."""


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the command's."""
        yield


class _Connection(H11Protocol):
    """One that is closed where its next request does not come in time."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._deadline = self._in_time()

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._deadline.cancel()
        self._deadline = self._in_time()
        super().on_response_complete()

    def _in_time(self) -> asyncio.TimerHandle:
        return self.loop.call_later(REQUEST_TIMEOUT, self._close_if_silent)

    def _close_if_silent(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


@asynccontextmanager
async def serving(
    app: ASGIApp, bound: socket.socket, on_close: Callable[[], None] = lambda: None
) -> AsyncIterator[str]:
    """Answer on `bound` while inside, and close it; gives the URL. `on_close` ends answers that never end."""
    config = uvicorn.Config(
        app,
        http=_Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=CLOSE_TIMEOUT,
        backlog=BACKLOG,
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[bound]), name="http server")
    try:
        yield _url(bound)
    finally:
        on_close()
        server.should_exit = True
        await asyncio.wait((task,))
        task.result()


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens on `host` and `port` (0: a free one). Blocks while the host is looked up.

    Raises:
        InputError: there is no such address here, or the port is taken.
    """
    if not 0 <= port < 65536:
        raise _unusable(host, port, "ports go from 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise _unusable(host, port, "there is no such address") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(BACKLOG)  # so that a port in use is found out here
    except OSError as error:
        bound.close()
        raise _unusable(host, port, _reason(error)) from error
    return bound


def _reason(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "another program uses it"
    return os.strerror(error.errno).lower() if error.errno else str(error)


def _unusable(host: str, port: int, reason: str) -> InputError:
    return InputError(
        f"HTTP cannot be served on {host}, port {port}: {reason}.",
        "Give another --host or --port; port 0 is a free one.",
    )


def _url(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"
