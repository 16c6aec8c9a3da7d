"""Two doors to one swarm: its HTTP API, asked with next to no client, and the library that is behind that."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, TypeAlias
from urllib.parse import urlsplit

import msgspec

from swarm.client.facade import Message, Swarm

MAX_LINE = 2**20

Messages: TypeAlias = list[Message]


@dataclass(frozen=True)
class Told:
    """An answer, when it was asked for, and when each piece of its text came, in seconds."""

    text: str
    asked: float
    moments: tuple[float, ...]

    @property
    def wait(self) -> float:
        """Seconds until the first piece."""
        return self.moments[0] - self.asked

    @property
    def gaps(self) -> list[float]:
        """Seconds between pieces."""
        return [later - earlier for earlier, later in pairwise(self.moments)]


class Door(Protocol):
    """One client's way to answers, one after the other."""

    async def ask(self, messages: Messages, tokens: int) -> Told:
        """The likeliest answer, of so many `tokens`."""
        ...


class Library:
    """The library in this process."""

    def __init__(self, swarm: Swarm):
        self._swarm = swarm

    async def ask(self, messages: Messages, tokens: int) -> Told:
        asked, pieces, moments = time.monotonic(), [], []
        async for piece in self._swarm.stream(messages, max_new_tokens=tokens, ignore_eos=True):
            pieces.append(piece)
            moments.append(time.monotonic())
        return Told("".join(pieces), asked, tuple(moments))


class _Delta(msgspec.Struct):
    content: str = ""


class _Choice(msgspec.Struct):
    delta: _Delta


class _Chunk(msgspec.Struct):
    choices: list[_Choice]


class Http:
    """One connection to the API, kept open from request to request."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, model: str):
        self._reader = reader
        self._writer = writer
        self._host = host
        self._model = model
        self._chunk = msgspec.json.Decoder(_Chunk)

    async def ask(self, messages: Messages, tokens: int) -> Told:
        asked, pieces, moments = time.monotonic(), [], []
        self._writer.write(self._request(messages, tokens))
        async for event in self._events():
            if piece := self._chunk.decode(event).choices[0].delta.content:
                pieces.append(piece)
                moments.append(time.monotonic())
        return Told("".join(pieces), asked, tuple(moments))

    def _request(self, messages: Messages, tokens: int) -> bytes:
        asked = {"model": self._model, "messages": messages, "max_tokens": tokens, "temperature": 0}
        body = msgspec.json.encode(asked | {"ignore_eos": True, "stream": True})
        return (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {self._host}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        ).encode() + body

    async def _events(self) -> AsyncIterator[bytes]:
        """The JSON of each event; raises RuntimeError where the answer is another one."""
        status = await self._reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"The API answered {status!r}.")
        while (line := await self._reader.readline()) != b"0\r\n":
            if not line:
                raise RuntimeError("The API ended an answer before its time.")
            if line.startswith(b"data: {"):
                yield line[len(b"data: ") :]
        await self._reader.readline()


@asynccontextmanager
async def http_door(url: str, model: str) -> AsyncIterator[Http]:
    """A door to the API at `url`."""
    place = urlsplit(url)
    assert place.hostname is not None
    reader, writer = await asyncio.open_connection(place.hostname, place.port, limit=MAX_LINE)
    try:
        yield Http(reader, writer, place.netloc, model)
    finally:
        writer.close()
