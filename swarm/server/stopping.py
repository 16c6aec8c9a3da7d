"""How a server is asked to end: a signal, or standard input closing. A second signal ends it at once.

Owns the signals of this process, and the promise that it ends in time even where a thread hangs.
"""

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, TypeVar

import psutil

logger = logging.getLogger(__name__)

T = TypeVar("T")

SIGNALS = (signal.SIGTERM, signal.SIGINT)
LEAVE_TIMEOUT = 36.0
"""Seconds after a first signal at which the process ends, whatever is still going on."""

STDIN_CHUNK = 65536


class Stopping:
    """`asked` is set by the first SIGTERM or SIGINT, or by the end of standard input if `with_stdin`.

    Used as a context manager inside a running event loop. The caller sets `has_left` once it is polite
    to end: it decides what the exit code is if the time runs out.
    """

    def __init__(self, *, with_stdin: bool = False):
        self.asked = asyncio.Event()
        self.has_left = False
        self._with_stdin = with_stdin
        self._loop = asyncio.get_running_loop()

    def __enter__(self) -> "Stopping":
        for number in SIGNALS:
            self._loop.add_signal_handler(number, self._on_signal, number)
        if self._with_stdin:
            threading.Thread(target=self._await_stdin, name="standard input", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in SIGNALS:
            self._loop.remove_signal_handler(number)
            signal.signal(number, lambda number, _: end_at_once(128 + number))

    def ask(self) -> None:
        """Ask to end. The time to do so runs from the first time on."""
        if not self.asked.is_set():
            self.asked.set()
            timer = threading.Timer(LEAVE_TIMEOUT, self._on_late)
            timer.daemon = True
            timer.start()

    def _on_signal(self, number: int) -> None:
        if self.asked.is_set():
            end_at_once(128 + number)
        self.ask()

    def _on_late(self) -> None:
        end_at_once(0 if self.has_left else 1)

    def _await_stdin(self) -> None:
        try:
            while os.read(0, STDIN_CHUNK):
                pass
        except OSError as error:
            logger.info("standard input cannot be read: %s", error)
        self._loop.call_soon_threadsafe(self.ask)


async def unless(asked: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """What `work` gives; None, with `work` cancelled, if `asked` is set before."""
    working, waiting = asyncio.create_task(work), asyncio.create_task(asked.wait())
    try:
        await asyncio.wait((working, waiting), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, waiting):
            task.cancel()
        await asyncio.gather(working, waiting, return_exceptions=True)


def end_at_once(exit_code: int) -> None:
    """End this process and the daemon it started, without waiting for anything."""
    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    os._exit(exit_code)
