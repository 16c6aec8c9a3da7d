"""A command of ours as a child process that talks in JSON lines: started, listened to, and surely ended.

The child runs in a session of its own, so that Ctrl-C in a terminal reaches its parent alone. Its
standard input is held open as a lifeline: a child started with `--exit-with-stdin` leaves by itself
when its parent is gone, however that ended. Knows no room.
"""

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, Self

from swarm.configuring import without_options
from swarm.errors import SwarmError

logger = logging.getLogger(__name__)

GRACE = 10.0
"""Seconds that a child gets to end politely before it is killed."""

READ_GRACE = 1.0
"""Seconds in which what an ended child has printed must have been read."""

MAX_LINE_BYTES = 1024 * 1024
TAIL_LINES = 20

Event = dict[str, Any]


class ProcessEnded(SwarmError):
    """A child ended, or broke its promise to speak, before it said what was waited for."""


class Child(Protocol):
    """What is used here of an `asyncio.subprocess.Process`."""

    @property
    def pid(self) -> int: ...

    @property
    def returncode(self) -> int | None: ...

    @property
    def stdout(self) -> asyncio.StreamReader | None: ...

    async def wait(self) -> int: ...

    def send_signal(self, number: int) -> None: ...


class Launcher(Protocol):
    """Who starts children in its own way."""

    async def launch(self, arguments: Sequence[str], log: IO[bytes]) -> Child:
        """A child with these arguments, in a session of its own, whose standard error goes to `log`."""


class ServerProcess:
    """`python -m MODULE ARGUMENTS --json` as a child. A context manager: leaving it ends the child.

    `events` are the JSON objects it has printed. Its standard error goes to the file `log`.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        name: str,
        log: Path,
        module: str = "swarm.server",
        environment: Mapping[str, str] | None = None,
        on_event: Callable[[Event], None] = lambda event: None,
        launcher: Launcher | None = None,
    ):
        """`environment` is added to this process's own, without what that sets of a command's options.
        A `launcher` knows module and environment by itself."""
        self.name = name
        self.log = log
        self.events: list[Event] = []
        self._arguments = [*arguments, "--json"]
        self._launcher = launcher or Interpreter(module, environment or {})
        self._on_event = on_event
        self._news = asyncio.Event()
        self._has_ended = False
        self._is_stopped = False
        self._process: Child | None = None
        self._reading: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        return self._started.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative the number of the signal that ended it."""
        return self._started.returncode

    @property
    def _started(self) -> Child:
        if self._process is None:
            raise RuntimeError(f"{self.name} was not started")
        return self._process

    async def start(self, more: Sequence[str] = ()) -> None:
        """Start the child, with `more` arguments; `stop` must follow."""
        with self.log.open("ab") as log:
            self._process = await self._launcher.launch([*self._arguments, *more], log)
        self._reading = asyncio.create_task(self._read_events(), name=f"read events of {self.name}")

    async def wait_for(self, event: str, timeout: float) -> Event:
        """The first event of that name, come or yet to come.

        Raises:
            ProcessEnded: the child ended first, or did not say it within `timeout` seconds.
        """
        try:
            async with asyncio.timeout(timeout):
                while (found := self._find(event)) is None:
                    if self._has_ended:
                        raise self.failure()
                    await self._next_news()
                return found
        except TimeoutError as error:
            raise ProcessEnded(
                f"{self.name} did not say '{event}' within {timeout:g} seconds.", self._last_words()
            ) from error

    async def wait_ended(self) -> int:
        """The exit code, once all that the child printed has been read."""
        while not self._has_ended:
            await self._next_news()
        return await self._started.wait()

    def failure(self) -> ProcessEnded:
        """Why the child ended, in its own words where it gave some."""
        said = self._find("error")
        if said is not None:
            return ProcessEnded(f"{self.name}: {said.get('message')}", str(said.get("hint", "")))
        return ProcessEnded(f"{self.name} ended with exit code {self.exit_code}.", self._last_words())

    def log_tail(self, lines: int = TAIL_LINES) -> str:
        """The last lines of its standard error."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def terminate(self) -> None:
        """Ask the child to end. Does not wait."""
        with suppress(ProcessLookupError):
            self._started.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the child and everything it started, at once."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    async def stop(self, grace: float = GRACE) -> None:
        """Ask the child to end, and kill what still runs `grace` seconds later or when cancelled.

        Safe to call again, and on a child that never started.
        """
        if self._process is None or self._reading is None or self._is_stopped:
            return
        self._is_stopped = True
        try:
            self.terminate()
            async with asyncio.timeout(grace):
                await self._process.wait()
        except TimeoutError:
            logger.warning("%s did not end within %g seconds and is killed", self.name, grace)
        finally:
            self.kill()
            asyncio.get_running_loop().call_later(READ_GRACE, self._reading.cancel)
        await asyncio.wait({self._reading})
        await self._process.wait()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def _read_events(self) -> None:
        assert self._started.stdout is not None
        try:
            while line := await self._next_line(self._started.stdout):
                self._on_line(line)
            await self._started.wait()
        finally:
            self._has_ended = True
            self._news.set()

    async def _next_line(self, stdout: asyncio.StreamReader) -> bytes:
        while True:
            try:
                return await stdout.readline()
            except ValueError:
                logger.warning("%s printed a line of more than %d bytes", self.name, MAX_LINE_BYTES)

    def _on_line(self, line: bytes) -> None:
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            logger.warning("%s printed a line that is no event: %r", self.name, line[:200])
            return
        self.events.append(event)
        self._on_event(event)
        self._news.set()

    async def _next_news(self) -> None:
        self._news.clear()
        await self._news.wait()

    def _find(self, event: str) -> Event | None:
        return next((said for said in self.events if said.get("event") == event), None)

    def _last_words(self) -> str:
        tail = self.log_tail()
        return f"Its last lines were:\n{tail}" if tail else "It said nothing more."


class Interpreter:
    """A launcher of `python -m MODULE`s, each anew. `environment` is added to this process's own."""

    def __init__(self, module: str, environment: Mapping[str, str]):
        self._command = [sys.executable, "-m", module]
        self._environment = {**without_options(os.environ), **environment}

    async def launch(self, arguments: Sequence[str], log: IO[bytes]) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *self._command,
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            env=self._environment,
            limit=MAX_LINE_BYTES,
            start_new_session=True,
        )


async def stop_all(processes: Iterable[ServerProcess], grace: float = GRACE) -> None:
    """Stop several children at the same time."""
    async with asyncio.TaskGroup() as tasks:
        for process in processes:
            tasks.create_task(process.stop(grace), name=f"stop {process.name}")
