"""An event loop whose clock jumps: when nothing is left to do, it is at once the time of the next timer.

With it, tests and simulations of hours run in milliseconds, and give the same result each time. Work
outside the loop (jobs in executors) takes no virtual time: the clock stands still until it is done.
Real sockets have no place here; the in-process network has.
"""

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from functools import wraps
from math import ulp
from typing import Any, ParamSpec, TypeVar, TypeVarTuple, Unpack

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
P = ParamSpec("P")

EPOCH = 1_800_000_000.0
"""The Unix time, in seconds, at which a virtual clock starts."""


class Deadlock(RuntimeError):
    """Every task waits for something that cannot happen: no timer is set and no job is running."""


class _JumpingSelector(selectors.DefaultSelector):
    """Moves the clock forward where a real selector would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.jobs = 0
        self.on_deadlock: Callable[[], BaseException] = lambda: Deadlock()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready or (timeout is not None and timeout <= 0):
            return ready
        if self.jobs:
            return super().select(None)  # a finished job wakes the loop through its self-pipe
        if timeout is None:
            raise self.on_deadlock()
        self.now += timeout
        return []


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An asyncio event loop on a virtual clock that starts at zero.

    Raises:
        Deadlock: out of `run_until_complete`, when nothing can ever happen again.
    """

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        self._jumping.on_deadlock = self._deadlock
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now

    @property
    def _clock_resolution(self) -> float:
        """Timers are due when the clock has come to them and no moment before: it might stand still there."""
        return ulp(self.time())

    @_clock_resolution.setter
    def _clock_resolution(self, _: float) -> None: ...

    def now(self) -> float:
        """Virtual Unix time in seconds, for what expires by the calendar."""
        return EPOCH + self._jumping.now

    @contextmanager
    def outside_work(self) -> Iterator[None]:
        """Hold the clock while a thread that this loop did not start is at work for a task."""
        self._jumping.jobs += 1
        try:
            yield
        finally:
            self._jumping.jobs -= 1

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[Unpack[Ts]], T], *args: *Ts
    ) -> "asyncio.Future[T]":
        job = super().run_in_executor(executor, func, *args)
        self._jumping.jobs += 1
        job.add_done_callback(self._on_job_done)
        return job

    async def shutdown_default_executor(self, *args: Any, **kwargs: Any) -> None:
        with self.outside_work():
            await super().shutdown_default_executor(*args, **kwargs)

    def _on_job_done(self, _: "asyncio.Future[Any]") -> None:
        self._jumping.jobs -= 1

    def _deadlock(self) -> Deadlock:
        waiting = ", ".join(sorted(f"{task.get_name()} ({_place(task)})" for task in asyncio.all_tasks(self)))
        return Deadlock(f"Nothing can ever happen again, and these tasks wait: {waiting or 'none'}.")


def run(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` on a virtual clock."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)


def in_virtual_time(test: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, T]:
    """Make a plain function of an async one, such as a test, that runs it on a virtual clock of its own."""

    @wraps(test)
    def run_test(*args: P.args, **kwargs: P.kwargs) -> T:
        return run(test(*args, **kwargs))

    return run_test


def _place(task: "asyncio.Task[Any]") -> str:
    frames = task.get_stack()
    if not frames:
        return "not started"
    code = frames[-1].f_code
    return f"{code.co_qualname}:{frames[-1].f_lineno}"
