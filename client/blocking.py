"""The library for code that is not async: a swarm on a thread of its own, with its own event loop.

Works in scripts and in notebooks, where a loop already runs in the calling thread. Knows the shape of
the async `Swarm` and nothing of how it works.
"""

import asyncio
import atexit
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import suppress
from typing import Any, Self, TypeVar, Unpack

from swarm.client.facade import Chat, Message, Swarm
from swarm.client.generation import Generation, TextStream
from swarm.client.options import Options
from swarm.client.peers import PeerReport
from swarm.client.route import Route
from swarm.errors import SwarmError

T = TypeVar("T")

CLEAN_UP_TIMEOUT = 5.0
"""Seconds that Ctrl-C waits for what it cancelled to close its streams."""


class LoopThread:
    """A thread that runs an event loop until it is closed."""

    def __init__(self) -> None:
        self._loop = _new_loop()
        self._thread = threading.Thread(target=self._run_loop, name="swarm-client", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, done on the thread. Ctrl-C while waiting cancels it and is raised.

        Raises:
            SwarmError: the thread is closed.
        """
        if not self.is_alive:
            work.close()
            raise SwarmError("This client is closed.", "Connect again.")
        ended = threading.Event()
        future = asyncio.run_coroutine_threadsafe(_tracked(work, ended), self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            ended.wait(CLEAN_UP_TIMEOUT)
            raise

    def call(self, function: Callable[[], T]) -> T:
        """The result of `function`, called on the thread."""

        async def work() -> T:
            return function()

        return self.run(work())

    def start(self, work: Coroutine[Any, Any, Any], *, is_last: bool = False) -> None:
        """Have `work` done on the thread without waiting, also from the thread itself; never once closed.

        If it `is_last` the thread ends after it.
        """
        if not self.is_alive:
            work.close()
            return
        coming = self._last(work) if is_last else work
        try:
            asyncio.run_coroutine_threadsafe(coming, self._loop)
        except RuntimeError:  # the loop has just been closed, and the thread is about to end
            coming.close()
            work.close()

    def close(self) -> None:
        """End the loop and its thread. Safe to call again."""
        if self.is_alive:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    async def _last(self, work: Coroutine[Any, Any, Any]) -> None:
        try:
            await work
        finally:
            self._loop.stop()

    def _run_loop(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.get_loop().run_forever()


async def _tracked(work: Coroutine[Any, Any, T], ended: threading.Event) -> T:
    try:
        return await work
    finally:
        ended.set()


def _new_loop() -> asyncio.AbstractEventLoop:
    if sys.platform == "win32":
        return asyncio.new_event_loop()
    import uvloop

    return uvloop.new_event_loop()


class BlockingStream:
    """An answer as it is written: iterate it for pieces of text, then read `generation`.

    Leaving the iteration early gives the answer up; as a context manager it does so for certain.
    """

    def __init__(self, thread: LoopThread, stream: TextStream):
        self._thread = thread
        self._stream = stream

    @property
    def generation(self) -> Generation | None:
        return self._stream.generation

    def __iter__(self) -> Iterator[str]:
        pieces = aiter(self._stream)
        try:
            while (piece := self._thread.run(_next(pieces))) is not None:
                yield piece
        finally:
            self.close()

    def result(self) -> Generation:
        """The whole answer, once it is finished."""
        return self._thread.run(self._stream.result())

    def stop(self) -> None:
        """End the answer after the running step; may be called from any thread."""
        self._stream.stop()

    def close(self) -> None:
        self._thread.run(self._stream.aclose())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()


async def _next(pieces: AsyncIterator[str]) -> str | None:
    return await anext(pieces, None)


class BlockingChat:
    """A chat that remembers its turns; see `swarm.client.facade.Chat`."""

    def __init__(self, thread: LoopThread, chat: Chat):
        self._thread = thread
        self._chat = chat

    @property
    def messages(self) -> list[Message]:
        return self._chat.messages

    def ask(self, text: str) -> BlockingStream:
        return BlockingStream(self._thread, self._thread.call(lambda: self._chat.ask(text)))

    def reset(self) -> None:
        self._thread.run(self._chat.reset())

    def close(self) -> None:
        self._thread.run(self._chat.close())


class BlockingSwarm:
    """`Swarm` without async: the same methods, each waiting for its result. A context manager.

    It is also closed once nobody holds it any more, and when the program ends.
    """

    def __init__(self, joining: Callable[[], Coroutine[Any, Any, Swarm]]):
        """`joining` is called on the new thread and gives the swarm."""
        self._thread = LoopThread()
        try:
            self._swarm = self._thread.run(joining())
        except BaseException:
            self._thread.close()
            raise
        _open.add(self)
        weakref.finalize(self, _let_go, self._thread, self._swarm).atexit = False

    @property
    def swarm(self) -> Swarm:
        """What does the work. It belongs to the loop of `thread`."""
        return self._swarm

    @property
    def thread(self) -> LoopThread:
        return self._thread

    def generate(
        self, prompt: str | Sequence[Message], *, raw: bool = False, **options: Unpack[Options]
    ) -> Generation:
        """The whole answer to `prompt`; see `Swarm.stream`."""
        return self.stream(prompt, raw=raw, **options).result()

    def stream(
        self, prompt: str | Sequence[Message], *, raw: bool = False, **options: Unpack[Options]
    ) -> BlockingStream:
        """The answer as it is written; see `Swarm.stream`."""
        stream = self._thread.call(lambda: self._swarm.stream(prompt, raw=raw, **options))
        return BlockingStream(self._thread, stream)

    def chat(self, **options: Unpack[Options]) -> BlockingChat:
        """A chat that remembers its turns."""
        return BlockingChat(self._thread, self._thread.call(lambda: self._swarm.chat(**options)))

    def route(self, tokens: int = 1) -> Route:
        """The fastest route now; see `Swarm.route`."""
        return self._thread.call(lambda: self._swarm.route(tokens))

    def peers(self) -> list[PeerReport]:
        """Who serves what of this model."""
        return self._thread.call(self._swarm.peers)

    def close(self) -> None:
        """Leave the swarm and end the thread. Safe to call again."""
        _open.discard(self)
        if self._thread.is_alive:
            try:
                self._thread.run(self._swarm.close())
            finally:
                self._thread.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()


_open: "weakref.WeakSet[BlockingSwarm]" = weakref.WeakSet()


def _let_go(thread: LoopThread, swarm: Swarm) -> None:
    """Leave a swarm that nobody holds any more. Garbage is collected on any thread: wait for nothing."""
    thread.start(swarm.close(), is_last=True)


@atexit.register
def _close_all() -> None:
    for swarm in list(_open):
        with suppress(Exception):  # the program ends, and nobody could answer it
            swarm.close()
