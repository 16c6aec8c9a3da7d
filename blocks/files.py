"""Small files that several processes share: read whole, written atomically, guarded by a lock."""

import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from swarm.errors import InputError, SwarmError

logger = logging.getLogger(__name__)

QUIET_WAIT = 1.0
"""Seconds that waiting for another process goes unmentioned."""


SMALL_FILE_BYTES = 200 * 2**20


def is_small_file(name: str, size: int) -> bool:
    """Whether a model's file is config, tokenizer or the like: neither weights nor pictures."""
    return (
        "/" not in name and name.endswith((".json", ".jinja", ".model", ".txt")) and size <= SMALL_FILE_BYTES
    )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        InputError: the file is missing, unreadable, or holds anything but a JSON object.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.", "Check the model's folder.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON.", "Get the file again.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} does not hold a JSON object.", "Get the file again.")
    return value


def write_atomically(path: Path, data: bytes) -> None:
    """Put `data` into `path`, whose folders are made; a reader sees the old file or the new one.

    Raises:
        OSError: the folder cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@contextmanager
def exclusive(path: Path, timeout: float) -> Iterator[None]:
    """Hold the lock file `path`; a process that dies lets go of it.

    Raises:
        SwarmError: another process held it for `timeout` seconds.
        InputError: its folder cannot be written to.
    """
    lock = FileLock(path, mode=0o644)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _acquire(lock, timeout)
    except Timeout as error:
        raise SwarmError(
            f"Another process has held {path} for {timeout:.0f} s.", "End that process and try again."
        ) from error
    except OSError as error:
        raise InputError(
            f"The cache folder {path.parent} cannot be used: {error.strerror}.",
            "Set SWARM_CACHE to a folder that can be written to.",
        ) from error
    try:
        yield
    finally:
        lock.release()


def _acquire(lock: FileLock, timeout: float) -> None:
    try:
        lock.acquire(timeout=min(QUIET_WAIT, timeout))
    except Timeout:
        logger.info("waiting for another process to prepare the model")
        lock.acquire(timeout=max(0.0, timeout - QUIET_WAIT))
