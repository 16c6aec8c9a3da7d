"""Where the weights files of a checkpoint lie, as what reads them sees it: by name, in byte ranges.

Knows nothing of what the files hold.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from swarm.errors import InputError

HASH_CHUNK_BYTES = 8 * 2**20


class OpenFile(Protocol):
    """A file that is being read, by several threads at once. `size` in bytes."""

    @property
    def size(self) -> int: ...

    def read_into(self, view: memoryview, start: int) -> None:
        """Fill `view`, some MiB at most, with the bytes from `start` on.

        Raises:
            InputError: the file is shorter, or cannot be read.
            SwarmError: what gives the file does not answer.
        """
        ...


class Storage(Protocol):
    """`threads`: so many reads at once make good use of it."""

    @property
    def threads(self) -> int: ...

    @property
    def names(self) -> tuple[str, ...]:
        """All files, those included that still have to be fetched."""
        ...

    def where(self, name: str) -> str:
        """The file as people know it."""
        ...

    def path(self, name: str) -> Path | None:
        """The file on this machine, None where it can only be read in ranges."""
        ...

    def identity(self, name: str) -> str | None:
        """A name for this very content of this very file: another one after any write to it.

        It tells what was seen before on this machine from what is new, and nothing else; None where
        nothing tells. Raises InputError.
        """
        ...

    def open(self, name: str) -> AbstractContextManager[OpenFile]:
        """Raises InputError, SwarmError."""
        ...


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file of this machine, by its descriptor."""

    path: Path
    descriptor: int
    size: int

    def read_into(self, view: memoryview, start: int) -> None:
        done = 0
        while done < len(view):
            try:
                got = os.preadv(self.descriptor, [view[done:]], start + done)
            except OSError as error:
                raise unreadable(self.path, error) from error
            if not got:
                raise truncated(str(self.path))
            done += got


@dataclass(frozen=True, slots=True)
class LocalStorage:
    """The files of a folder. `expected` names those that will come to be there; None for those that are."""

    folder: Path
    expected: tuple[str, ...] | None = None
    threads: int = 4

    @property
    def names(self) -> tuple[str, ...]:
        if self.expected is not None:
            return self.expected
        try:
            return tuple(os.listdir(self.folder))
        except OSError as error:
            raise unreadable(self.folder, error) from error

    def where(self, name: str) -> str:
        return str(self.folder / name)

    def path(self, name: str) -> Path:
        return self.folder / name

    def identity(self, name: str) -> str:
        path = self.folder / name
        try:
            stat = path.stat()
        except OSError as error:
            raise unreadable(path, error) from error
        facts = (os.path.realpath(path), stat.st_size, stat.st_mtime_ns, stat.st_ino)
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    @contextmanager
    def open(self, name: str) -> Iterator[LocalFile]:
        path = self.folder / name
        try:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except FileNotFoundError as error:
            raise missing_file(str(path)) from error
        except OSError as error:
            raise unreadable(path, error) from error
        try:
            yield LocalFile(path, descriptor, os.fstat(descriptor).st_size)
        finally:
            os.close(descriptor)


def sha256_of(storage: Storage, name: str) -> str:
    """The SHA-256 of a whole file in hex; `HASH_CHUNK_BYTES` of it are held at a time.

    Raises:
        InputError, SwarmError: as reading does.
    """
    state = hashlib.sha256()
    with storage.open(name) as file:
        chunk = memoryview(bytearray(min(HASH_CHUNK_BYTES, file.size)))
        for start in range(0, file.size, HASH_CHUNK_BYTES):
            part = chunk[: file.size - start]
            file.read_into(part, start)
            state.update(part)
    return state.hexdigest()


def missing_file(where: str) -> InputError:
    return InputError(
        f"The weights file {where} is missing.", "Get the missing file, or the whole checkpoint, again."
    )


def truncated(where: str) -> InputError:
    return InputError(f"The weights file {where} is truncated.", "Get the file again.")


def unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path} cannot be read: {error.strerror}.", "Check the file and the disk.")
