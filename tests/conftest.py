"""What all tests share: one compute thread, no leftover tasks or processes, ports from the system."""

import gc
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported: many test processes share few cores

import psutil
import pytest
from hypothesis import settings

signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in a shell's background ignores it
gc.disable()  # until all is imported: what torch brings is large, and none of it is garbage
settings.register_profile("unit", max_examples=50, deadline=None, database=None)
settings.load_profile("unit")

LEAVE_TIMEOUT = 5.0
"""Seconds that processes which were told to end may still be seen for."""


def pytest_collection_finish() -> None:
    """Let the collector pass over all that was imported, each time it looks for garbage of the tests."""
    gc.freeze()
    gc.enable()


class _Complaints(logging.Handler):
    """Collects what asyncio can only log: lost exceptions, tasks destroyed while they waited."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(
            f"{record.getMessage()} {record.exc_info[1]!r}" if record.exc_info else record.getMessage()
        )


@pytest.fixture(autouse=True)
def no_unowned_task() -> Iterator[None]:
    """Fails a test whose tasks failed or vanished without anybody noticing."""
    complaints = _Complaints()
    logger = logging.getLogger("asyncio")
    logger.addHandler(complaints)
    yield
    logger.removeHandler(complaints)
    assert not complaints.lines, "asyncio complains:\n" + "\n".join(complaints.lines)


@pytest.fixture(autouse=True)
def no_audit_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Audits only what a test asks to be audited."""
    monkeypatch.setattr("swarm.client.options.PUBLIC_AUDIT_RATE", 0.0)


@pytest.fixture(scope="session", autouse=True)
def no_process_left() -> Iterator[None]:
    """Fails the run if a process that a test started outlives it."""
    yield
    _, left = psutil.wait_procs(psutil.Process().children(recursive=True), timeout=LEAVE_TIMEOUT)
    commands = [" ".join(process.cmdline()) for process in left if process.is_running()]
    assert not commands, "left behind:\n" + "\n".join(commands)


@pytest.fixture
def free_port() -> int:
    """A TCP port on which nobody listens on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """The tiny checkpoint of a family, in several files, and the model in it: made once, to be read only."""

    @cache
    def checkpoint(family: str) -> tuple[Path, Any]:
        from tests.tiny import tiny_checkpoint  # needs torch, which many tests do without

        folder = tmp_path_factory.mktemp(family)
        return folder, tiny_checkpoint(folder, family, shard_size="20KB")

    return checkpoint
