"""An event loop for tests that go through the moments of a run: it counts callbacks, and acts at one.

Its clock is virtual. What is meant for other threads is done at once, so that every run is the same.
"""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from contextvars import Context
from typing import Any, TypeVar, TypeVarTuple, Unpack

from swarm.net.virtual_time import VirtualTimeLoop

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class SteppingLoop(VirtualTimeLoop):
    """`scheduled` counts the callbacks so far; `act` is called in the place of number `moment`."""

    def __init__(self) -> None:
        self.scheduled = 0
        self.moment: int | None = None
        self.act: Callable[[], object] = lambda: None
        super().__init__()

    def call_soon(
        self, callback: Callable[[Unpack[Ts]], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        self.scheduled += 1
        if self.scheduled == self.moment:
            super().call_soon(self.act)
        return super().call_soon(callback, *args, context=context)

    def act_at(self, moment: int, act: Callable[[], object]) -> None:
        """Call `act` once `moment` more callbacks have been scheduled."""
        self.moment, self.act = self.scheduled + moment, act

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[Unpack[Ts]], T], *args: *Ts
    ) -> "asyncio.Future[T]":
        done: asyncio.Future[T] = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:  # whatever it is, it belongs to who waits for the work
            done.set_exception(error)
        return done


def run_stepping(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` on a stepping loop."""
    with asyncio.Runner(loop_factory=SteppingLoop) as runner:
        return runner.run(main)
