"""Deadlines for work that cannot be interrupted: looking up a host, a library's own patience."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def within(seconds: float, work: Callable[[], T]) -> T:
    """What `work` returns or raises, if it does so in time; else it is left behind in a thread of its own.

    Raises:
        TimeoutError: it did not end within `seconds`.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:  # whatever it is, it belongs to who waits
            outcome.set_exception(error)

    threading.Thread(target=run, name="within-deadline", daemon=True).start()
    return outcome.result(seconds)
