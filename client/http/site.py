"""The API over one client of a swarm, and the page to chat by it: paths, who may ask, how they are refused.

Knows requests by what `answering` makes of them; how connections are taken is not known here.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from swarm.client.facade import Swarm
from swarm.client.http.access import Keys, body_of, check_host
from swarm.client.http.answering import Answering
from swarm.client.http.openapi import document
from swarm.client.http.refusals import Refusal, refusal_of
from swarm.client.http.requests import ChatRequest, CompletionRequest, read
from swarm.client.http.streaming import Gone
from swarm.client.http.translation import served_names
from swarm.errors import SwarmError
from swarm.listening import CLOSE_TIMEOUT
from swarm.page_files import HEADERS, page_file

PAGE = Path(__file__).parent / "page"

PAGE_HEADERS = HEADERS | {
    "Content-Security-Policy": f"{HEADERS['Content-Security-Policy']}; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
}
"""On the page, besides, no text ever becomes markup."""

Endpoint: TypeAlias = Callable[[Request], Awaitable[Response]]

NOBODY_WAITS = 499
"""The status of an answer that nobody gets."""

GRACE = CLOSE_TIMEOUT / 2
"""Seconds that answers get when the server ends."""


@dataclass(frozen=True)
class SiteOptions:
    """How the API is to be had.

    `is_local` says that only this machine reaches it; `given_name` is what the model was asked for by.
    The others are as in `Answering`.
    """

    given_name: str = ""
    keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_answers: int = 64
    default_tokens: int = 2048
    patience: float = 10.0
    is_local: bool = True


class ApiSite:
    """The application."""

    def __init__(self, swarm: Swarm, options: SiteOptions | None = None):
        options = options or SiteOptions()
        self._options = options
        self._keys = Keys(options.keys)
        self._created = int(time.time())
        self._names = served_names(swarm.model.name, swarm.model.model_id, options.given_name)
        self._answering = Answering(
            swarm,
            self._names[0],
            max_answers=options.max_answers,
            default_tokens=options.default_tokens,
            patience=options.patience,
        )
        self.app = Starlette(
            routes=[
                *self._page(),
                Route("/healthz", self._on_healthz),
                Route("/openapi.json", self._guarded(self._on_document)),
                Route("/v1/models", self._guarded(self._on_models)),
                Route("/v1/models/{model:path}", self._guarded(self._on_model)),
                Route("/v1/chat/completions", self._guarded(self._on_chat), methods=["POST"]),
                Route("/v1/completions", self._guarded(self._on_completions), methods=["POST"]),
                Route("/v1/embeddings", self._guarded(_on_embeddings), methods=["POST"]),
            ],
            middleware=_cors(options.cors_origins),
            exception_handlers={HTTPException: _on_http_error, Exception: _on_bug},
        )

    def _page(self) -> list[Route]:
        """The page and its files, which are no secret: they ask the API for everything else."""
        open_to_all = partial(self._guarded, needs_key=False)
        files = [file for file in sorted(PAGE.iterdir()) if file.name != "page.html"]
        return [
            Route("/", open_to_all(page_file(PAGE / "page.html", PAGE_HEADERS))),
            *(Route(f"/page/{file.name}", open_to_all(page_file(file, PAGE_HEADERS))) for file in files),
        ]

    def _guarded(self, answer: Endpoint, *, needs_key: bool = True) -> Endpoint:
        """`answer` for who may ask; what it is refused with becomes a response."""

        async def guarded(request: Request) -> Response:
            try:
                if self._options.is_local:
                    check_host(request)
                if needs_key:
                    self._keys.check(request.headers.get("authorization", ""))
                return await answer(request)
            except (Gone, ClientDisconnect):
                return Response(status_code=NOBODY_WAITS)
            except SwarmError as error:
                return _refused(refusal_of(error))
            except Refusal as refusal:
                return _refused(refusal)

        return guarded

    @property
    def answers(self) -> int:
        """How many are being written."""
        return self._answering.seats.taken

    def close(self) -> None:
        """Let answers go on for `GRACE` seconds, and end them then."""
        asyncio.get_running_loop().call_later(GRACE, self._answering.over.set)

    async def _on_healthz(self, request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def _on_models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def _on_model(self, request: Request) -> Response:
        self._check_model(request.path_params["model"])
        return JSONResponse(self._model())

    async def _on_document(self, request: Request) -> Response:
        return JSONResponse(document(self._names[0], asks_for_keys=bool(self._keys)))

    def _model(self) -> dict[str, Any]:
        return {
            "id": self._names[0],
            "object": "model",
            "created": self._created,
            "owned_by": "swarm",
            "max_model_len": self._answering.context,
        }

    def _check_model(self, name: str) -> None:
        if name not in self._names:
            message = f"This server has no model '{name[:128]}'; it has '{self._names[0]}'."
            raise Refusal(404, message, param="model", code="model_not_found")

    async def _on_chat(self, request: Request) -> Response:
        asked = read(await body_of(request), ChatRequest)
        self._check_model(asked.model)
        return await self._answering.chat(request, asked)

    async def _on_completions(self, request: Request) -> Response:
        asked = read(await body_of(request), CompletionRequest)
        self._check_model(asked.model)
        return await self._answering.complete(request, asked)


async def _on_embeddings(request: Request) -> Response:
    message = "This server has no embeddings: it serves a model that writes text."
    raise Refusal(404, message, code="unsupported_endpoint")


def _refused(refusal: Refusal) -> Response:
    return JSONResponse(refusal.body(), refusal.status, refusal.headers())


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = {
        404: f"There is nothing at {request.url.path[:128]}.",
        405: f"{request.method} is not for this path.",
    }
    refusal = Refusal(error.status_code, said.get(error.status_code, error.detail))
    return JSONResponse(refusal.body(), refusal.status, error.headers)


async def _on_bug(request: Request, error: Exception) -> Response:
    return _refused(Refusal(500, "This is a fault of this server; its log says more.", code="internal_error"))


def _cors(origins: Sequence[str]) -> list[Middleware]:
    if not origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            allow_private_network=True,
            expose_headers=["Retry-After"],
        )
    ]
