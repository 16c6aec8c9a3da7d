"""The libp2p daemon: the Go process that hivemind's wheel ships, started, watched and stopped here.

It runs in a session of its own, so that Ctrl-C in a terminal reaches this process alone, and it ends by
itself when this process is gone. Does not know what is sent through it, and does not import hivemind.
"""

import asyncio
import importlib.util
import json
import logging
import os
import re
import shutil
import socket
import tempfile
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from swarm.errors import InputError
from swarm.net.identity import Identity
from swarm.net.transport import TransportError

logger = logging.getLogger(__name__)

START_TIMEOUT = 15.0
STOP_TIMEOUT = 3.0
MOST_SOCKET_PATH = 103
"""Bytes of the path of a Unix socket at most, on Linux and macOS."""

_READY = "Peer ID:"
_CONFIG = {"Relay": {"Enabled": False}}
"""What differs from the daemon's own defaults before its options are applied: it would relay for everybody,
even with `-relay=0`, and keep a table of the internet's networks for that (30 MB)."""
_ENVIRONMENT = {"GOLOG_LOG_LEVEL": "error", "GOMAXPROCS": "1"}
"""For frames that come one by one, waking threads on other cores costs a daemon a third more than it takes on
one. The environment may say otherwise."""
_BROKEN_INSTALLATION = "Install it again: pip install --force-reinstall hivemind"


class Daemon:
    """A running daemon, and the folder with its control socket."""

    def __init__(self, process: asyncio.subprocess.Process, folder: Path):
        self._process = process
        self._folder = folder
        self._last_lines: deque[str] = deque(maxlen=5)
        self._is_ready = asyncio.Event()
        self._reading = asyncio.create_task(self._read_output(), name="libp2p daemon's output")

    @classmethod
    async def start(cls, identity: Identity, options: Sequence[str]) -> "Daemon":
        """Start a daemon with this identity and wait until it answers.

        Raises:
            InputError: the folder for temporary files has too long a path for a socket.
            TransportError: it cannot be started, ended at once, or was not ready within `START_TIMEOUT`.
        """
        folder = _new_folder()
        key, config = folder / "identity", folder / "config.json"
        try:
            identity.save(key)
            config.write_text(json.dumps(_CONFIG))
            daemon = cls(await _spawn(folder, [f"-f={config}", f"-id={key}", *options]), folder)
            try:
                await daemon._until_ready()
            except BaseException:
                await daemon.stop()
                raise
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        key.unlink()
        config.unlink()
        return daemon

    @property
    def control_address(self) -> str:
        return f"/unix{_control_socket(self._folder)}"

    @property
    def last_line(self) -> str:
        """What the daemon said last; empty if nothing."""
        return self._last_lines[-1] if self._last_lines else ""

    async def wait(self) -> int:
        """Wait for the daemon's end and return its exit code, negative for a signal."""
        return await self._process.wait()

    async def stop(self) -> None:
        """End the daemon, within `STOP_TIMEOUT` whether it likes it or not. Safe to call again."""
        try:
            with suppress(ProcessLookupError):
                self._process.terminate()
            try:
                async with asyncio.timeout(STOP_TIMEOUT):
                    await self._process.wait()
            except TimeoutError:
                with suppress(ProcessLookupError):
                    self._process.kill()
                await self._process.wait()
            await self._reading
        finally:
            self._reading.cancel()
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _until_ready(self) -> None:
        ready = asyncio.create_task(self._is_ready.wait(), name="libp2p daemon's start")
        try:
            await asyncio.wait(
                {ready, self._reading}, timeout=START_TIMEOUT, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            ready.cancel()
        if not self._is_ready.is_set():
            reason = self.last_line or f"it was not ready after {START_TIMEOUT:g} seconds"
            raise TransportError(f"The libp2p daemon did not start: {reason}.")

    async def _read_output(self) -> None:
        assert self._process.stdout is not None
        while True:
            try:
                line = await self._process.stdout.readline()
            except ValueError:  # a line longer than the reader's limit, which it has dropped
                continue
            if not line:
                return
            text = line.decode(errors="replace").strip()
            logger.debug("libp2p daemon: %s", text)
            self._last_lines.append(text)
            if text.startswith(_READY):
                self._is_ready.set()


def _new_folder() -> Path:
    """A folder of which nobody else may use the socket: that controls the daemon.

    Raises:
        InputError: a socket in it would have too long a path.
    """
    folder = Path(tempfile.mkdtemp(prefix="swarm-"))  # mode 0700
    if len(os.fsencode(_control_socket(folder))) > MOST_SOCKET_PATH:
        folder.rmdir()
        raise InputError(
            f"The folder for temporary files, {folder.parent}, has too long a path for a socket in it.",
            "Set TMPDIR to a shorter one, for example TMPDIR=/tmp.",
        )
    return folder


def _control_socket(folder: Path) -> Path:
    return folder / "control.sock"


async def _spawn(folder: Path, options: Sequence[str]) -> asyncio.subprocess.Process:
    program = _program()
    try:
        return await asyncio.create_subprocess_exec(
            program,
            f"-listen=/unix{_control_socket(folder)}",
            "-idleTimeout=30s",
            *options,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            env={**_ENVIRONMENT, **os.environ},
        )
    except OSError as error:
        raise TransportError(
            f"The libp2p daemon {program} cannot be run: {error.strerror}.", _BROKEN_INSTALLATION
        ) from error


def _program() -> Path:
    hivemind = importlib.util.find_spec("hivemind")  # finds a top-level package without importing it
    places = (hivemind and hivemind.submodule_search_locations) or ()
    for place in places:
        program = Path(place) / "hivemind_cli" / "p2pd"
        if program.is_file():
            return program
    raise TransportError("The libp2p daemon p2pd is missing from the hivemind package.", _BROKEN_INSTALLATION)


def check_can_listen(address: str) -> None:
    """Try to bind `address` as nobody else may hold it; the daemon itself would share a port in silence.

    Raises:
        InputError: the port is in use or not allowed, or the address is not of this machine.
    """
    found = re.match(r"/(ip4|ip6)/([^/]+)/(tcp|udp)/(\d+)", address)
    if found is None:
        return
    version, host, protocol, port = found.groups()
    family = socket.AF_INET if version == "ip4" else socket.AF_INET6
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    with socket.socket(family, kind) as probe:
        if family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if kind == socket.SOCK_STREAM:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except OSError as error:
            raise _cannot_listen(error, host, port) from error


def _cannot_listen(error: OSError, host: str, port: str) -> InputError:
    reason = (error.strerror or str(error)).lower()
    return InputError(
        f"Cannot listen on {host} port {port}: {reason}.",
        "Choose another port, or 0 for a free one, and an address of this machine.",
    )
