"""The one thread that an engine computes in: work goes in from the event loop, its outcome comes back there.

Leaner than an executor and its futures, which take a tenth of a millisecond each way where nothing of them is
in a cache any more, and it is not where weights have passed through.
"""

import asyncio
import atexit
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeAlias, TypeVar

Given = TypeVar("Given")
Then: TypeAlias = Callable[[Any, BaseException | None], None]
"""Called with what the work gave, or with why it failed."""

EXIT_PATIENCE = 10.0
"""Seconds for which the interpreter waits at its end for what is being computed."""

_Work: TypeAlias = tuple[Callable[[], Any], Then, asyncio.AbstractEventLoop]


class _Count:
    """How much was done."""

    number = 0


class ComputeThread:
    """Does what it is given, one thing after the other. All methods are called from one event loop."""

    def __init__(self) -> None:
        self._waiting: SimpleQueue[_Work | None] = SimpleQueue()
        self._started, self._done = 0, _Count()
        self._thread = Thread(target=_work, args=(self._waiting, self._done), name="compute", daemon=True)
        self._thread.start()
        self._end = weakref.finalize(self, self._waiting.put, None)
        _threads.add(self)

    @property
    def is_busy(self) -> bool:
        """Whether it does something, or is about to."""
        return self._started != self._done.number

    def start(self, work: Callable[[], Any], then: Then) -> None:
        """Have `work` done, and call `then` on the event loop, whose clock stands still where it can.

        Raises:
            RuntimeError: the thread is closed, and would never come to it.
        """
        if not self._end.alive:
            raise RuntimeError("nothing is computed in a closed thread")
        loop = asyncio.get_running_loop()
        self._started += 1
        outside_work = getattr(loop, "outside_work", None)  # of a virtual clock
        self._waiting.put((work, then if outside_work is None else _after(outside_work(), then), loop))

    def run(self, work: Callable[[], Given]) -> "asyncio.Future[Given]":
        """Have `work` done, whoever waits for it; a future of what it gives."""
        given: asyncio.Future[Given] = asyncio.get_running_loop().create_future()

        def settle(outcome: Given, error: BaseException | None) -> None:
            if given.done():
                return
            if error is not None:
                given.set_exception(error)
            else:
                given.set_result(outcome)

        self.start(work, settle)
        return given

    def close(self) -> None:
        """End the thread once what it does is done, and fail what waits for its turn. Safe to call again."""
        if not self._end.alive:
            return
        with suppress(Empty):
            while (one := self._waiting.get_nowait()) is not None:
                _, then, loop = one
                self._started -= 1
                loop.call_soon(then, None, asyncio.CancelledError())
        self._end()

    async def wait_closed(self) -> None:
        """Return once a closed thread has ended."""
        await asyncio.to_thread(self._thread.join)


_threads: "weakref.WeakSet[ComputeThread]" = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """Native code that still computes when the interpreter is gone would bring the process down."""
    for one in list(_threads):
        one._end()
        one._thread.join(EXIT_PATIENCE)


def _after(outside_work: AbstractContextManager[None], then: Then) -> Then:
    """`then`, until which `outside_work` lasts from now on."""
    outside_work.__enter__()

    def ended(outcome: Any, error: BaseException | None) -> None:
        outside_work.__exit__(None, None, None)
        then(outcome, error)

    return ended


def _work(waiting: "SimpleQueue[_Work | None]", done: "_Count") -> None:
    while (one := waiting.get()) is not None:
        work, then, loop = one
        outcome, error = None, None
        try:
            outcome = work()
        except BaseException as failure:  # whatever failed is for whoever asked
            error = failure
        done.number += 1
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(then, outcome, error)
        del one, work, then, loop, outcome, error  # and does not hold, until there is more to do, what is big
