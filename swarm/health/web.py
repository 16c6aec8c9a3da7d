"""What the health page answers over HTTP: the page, its JSON, its news, reachability and metrics.

Owns the paths, the headers and the bounds on what strangers may ask. Knows a `Watch`; how connections are
taken is not known here.
"""

import asyncio
import math
from collections.abc import AsyncIterator
from pathlib import Path

from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from swarm.allowance import Allowance
from swarm.health.metrics import registry_of
from swarm.health.pages import Rendering, html_of, json_of
from swarm.health.watch import Watch
from swarm.net.identity import is_peer_id
from swarm.net.transport import PeerId
from swarm.page_files import HEADERS, page_file

STATIC = Path(__file__).parent / "static"

MAX_READERS = 400
"""So many are told of news at a time; the pages of others ask for it."""

HEARTBEAT = 15.0
"""Seconds after which a reader is sent something at the latest, so that a broken connection is noticed."""

CHECKS_PER_SECOND = 0.5
CHECKS_AT_ONCE = 10
MAX_CHECKS = 16
CHECK_TIMEOUT = 15.0


class HealthSite:
    """The application. `close` ends the streams of news, which otherwise never end."""

    def __init__(self, watch: Watch):
        self._watch = watch
        self._page = Rendering(watch, html_of)
        self._state = Rendering(watch, json_of)
        self._metrics = registry_of(lambda: watch.state)
        self._allowance = Allowance(CHECKS_PER_SECOND, CHECKS_AT_ONCE)
        self._checks = 0
        self._readers = 0
        self._is_closing = asyncio.Event()
        routes = [
            Route("/", self._on_page),
            Route("/api/v1/state", self._on_state),
            Route("/api/v1/events", self._on_events),
            Route("/api/v1/is_reachable/{peer}", self._on_is_reachable),
            Route("/metrics", self._on_metrics),
            Route("/healthz", self._on_healthz),
            *(Route(f"/static/{file.name}", page_file(file)) for file in sorted(STATIC.iterdir())),
        ]
        self.app: ASGIApp = _Headers(Starlette(routes=routes))

    def close(self) -> None:
        """End all streams of news; refuse new ones. Safe to call again."""
        self._is_closing.set()

    async def _on_page(self, request: Request) -> Response:
        return await _rendered(request, self._page, "text/html; charset=utf-8")

    async def _on_state(self, request: Request) -> Response:
        return await _rendered(request, self._state, "application/json")

    async def _on_events(self, request: Request) -> Response:
        if request.method == "HEAD":
            return Response(media_type="text/event-stream")
        if self._readers >= MAX_READERS or self._is_closing.is_set():
            return _refusal(503, "Too many read along.", "Ask for /api/v1/state from time to time.", 10)
        return StreamingResponse(
            self._news(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"}
        )

    async def _news(self) -> AsyncIterator[str]:
        """The number of each new state, as server-sent events."""
        self._readers += 1
        try:
            version = -1
            yield "retry: 3000\n\n"
            while not self._is_closing.is_set():
                newer = await self._next(version)
                yield f"event: state\ndata: {newer}\n\n" if newer > version else ": still here\n\n"
                version = newer
        finally:
            self._readers -= 1

    async def _next(self, version: int) -> int:
        """The version that is newer, or the same after `HEARTBEAT` seconds or when this closes."""
        newer = asyncio.create_task(self._watch.newer_than(version))
        closing = asyncio.create_task(self._is_closing.wait())
        try:
            await asyncio.wait((newer, closing), timeout=HEARTBEAT, return_when=asyncio.FIRST_COMPLETED)
            return newer.result() if newer.done() else version
        finally:
            newer.cancel()
            closing.cancel()
            await asyncio.gather(newer, closing, return_exceptions=True)

    async def _on_is_reachable(self, request: Request) -> Response:
        peer = request.path_params["peer"]
        if not is_peer_id(peer):
            return _refusal(400, "That is not the id of a peer.", "It looks like 12D3KooW….")
        client = request.client.host if request.client else ""
        if wait := self._allowance.take(client, self._watch.now()):
            return _refusal(429, "That is too many questions.", "Wait a little.", wait)
        if self._checks >= MAX_CHECKS:
            return _refusal(503, "Too many peers are being asked for.", "Try again soon.", 5)
        self._checks += 1
        try:
            async with asyncio.timeout(CHECK_TIMEOUT):
                reach = await self._watch.check(PeerId(peer))
        except TimeoutError:
            return _refusal(504, "There was no time to ask that peer.", "Try again soon.", 5)
        finally:
            self._checks -= 1
        said = {
            "peer": peer,
            "reachable": reach.is_reachable,
            "rtt_ms": None if reach.rtt is None else round(reach.rtt * 1000, 3),
            "at": reach.at,
        }
        return JSONResponse(said, headers={"Cache-Control": "no-store"})

    async def _on_metrics(self, request: Request) -> Response:
        body = await asyncio.to_thread(generate_latest, self._metrics)
        return Response(body, headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})

    async def _on_healthz(self, request: Request) -> Response:
        """Healthy is a page that shows what is so now."""
        is_current = self._watch.is_current
        return PlainTextResponse("ok\n" if is_current else "out of date\n", 200 if is_current else 503)


async def _rendered(request: Request, rendering: Rendering, media_type: str) -> Response:
    rendered = await rendering.newest()
    headers = {"ETag": rendered.etag, "Cache-Control": "no-cache", "Vary": "Accept-Encoding"}
    if rendered.etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    if "gzip" in request.headers.get("accept-encoding", ""):
        headers["Content-Encoding"] = "gzip"
        return Response(rendered.zipped, media_type=media_type, headers=headers)
    return Response(rendered.body, media_type=media_type, headers=headers)


def _refusal(status: int, message: str, hint: str, retry_after: float = 0.0) -> Response:
    headers = {"Retry-After": str(math.ceil(retry_after))} if retry_after else {}
    return JSONResponse({"error": message, "hint": hint}, status, headers)


class _Headers:
    """Adds `HEADERS` to every answer."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self._app(scope, receive, send_with_headers)
