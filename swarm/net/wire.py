"""Wires and pipes of the in-process network: when a frame arrives, waits, or is lost.

A wire is one direction between two peers, shared by their streams; a pipe is one direction of one
stream. Time is the event loop's. Knows neither peers nor transports.

The model. A frame waits its turn on its wire, takes size / bandwidth to pass it and `latency` to arrive.
Each copy of it is lost with probability `loss` and sent again after two latencies, at least
`RESEND_DELAY`; a frame that is lost `MAX_COPIES` times breaks its stream. A cut wire loses everything
without a sign: its pipes stall, and break after `STALL_TIMEOUT` unless it is mended before.
"""

import asyncio
import random
from collections import deque
from dataclasses import dataclass, replace
from math import inf

from swarm.net.framing import LENGTHS, check_lengths
from swarm.net.transport import StreamClosed

RESEND_DELAY = 0.2
MAX_COPIES = 6
STALL_TIMEOUT = 30.0
WINDOW_BYTES = 1024 * 1024
"""Bytes in flight or waiting to be read on one pipe above which its sender must wait."""


@dataclass(frozen=True)
class Link:
    """What a wire is like: seconds one way, bytes a second, probability of losing one copy of a frame."""

    latency: float = 0.0
    bandwidth: float = inf
    loss: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.latency < inf and self.bandwidth > 0 and 0 <= self.loss <= 1):
            raise ValueError(f"not a possible link: {self}")


class Wire:
    """One direction between two peers: when it is free again, its pipes, and its own seeded luck."""

    def __init__(self, link: Link, seed: str):
        self.link = link
        self.is_cut = False
        self.pipes: dict[Pipe, None] = {}  # in the order they were made, so that runs repeat
        self._free_at = 0.0
        self._random = random.Random(seed)

    def arrival(self, size: int, now: float) -> float | None:
        """When a frame of `size` bytes sent at `now` arrives: infinity while cut, None for never."""
        if self.is_cut:
            return inf
        copies = self._copies_needed()
        if copies is None:
            return None
        self._free_at = max(now, self._free_at) + size / self.link.bandwidth
        resend_delay = max(RESEND_DELAY, 2 * self.link.latency)
        return self._free_at + self.link.latency + (copies - 1) * resend_delay

    def news_at(self, now: float) -> float:
        """When the other end learns of something that happens here at `now`."""
        return inf if self.is_cut else now + self.link.latency

    def cut(self) -> None:
        self.is_cut = True
        for pipe in self.pipes:
            pipe.stall()

    def mend(self) -> None:
        self.is_cut = False
        for pipe in self.pipes:
            pipe.resume()

    def _copies_needed(self) -> int | None:
        if not self.link.loss:
            return 1
        lost = (self._random.random() < self.link.loss for _ in range(MAX_COPIES))
        return next((copy for copy, is_lost in enumerate(lost, start=1) if not is_lost), None)


@dataclass(frozen=True)
class _Frame:
    header: bytes
    body: bytes
    arrives_at: float

    @property
    def size(self) -> int:
        return LENGTHS.size + len(self.header) + len(self.body)


class Pipe:
    """One direction of one stream: an ordered, bounded queue of frames that have a time of arrival.

    The times below are infinite while the news of them is held up by a cut wire, None if nothing
    happened: `_ended_at`, when the receiver learns that the sender ended; `_left_at`, when the sender
    learns that the receiver left.
    """

    def __init__(self, wire: Wire):
        self._wire = wire
        self._frames: deque[_Frame] = deque()
        self._buffered = 0
        self._newest = 0.0
        self._ended_at: float | None = None
        self._left_at: float | None = None
        self._is_broken = False
        self._stall: asyncio.TimerHandle | None = None
        self._waiters: dict[asyncio.Future[None], None] = {}
        wire.pipes[self] = None

    async def put(self, header: bytes, body: bytes) -> None:
        """
        Raises:
            StreamClosed: this end has ended, the receiver is known to have left, or the stream broke.
        """
        self._check_open()
        while self._buffered >= WINDOW_BYTES or self._left_at is not None:
            await self._wait(self._left_at)
            self._check_open()
        frame_bytes = LENGTHS.size + len(header) + len(body)
        arrives_at = self._wire.arrival(frame_bytes, _now())
        if arrives_at is None:
            self._break()
            raise StreamClosed("The connection to the peer broke.")
        self._newest = max(self._newest, arrives_at)
        self._frames.append(_Frame(header, body, self._newest))
        self._buffered += frame_bytes
        self._wake()

    async def get(self, max_body: int) -> tuple[bytes, memoryview]:
        """
        Raises:
            StreamClosed: the sender ended and all it sent was read, this end left, or the stream broke.
            FrameError: the frame is larger than allowed.
        """
        while not (self._frames and self._frames[0].arrives_at <= _now()):
            next_at = self._frames[0].arrives_at if self._frames else self._ended_at
            is_over = not self._frames and self._ended_at is not None and self._ended_at <= _now()
            if is_over or self._is_broken or self._left_at is not None:
                raise StreamClosed("The peer ended the stream.")
            await self._wait(next_at)
        frame = self._frames.popleft()
        self._buffered -= frame.size
        self._wake()
        check_lengths(len(frame.header), len(frame.body), max_body)
        return frame.header, memoryview(frame.body)

    def end(self, news_at: float) -> None:
        """The sender ends; what it sent still arrives."""
        if self._ended_at is None:
            self._ended_at = max(news_at, self._newest)
            self._settle()

    def leave(self, news_at: float) -> None:
        """The receiver leaves; what it has not read is gone."""
        if self._left_at is None:
            self._left_at = news_at
            self._frames.clear()
            self._buffered = 0
            self._settle()

    def stall(self) -> None:
        self._reschedule(_now(), inf)
        if self._stall is None:
            self._stall = asyncio.get_running_loop().call_later(STALL_TIMEOUT, self._break)

    def resume(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None
            self._reschedule(inf, self._wire.news_at(_now()))

    def _reschedule(self, after: float, to: float) -> None:
        """Let all that was to happen after, or at infinite, `after` happen at `to`."""

        def moved(at: float) -> float:
            return to if at > after or at == after == inf else at

        self._frames = deque(replace(frame, arrives_at=moved(frame.arrives_at)) for frame in self._frames)
        self._newest = moved(self._newest)
        self._ended_at = None if self._ended_at is None else moved(self._ended_at)
        self._left_at = None if self._left_at is None else moved(self._left_at)
        self._wake()

    def _check_open(self) -> None:
        is_known_gone = self._left_at is not None and self._left_at <= _now()
        if self._is_broken or self._ended_at is not None or is_known_gone:
            raise StreamClosed("The stream has ended.")

    def _break(self) -> None:
        self._is_broken = True
        self._settle()

    def _settle(self) -> None:
        """After an end: free the wire of a pipe that nobody uses any more, and tell who waits."""
        if self._ended_at is not None and self._left_at is not None:
            self._wire.pipes.pop(self, None)
            if self._stall is not None:
                self._stall.cancel()
        self._wake()

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def _wait(self, until: float | None) -> None:
        """Wait for any change, or until the loop's time `until`."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        self._waiters[waiter] = None
        timer = None if until is None or until == inf else loop.call_at(until, self._wake)
        try:
            await waiter
        finally:
            del self._waiters[waiter]
            if timer is not None:
                timer.cancel()


def _now() -> float:
    return asyncio.get_running_loop().time()
