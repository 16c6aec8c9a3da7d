"""What a request is refused with: OpenAI's shape of an error, and what each of our own errors is there.

Pure; knows neither requests nor how answers are sent.
"""

import math
from typing import Any

from swarm.client.faults import NoCapacity, RequestRefused
from swarm.client.route import NoRoute
from swarm.errors import InputError, SwarmError

RETRY_AFTER = 5.0
"""Seconds after which to try again where nobody knows better."""

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class Refusal(Exception):
    """A request ends with an error. `retry_after` is in seconds, 0 where waiting does not help."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float = 0.0,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {
            "error": {"message": self.message, "type": kind, "param": self.param, "code": self.code},
        }

    def headers(self) -> dict[str, str]:
        headers = {"Retry-After": str(math.ceil(self.retry_after))} if self.retry_after else {}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


class Ending(SwarmError):
    """The server ends before the answer does."""

    def __init__(self) -> None:
        super().__init__("This server is ending.", "Ask again in a moment.")


def unsupported(param: str, why: str) -> Refusal:
    """A parameter that is known but not to be had, or not with that value."""
    return Refusal(400, f"'{param}' {why}", param=param, code="unsupported_parameter")


def wrong(param: str | None, message: str) -> Refusal:
    """A value that no request may have."""
    return Refusal(400, message, param=param, code="invalid_value")


def refusal_of(error: SwarmError) -> Refusal:
    """What an error of the swarm is over HTTP: the asker's mistake, no room, no route, or a failure."""
    match error:
        case InputError():
            return wrong(None, str(error))
        case NoCapacity():
            return _full(error, error.retry_after or RETRY_AFTER)
        case NoRoute(is_full=True):
            return _full(error, RETRY_AFTER)
        case RequestRefused():
            return Refusal(500, str(error), code="request_refused")
        case Ending():
            return Refusal(503, str(error), code="ending", retry_after=RETRY_AFTER)
        case NoRoute():
            return Refusal(503, str(error), code="no_route", retry_after=RETRY_AFTER)
    return Refusal(503, str(error), code="swarm_failed", retry_after=RETRY_AFTER)


def _full(error: SwarmError, retry_after: float) -> Refusal:
    return Refusal(429, str(error), code="no_capacity", retry_after=retry_after)
