"""Children that start in a moment: forked from a process that has imported what they need.

`python -m swarm.fork_server` is that process; here it is started, and asked for forks. Knows no room.
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import IO, Self

from swarm.configuring import without_options
from swarm.processes import MAX_LINE_BYTES, ProcessEnded

IS_SUPPORTED = sys.platform == "linux"
"""Elsewhere processes cannot fork, or the system's libraries fail in forks."""

LAUNCHING = 120.0
"""Seconds within which a fork must have begun, the imports of the fork server included."""

MAX_LAST_WORDS = 2000
"""Bytes of what a failed fork server said last that are told."""

MAX_NUMBER_BYTES = 32
GONE = -signal.SIGKILL
"""The exit code of a fork whose fork server has gone before it."""


class ForkServer:
    """A process that imports `modules` and is forked into `python -m COMMAND`s. A context manager.

    Forks have the environment that it was started with. On leaving they go on, but nobody knows any more how
    they end. May be used from any event loop.
    """

    def __init__(self, command: str, *modules: str, environment: Mapping[str, str] | None = None):
        """`environment` is added to this process's own, without what that sets of a command's options."""
        self._command = [command, *modules]
        self._environment = {**without_options(os.environ), **(environment or {})}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Does not wait until all is imported: who orders a fork does."""
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._stack.enter_context(self._orders)
        self._log = self._stack.enter_context(tempfile.TemporaryFile())
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "swarm.fork_server", str(theirs.fileno()), *self._command],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                env=self._environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._orders.settimeout(LAUNCHING)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._stack.close()

    async def launch(self, arguments: Sequence[str], log: IO[bytes]) -> "Fork":
        """A fork that runs the command with `arguments`; what goes to its standard error goes to `log`.

        Raises:
            ProcessEnded: the fork server has ended, or did not fork within `LAUNCHING` seconds.
        """
        with ExitStack() as unless_it_runs:
            try:
                lifeline, output, told = self._order(arguments, log)
                unless_it_runs.enter_context(lifeline)
                unless_it_runs.enter_context(told)
                fork = Fork(lifeline, await _reader(output), told)
                async with asyncio.timeout(LAUNCHING):
                    await fork.begin()
            except (OSError, EOFError) as error:
                raise self._failure() from error
            unless_it_runs.pop_all()
        return fork

    def _order(self, arguments: Sequence[str], log: IO[bytes]) -> tuple[IO[bytes], IO[bytes], socket.socket]:
        """Our ends of a new fork's standard input and output, and where its fork server tells of it."""
        stdin, lifeline = _pipe()
        output, stdout = _pipe()
        told, teller = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        told.setblocking(False)
        with stdin, stdout, teller:
            files = [file.fileno() for file in (stdin, stdout, log, teller)]
            try:
                socket.send_fds(self._orders, [json.dumps(list(arguments)).encode()], files)
            except OSError:
                for file in (lifeline, output, told):
                    file.close()
                raise
        return lifeline, output, told

    def _failure(self) -> ProcessEnded:
        self._log.seek(0)
        last_words = self._log.read()[-MAX_LAST_WORDS:].decode(errors="replace")
        return ProcessEnded("The fork server did not fork.", f"Its last lines were:\n{last_words}")


class Fork:
    """A forked child. Has what is used here of `asyncio.subprocess.Process`."""

    def __init__(self, lifeline: IO[bytes], stdout: asyncio.StreamReader, told: socket.socket):
        """`lifeline` is its standard input; from `told` comes which process it is, and then how it ended."""
        self.stdout = stdout
        self.returncode: int | None = None
        self._lifeline = lifeline
        self._told = told

    async def begin(self) -> None:
        """Return when it runs.

        Raises:
            EOFError: it was not forked.
            OSError: nor will it be.
        """
        pid = await self._next_told()
        if pid is None:
            raise EOFError
        self.pid = pid
        self._ending = asyncio.create_task(self._await_end(), name=f"await the end of {pid}")

    async def wait(self) -> int:
        await asyncio.wait({self._ending})
        return self._ending.result()

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    async def _await_end(self) -> int:
        with self._lifeline, self._told:
            code = await self._next_told()
            self.returncode = GONE if code is None else code
        return self.returncode

    async def _next_told(self) -> int | None:
        number = await asyncio.get_running_loop().sock_recv(self._told, MAX_NUMBER_BYTES)
        return int(number) if number else None


def _pipe() -> tuple[IO[bytes], IO[bytes]]:
    reading, writing = os.pipe()
    return os.fdopen(reading, "rb", buffering=0), os.fdopen(writing, "wb", buffering=0)


async def _reader(pipe: IO[bytes]) -> asyncio.StreamReader:
    """Reads `pipe`, which it closes at its end."""
    reader = asyncio.StreamReader(limit=MAX_LINE_BYTES)
    await asyncio.get_running_loop().connect_read_pipe(lambda: _ReadPipe(reader), pipe)
    return reader


class _ReadPipe(asyncio.StreamReaderProtocol):
    def eof_received(self) -> bool:
        super().eof_received()
        return False  # a pipe has no other direction to be left open for
