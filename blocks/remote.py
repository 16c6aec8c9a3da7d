"""Folders of a storage far away, by URL: what fsspec knows, S3 above all, read in byte ranges.

The only file that imports fsspec. Each storage's own package, settings and credentials count as they do
for every tool built on it. Small files are copied here, weights never are. Knows nothing of what files hold.
"""

import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fsspec.core import url_to_fs

from swarm.blocks.deadlines import within
from swarm.blocks.files import is_small_file, write_atomically
from swarm.blocks.storage import missing_file, truncated
from swarm.errors import InputError, SwarmError

LIST_TIMEOUT = 30.0
READ_TIMEOUT = 60.0
"""Seconds that one range of some MiB, or a small file, may take."""

_PACKAGES = {"s3": "swarm-llm[s3]", "s3a": "swarm-llm[s3]", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs"}
_CHANGING_FACTS = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "updated", "mtime", "created")
"""What storages tell of a file that is another after each write to it."""

_FOREIGN_ERRORS = (
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("aiohttp", "ClientError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("azure.core.exceptions", "AzureError"),
)

T = TypeVar("T")


def is_url(name: str) -> bool:
    return "://" in name


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file as it was listed; see `Storage.identity`."""

    size: int
    identity: str | None


@dataclass(frozen=True, slots=True)
class OpenRemoteFile:
    """A file that is read in ranges, each within a deadline."""

    where: str
    size: int
    read_range: Callable[[int, int], bytes]

    def read_into(self, view: memoryview, start: int) -> None:
        data = _translated(
            self.where, lambda: within(READ_TIMEOUT, lambda: self.read_range(start, start + len(view)))
        )
        if len(data) != len(view):
            raise truncated(self.where)
        view[:] = data


@dataclass(frozen=True, slots=True)
class RemoteStorage:
    """The files right in the folder `url`, as they were listed when it was opened."""

    url: str
    files: Mapping[str, RemoteFile]
    threads: int = 16
    _folder: str = field(default="", repr=False)
    _filesystem: Any = field(default=None, repr=False)

    @classmethod
    def at(cls, url: str) -> "RemoteStorage":
        """List the files of the folder.

        Raises:
            InputError: there is no such folder, it may not be read, or its kind of storage is unknown here.
            SwarmError: the storage does not answer within `LIST_TIMEOUT`.
        """
        url = url.rstrip("/")

        def look() -> tuple[Any, str, list[dict[str, Any]]]:
            filesystem, folder = url_to_fs(url)
            filesystem.invalidate_cache()
            return filesystem, folder, filesystem.ls(folder, detail=True)

        filesystem, folder, listed = _translated(url, lambda: within(LIST_TIMEOUT, look))
        files = {
            str(facts["name"]).rpartition("/")[2]: RemoteFile(int(facts["size"]), _identity(url, facts))
            for facts in listed
            if facts.get("type") == "file" and facts.get("size") is not None
        }
        return cls(url, files, _folder=folder, _filesystem=filesystem)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.files)

    def where(self, name: str) -> str:
        return f"{self.url}/{name}".rstrip("/")

    def path(self, name: str) -> None:
        return None

    def identity(self, name: str) -> str | None:
        return self._listed(name).identity

    @contextmanager
    def open(self, name: str) -> Iterator[OpenRemoteFile]:
        path = f"{self._folder}/{name}"
        read = self._filesystem.cat_file
        yield OpenRemoteFile(
            self.where(name), self._listed(name).size, lambda start, end: read(path, start=start, end=end)
        )

    def _listed(self, name: str) -> RemoteFile:
        if name not in self.files:
            raise missing_file(self.where(name))
        return self.files[name]


def fetch_small_files(storage: RemoteStorage, cache: Path) -> Path:
    """A folder below `cache` that holds the small files as they are now: another one after a change.

    Raises:
        InputError: a file may not be read, or the cache cannot be written to.
        SwarmError: the storage does not answer.
    """
    small = {name: file for name, file in storage.files.items() if is_small_file(name, file.size)}
    state = repr((storage.url, sorted((name, file.identity) for name, file in small.items())))
    folder = cache / hashlib.sha256(state.encode()).hexdigest()[:32]
    for name, file in small.items():
        if file.identity is None or not (folder / name).exists():
            _fetch(storage, name, folder / name)
    return folder


def _fetch(storage: RemoteStorage, name: str, target: Path) -> None:
    with storage.open(name) as file:
        content = memoryview(bytearray(file.size))
        if file.size:
            file.read_into(content, 0)
    try:
        write_atomically(target, bytes(content))
    except OSError as error:
        raise InputError(
            f"The cache folder {target.parent} cannot be used: {error.strerror}.",
            "Set SWARM_CACHE to a folder that can be written to.",
        ) from error


def _identity(url: str, facts: Mapping[str, Any]) -> str | None:
    changing = [(fact, str(facts[fact])) for fact in _CHANGING_FACTS if facts.get(fact) is not None]
    if not changing:
        return None
    return hashlib.sha256(repr((url, facts["name"], facts["size"], changing)).encode()).hexdigest()


def _failures() -> tuple[type[Exception], ...]:
    """What storages fail with: errors of their packages too, of those that were imported to reach them."""
    foreign = (getattr(sys.modules.get(module), name, None) for module, name in _FOREIGN_ERRORS)
    return (OSError, ValueError, RuntimeError, *(error for error in foreign if error is not None))


def _translated(where: str, work: Callable[[], T]) -> T:
    """Do `work`, and say in one sentence why it failed."""
    try:
        return work()
    except ImportError as error:
        kind = where.partition("://")[0].rpartition(":")[2]
        raise InputError(
            f"{where} cannot be read without a package that is not installed ({error}).",
            f"Install it: pip install '{_PACKAGES.get(kind, 'what it names')}'",
        ) from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(
            f"There is no {where}.", "Check the names of bucket and folder, and which storage is asked."
        ) from error
    except PermissionError as error:
        raise _denied(where) from error
    except _failures() as error:
        if "Credentials" in type(error).__name__:
            raise _denied(where) from error
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise SwarmError(
            f"{where} cannot be read ({reason}).", "Check the connection and which storage is asked."
        ) from error


def _denied(where: str) -> InputError:
    return InputError(
        f"{where} may not be read with the credentials there are.",
        "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or what your storage wants; FSSPEC_S3_ANON=true for"
        " what everybody may read on S3.",
    )
