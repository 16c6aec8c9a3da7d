"""The HTTP endpoint that a server's metrics are read from: `/metrics`, `/shard` and `/healthz`.

Owns the port and its connections, each of them bounded in size, number and time, and one request long.
What there is to read is for `metrics` to say.
"""

import asyncio
import errno
import json
import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus

import h11
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.openmetrics import exposition as openmetrics

from swarm.errors import InputError
from swarm.server.metrics import Metrics

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
MAX_REQUEST_BYTES = 16 * 1024
MAX_CONNECTIONS = 16
DEADLINE = 10.0
"""Seconds that a connection may last."""

TEXT = "text/plain; charset=utf-8"
ENDED = ("draining", "left")


@dataclass(frozen=True)
class Page:
    """What is answered to a request, beside what HTTP adds."""

    status: HTTPStatus
    content_type: str
    body: bytes
    allow: str | None = None


@asynccontextmanager
async def serving(metrics: Metrics, port: int, host: str = LOOPBACK) -> AsyncIterator[str]:
    """Answer HTTP on `port`, 0 for a free one, and watch the event loop meanwhile; gives the metrics' URL.

    Raises:
        InputError: the port is in use, not allowed, or none.
    """
    endpoint = _Endpoint(metrics)
    server = await _listen(endpoint.on_connection, host, port)
    watching = asyncio.create_task(metrics.watch_lag(), name="watch the event loop")
    try:
        yield f"{_origin(server)}/metrics"
    finally:
        server.close()
        watching.cancel()
        await asyncio.gather(watching, endpoint.close(), return_exceptions=True)
        await server.wait_closed()


class _Endpoint:
    """The connections that are open, each with a task of its own."""

    def __init__(self, metrics: Metrics):
        self._metrics = metrics
        self._tasks: set[asyncio.Task[None]] = set()

    def on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._tasks) >= MAX_CONNECTIONS:
            writer.transport.abort()
            return
        task = asyncio.create_task(self._converse(reader, writer), name="answer a metrics request")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """End every connection."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(DEADLINE):
                await _answer(reader, writer, self._metrics)
                writer.close()
                await writer.wait_closed()
        except (TimeoutError, OSError) as error:
            logger.debug("a metrics request was not answered: %r", error)
        finally:
            writer.transport.abort()


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, metrics: Metrics) -> None:
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_REQUEST_BYTES)
    is_head = False
    try:
        request = await _receive(connection, reader)
    except h11.RemoteProtocolError as error:
        page = _text(HTTPStatus(error.error_status_hint), "This is no HTTP request that can be answered.")
    else:
        if request is None:
            return
        is_head = request.method == b"HEAD"
        page = page_for(request, metrics)
    writer.write(_response(connection, page, with_body=not is_head))
    await writer.drain()


async def _receive(connection: h11.Connection, reader: asyncio.StreamReader) -> h11.Request | None:
    """The request without its body; None if the connection ended before.

    Raises:
        RemoteProtocolError: it is not HTTP/1.1, or too long.
    """
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(MAX_REQUEST_BYTES))
        else:
            return event if isinstance(event, h11.Request) else None


def _response(connection: h11.Connection, page: Page, *, with_body: bool) -> bytes:
    headers = [
        ("Content-Type", page.content_type),
        ("Content-Length", str(len(page.body))),
        ("Connection", "close"),
        *([("Allow", page.allow)] if page.allow else []),
    ]
    parts = [
        connection.send(h11.Response(status_code=page.status, headers=headers, reason=page.status.phrase)),
        connection.send(h11.Data(data=page.body)) if with_body else None,
    ]
    return b"".join(part for part in parts if part)


def page_for(request: h11.Request, metrics: Metrics) -> Page:
    """The page that a request asks for, or the one that says why there is none."""
    path = request.target.partition(b"?")[0].decode("ascii", "replace")
    if path not in PAGES:
        return _text(HTTPStatus.NOT_FOUND, f"There is nothing here. There are: {', '.join(PAGES)}.")
    if request.method not in (b"GET", b"HEAD"):
        page = _text(HTTPStatus.METHOD_NOT_ALLOWED, "This can only be read.")
        return Page(page.status, page.content_type, page.body, allow="GET, HEAD")
    try:
        return PAGES[path](request, metrics)
    except Exception:  # a bug of ours, which must not be taken for a server that is gone
        logger.exception("page %s cannot be made", path)
        return _text(HTTPStatus.INTERNAL_SERVER_ERROR, "This server failed; the fault is its own.")


def _metrics_page(request: h11.Request, metrics: Metrics) -> Page:
    """In OpenMetrics for who accepts it, as Prometheus does, else in Prometheus' own text format."""
    accepted = b",".join(value for name, value in request.headers if name == b"accept")
    if b"application/openmetrics-text" in accepted:
        body = openmetrics.generate_latest(metrics.registry)
        return Page(HTTPStatus.OK, openmetrics.CONTENT_TYPE_LATEST, body)
    return Page(HTTPStatus.OK, CONTENT_TYPE_PLAIN_0_0_4, generate_latest(metrics.registry))


def _shard_page(request: h11.Request, metrics: Metrics) -> Page:
    return Page(HTTPStatus.OK, "application/json", json.dumps(metrics.shard()).encode() + b"\n")


def _health_page(request: h11.Request, metrics: Metrics) -> Page:
    """Healthy is who serves, or will: not a server that leaves."""
    state = metrics.cell.phase
    return _text(HTTPStatus.SERVICE_UNAVAILABLE if state in ENDED else HTTPStatus.OK, state)


PAGES: dict[str, Callable[[h11.Request, Metrics], Page]] = {
    "/metrics": _metrics_page,
    "/shard": _shard_page,
    "/healthz": _health_page,
}


def _text(status: HTTPStatus, text: str) -> Page:
    return Page(status, TEXT, f"{text}\n".encode())


async def _listen(
    on_connection: Callable[[asyncio.StreamReader, asyncio.StreamWriter], None], host: str, port: int
) -> asyncio.Server:
    if not 0 <= port < 65536:
        raise _unusable(port, "ports go from 1 to 65535")
    try:
        return await asyncio.start_server(on_connection, host, port)
    except OSError as error:
        raise _unusable(port, _reason(error)) from error


def _unusable(port: int, reason: str) -> InputError:
    return InputError(
        f"Metrics cannot be served on port {port}: {reason}.",
        "Give another --metrics-port, or 0 for a free one.",
    )


def _reason(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "another program uses it"
    return os.strerror(error.errno).lower() if error.errno else str(error)


def _origin(server: asyncio.Server) -> str:
    host, port = server.sockets[0].getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
