"""The model hub: which files a repository has, their hashes, and fetching some of them.

The only file that imports huggingface_hub. HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and the hub's own
cache folder count as they do for every tool built on it. A repository is pinned to the commit it
had when this machine first asked for it: the answer is kept, so that later starts need no network
and all processes of the machine agree. `owner/name@revision` names another commit, branch or tag.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import quote

from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import tqdm

from swarm.blocks.checkpoint import weights_files
from swarm.blocks.deadlines import within
from swarm.blocks.files import exclusive, is_small_file, read_json, write_atomically
from swarm.errors import InputError, SwarmError

DEFAULT_REVISION = "main"
ASK_TIMEOUT = 10.0
LOCK_TIMEOUT = 60.0

_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")

_NO_ANSWER = cast(
    tuple[type[Exception], ...],
    (
        OSError,
        *HfHubHTTPError.__bases__,  # The error of httpx or httpx2: huggingface_hub builds on either.
        RuntimeError,  # hf_xet, where it is installed, says so that a download failed.
        ValueError,  # The answer is not JSON.
    ),
)

T = TypeVar("T")


class HubUnreachable(SwarmError):
    """The hub did not answer, or not with what was asked for."""


@dataclass(frozen=True, slots=True)
class HubFile:
    """`size` in bytes. `sha256` in hex for large files, None for those the hub keeps in git."""

    size: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The files of a repository at one commit, by name."""

    repository: str
    commit: str
    files: Mapping[str, HubFile]

    @property
    def small_files(self) -> list[str]:
        """Config, tokenizer and the like: everything at the top that is neither weights nor pictures."""
        return [name for name, file in self.files.items() if is_small_file(name, file.size)]


def find(repository: str, revision: str, cache: Path, timeout: float = ASK_TIMEOUT) -> Snapshot:
    """The snapshot that this machine uses: pinned before, in the hub's cache, or asked for now.

    `timeout` bounds the asking, in seconds.

    Raises:
        InputError: the hub has no such repository or revision, or wants a token for it.
        HubUnreachable: the hub has to be asked and does not answer.
    """
    pin = cache / "hub" / f"{repository.replace('/', '--')}@{quote(revision, safe='')}.json"
    with exclusive(pin.with_suffix(".lock"), LOCK_TIMEOUT):
        snapshot = _recall(pin) or _cached(repository, revision)
        if snapshot is None:
            snapshot = _translated(
                lambda: within(timeout, lambda: _ask(repository, revision, timeout)), repository
            )
        write_atomically(pin, json.dumps(asdict(snapshot), indent=1).encode())
        return snapshot


def fetch(snapshot: Snapshot, name: str, on_bytes: Callable[[int], None] = lambda count: None) -> Path:
    """The path of one file of `snapshot`, downloaded unless it is there; `on_bytes` gets each arrival.

    Raises:
        InputError: the hub has no such file any more, or wants a token for it.
        HubUnreachable: it has to be downloaded and the hub does not answer.
    """

    def download() -> str:
        return hf_hub_download(
            snapshot.repository,
            name,
            revision=snapshot.commit,
            endpoint=_endpoint(),
            etag_timeout=ASK_TIMEOUT,
            tqdm_class=_counter(on_bytes),
        )

    return Path(_translated(download, snapshot.repository))


def _recall(pin: Path) -> Snapshot | None:
    try:
        known = read_json(pin)
        files = {name: HubFile(**file) for name, file in known["files"].items()}
        return Snapshot(known["repository"], known["commit"], files)
    except (InputError, KeyError, TypeError, AttributeError):
        return None


def _cached(repository: str, revision: str) -> Snapshot | None:
    """What other tools have left in the hub's cache, if nothing that a model needs is lacking."""
    config = _cached_path(repository, revision, "config.json")
    if config is None:
        return None
    folder = config.parent
    if not _COMMIT.fullmatch(folder.name) or not _is_whole(folder):
        return None
    files = {
        path.name: HubFile(path.stat().st_size, _blob_digest(path))
        for path in folder.iterdir()
        if path.is_file()
    }
    return Snapshot(repository, folder.name, files)


def _is_whole(folder: Path) -> bool:
    try:
        return all((folder / name).exists() for name in weights_files(folder, os.listdir(folder)))
    except InputError:
        return False


def _cached_path(repository: str, revision: str, name: str) -> Path | None:
    try:
        found = try_to_load_from_cache(repository, name, revision=revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _blob_digest(path: Path) -> str | None:
    """A large file in the hub's cache is a link to a blob that is called by its SHA-256."""
    blob = os.path.basename(os.readlink(path)) if path.is_symlink() else ""
    return blob if _SHA256.fullmatch(blob) else None


def _ask(repository: str, revision: str, timeout: float) -> Snapshot:
    api = HfApi(endpoint=_endpoint())
    try:
        found = api.model_info(repository, revision=revision, timeout=timeout, files_metadata=True)
    except (KeyError, TypeError) as error:
        raise OSError("its answer lists no files") from error
    siblings = found.siblings or []
    files = {s.rfilename: HubFile(s.size or 0, s.lfs.sha256 if s.lfs else None) for s in siblings}
    if not found.sha or not _COMMIT.fullmatch(found.sha):
        raise OSError("its answer names no commit")
    return Snapshot(repository, found.sha, files)


def _translated(work: Callable[[], T], repository: str) -> T:
    """Do `work`, and say in one sentence why it failed."""
    try:
        return work()
    except GatedRepoError as error:
        raise InputError(
            f"The hub gives '{repository}' only to those it has granted access.",
            "Ask for access on the model's page, then log in with: hf auth login",
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise InputError(
            f"The hub has no model '{repository}' of that revision, or keeps it private.",
            "Check the spelling, or log in with: hf auth login",
        ) from error
    except _NO_ANSWER as error:
        reason = f" ({' '.join(str(error).split())[:200]})" if str(error) else ""
        raise HubUnreachable(
            f"The model hub cannot be reached for '{repository}'{reason}.",
            "Check the connection, HF_ENDPOINT and HF_HUB_OFFLINE, or give the model as a local folder.",
        ) from error


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT") or constants.ENDPOINT


def _counter(on_bytes: Callable[[int], None]) -> type[tqdm]:
    """A progress bar class that shows nothing and counts bytes."""

    class Counter(tqdm):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            on_bytes(int(n or 0))
            return None

    return Counter
