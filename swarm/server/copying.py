"""Copying what a session holds to its standby at another server, page by page, as pages fill.

Owns the stream there, how far the copy is, and how fast copies may go out: the line is for sessions. Steps
wait for none of it. Must not know how steps are run, nor what the client makes of the copy.
"""

import asyncio
from collections.abc import Callable
from typing import NamedTuple

from swarm.blocks.errors import NoCapacity
from swarm.net.calls import MessageStream
from swarm.net.messages import Adopt, Feed, Mirror
from swarm.net.transport import PeerId, Transport
from swarm.page_keys import PAGE_TOKENS
from swarm.server.span_engine import SpanEngine

PIECE_BYTES = 1024 * 1024
"""About how much is copied at a time."""

PATIENCE = 5.0
PIECE_DEADLINE = 15.0
"""Seconds that the standby has to answer at first, and for one piece."""

LINE_SHARE = 0.2
"""The part of this server's line that all its copies together may take."""

PAUSE = 5.0
"""Seconds until another attempt where the engine has no pages to spare."""


class Progress(NamedTuple):
    """A session holds `tokens` tokens that nothing will change, having taken up step `taken`."""

    tokens: int
    taken: int


class Pace:
    """When copies may go out, so that all take a part of the line. `rate` tells its bytes a second."""

    def __init__(self, rate: Callable[[], float] = lambda: 0.0):
        """A `rate` of 0 stands for one that is not known: nothing waits then."""
        self._rate = rate
        self._free_at = 0.0

    def wait(self, size: int, now: float) -> float:
        """Seconds until `size` bytes, which are counted, may be sent."""
        starts_at = max(now, self._free_at)
        self._free_at = starts_at + pacing(size, self._rate())
        return starts_at - now


class Copying:
    """Copies the session `session_id` of `engine` over `calls`, as `asked` says; `run` does the work."""

    def __init__(self, engine: SpanEngine, asked: Mirror, calls: MessageStream, pace: Pace):
        self._engine = engine
        self._asked = asked
        self._calls = calls
        self._pace = pace
        self._sent = 0
        self._news = asyncio.Event()

    @classmethod
    async def connect(cls, transport: Transport, engine: SpanEngine, asked: Mirror, pace: Pace) -> "Copying":
        """Reach the standby.

        Raises:
            SwarmError: its server cannot be reached, or has no such session.
        """
        calls = MessageStream(await transport.open_stream(PeerId(asked.peer), asked.addresses))
        try:
            await calls.call(Feed(session_id=asked.to_session), timeout=PATIENCE)
        except BaseException:
            calls.close()
            raise
        return cls(engine, asked, calls, pace)

    def cut(self, length: int) -> None:
        """The session is rolled back: what it held from position `length` on must be copied anew."""
        self._sent = min(self._sent, length)

    def has_grown(self) -> None:
        self._news.set()

    async def run(self, progress: Callable[[], Progress]) -> None:
        """Copy every page that is full, one piece after the other, until that fails.

        Raises:
            SwarmError: the standby takes no more, or has gone, or the session has.
        """
        page_bytes = max(self._engine.kv_bytes(self._asked.session_id, PAGE_TOKENS), 1)
        stride = PAGE_TOKENS * max(PIECE_BYTES // page_bytes, 1)
        while True:
            now = progress()
            first, end = next_piece(self._sent, now.tokens, stride)
            if end <= first:
                self._news.clear()
                await self._news.wait()
                continue
            self._sent = end  # before anything else: what is rolled back meanwhile lowers it
            try:
                data = await self._engine.copy_kv(self._asked.session_id, first, end)
            except NoCapacity:
                self.cut(first)
                await asyncio.sleep(PAUSE)
                continue
            await self._send(first, end, now.taken, data)

    def close(self) -> None:
        self._calls.close()

    async def _send(self, first: int, end: int, taken: int, data: memoryview) -> None:
        await asyncio.sleep(self._pace.wait(len(data), asyncio.get_running_loop().time()))
        piece = Adopt(session_id=self._asked.to_session, first=first, end=end, size=len(data), taken=taken)
        await self._calls.call(piece, data, timeout=PIECE_DEADLINE)


def pacing(size: int, rate: float) -> float:
    """Seconds that `size` bytes of copies are given on a line of `rate` bytes a second, 0 if not known."""
    return size / (LINE_SHARE * rate) if rate else 0.0


def next_piece(sent: int, held: int, stride: int) -> tuple[int, int]:
    """The next full pages to copy, as positions `[first, end)`, at most `stride`; empty where there are none.

    Of a page that was rolled back into all is copied anew.
    """
    first = sent - sent % PAGE_TOKENS
    return first, max(first, min(first + stride, held - held % PAGE_TOKENS))
