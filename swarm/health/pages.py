"""The page and the state as bytes, made once for each version of the state however many ask for it."""

import asyncio
import gzip
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from swarm.health.drawing import page_of
from swarm.health.watch import Watch

COMPRESSION = 5


@dataclass(frozen=True)
class Rendered:
    """One version's bytes, plain and compressed, with the name that a browser keeps them by."""

    version: int
    body: bytes
    zipped: bytes
    etag: str


class Rendering:
    """What `render` makes of the newest state, made anew only when the state is."""

    def __init__(self, watch: Watch, render: Callable[[Watch], bytes]):
        self._watch = watch
        self._render = render
        self._newest: Rendered | None = None
        self._turn = asyncio.Lock()

    async def newest(self) -> Rendered:
        """The bytes of the state as it is now. Drawn in a thread: a large swarm takes long."""
        async with self._turn:
            if self._newest is None or self._newest.version != self._watch.version:
                self._newest = await asyncio.to_thread(self._draw, self._watch.version)
            return self._newest

    def _draw(self, version: int) -> Rendered:
        body = self._render(self._watch)
        return Rendered(
            version, body, gzip.compress(body, COMPRESSION), f'W/"{self._watch.started:x}-{version}"'
        )


def html_of(watch: Watch) -> bytes:
    return page_of(watch.state, watch.version).encode()


def json_of(watch: Watch) -> bytes:
    return msgspec.json.encode(watch.state)
