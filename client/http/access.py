"""Who may ask, and how much: keys, hosts, the kind and the size of what is sent.

Knows requests by their headers alone.
"""

import asyncio
import hashlib
import hmac
from collections.abc import Iterable
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.requests import Request

from swarm.client.http.refusals import Refusal

MAX_BODY = 8 * 2**20
"""Bytes of a request at most: more text than any model reads."""

BODY_TIMEOUT = 30.0
"""Seconds in which a request must have come."""


class Keys:
    """The keys that may ask; where there are none, everybody may."""

    def __init__(self, keys: Iterable[str] = ()):
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, authorization: str) -> None:
        """
        Raises:
            Refusal: the header holds none of the keys.
        """
        if not self._digests:
            return
        scheme, _, key = authorization.partition(" ")
        given = _digest(key.strip())
        fits = [hmac.compare_digest(given, digest) for digest in self._digests]
        if scheme.lower() != "bearer" or not any(fits):
            raise Refusal(
                401,
                "This is none of this server's API keys." if key else "This server asks for an API key.",
                code="invalid_api_key",
            )


def _digest(key: str) -> bytes:
    """Of one length, so that comparing tells nothing of a key's."""
    return hashlib.sha256(key.encode()).digest()


def check_host(request: Request) -> None:
    """Of a server that only this machine can reach: that no other site's name leads here.

    Raises:
        Refusal: a browser was led here under another name.
    """
    if not is_loopback(_name(request.headers.get("host", ""))):
        raise Refusal(403, "This server answers on this machine only.", code="wrong_host")


def _name(host: str) -> str:
    """The name in a Host header, without its port; empty where there is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


async def body_of(request: Request) -> bytes:
    """The JSON that was sent.

    Raises:
        Refusal: it is too long, too slow, or of a kind that any site may have a browser send.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(415, "Send JSON, with the header 'Content-Type: application/json'.")
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            return await _read(request)
    except TimeoutError as error:
        raise Refusal(408, f"The request did not come within {BODY_TIMEOUT:g} seconds.") from error


async def _read(request: Request) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY:
            raise Refusal(413, f"The request is longer than {MAX_BODY} bytes.")
        parts.append(part)
    return b"".join(parts)
