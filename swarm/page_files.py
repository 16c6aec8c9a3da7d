"""The files of a page, served as the package holds them, and the headers that keep a page to itself.

Knows nothing of what a page shows.
"""

import hashlib
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

TYPES = {".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".svg": "image/svg+xml"}

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
"""Nothing from other hosts, nothing in markup that acts, and nobody who frames the page."""


def page_file(path: Path, headers: Mapping[str, str] = HEADERS) -> Callable[[Request], Awaitable[Response]]:
    """Answers with a file, read once; browsers keep it, and ask whether it is still the same."""
    body = path.read_bytes()
    kept = {**headers, "ETag": f'"{hashlib.sha256(body).hexdigest()[:32]}"', "Cache-Control": "no-cache"}

    async def answer(request: Request) -> Response:
        if kept["ETag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=kept)
        return Response(body, media_type=TYPES[path.suffix], headers=kept)

    return answer
