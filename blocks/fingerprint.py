"""What makes two copies of a model the same: a hash over its config and its weights files.

Names, folders and library versions leave no trace in it. Hashing a weights file takes seconds a
gigabyte, so the hash is remembered for as long as the file is untouched. Knows nothing of hubs.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from swarm.blocks.files import write_atomically
from swarm.blocks.storage import Storage, sha256_of

logger = logging.getLogger(__name__)

HASH_THREADS = 4

VOLATILE_KEYS = frozenset(
    {
        "_name_or_path",
        "_model_name_or_path",
        "_commit_hash",
        "_attn_implementation",
        "auto_map",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""What a config says of who wrote it and how to load it, and not of what is computed."""


def fingerprint(config: Mapping[str, Any], digests: Mapping[str, str]) -> str:
    """64 hex digits for a raw config and the SHA-256 of each weights file, by file name."""
    whole = hashlib.sha256(canonical(config))
    for _, digest in sorted(digests.items()):
        whole.update(bytes.fromhex(digest))
    return whole.hexdigest()


def canonical(config: Mapping[str, Any]) -> bytes:
    """The config as JSON with sorted keys, without what may differ between equal models."""
    return json.dumps(_lasting(config), sort_keys=True, separators=(",", ":")).encode()


def _lasting(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _lasting(inner) for key, inner in value.items() if key not in VOLATILE_KEYS}
    if isinstance(value, list):
        return [_lasting(inner) for inner in value]
    return value


def digests_of(
    storage: Storage, files: Sequence[str], cache: Path, on_progress: Callable[[float], None]
) -> dict[str, str]:
    """The SHA-256 of each file, by its name; hashed in parallel, remembered in the folder `cache`.

    `on_progress` gets the fraction of the files that are hashed, 0 to 1.

    Raises:
        InputError: a file is missing or cannot be read.
        SwarmError: what gives a file does not answer.
    """
    digests: dict[str, str] = {}
    with ThreadPoolExecutor(HASH_THREADS, thread_name_prefix="hash-weights") as pool:
        found = pool.map(lambda file: file_digest(storage, file, cache), files)
        for file, digest in zip(files, found, strict=True):
            digests[file] = digest
            on_progress(len(digests) / len(files))
    return digests


def file_digest(storage: Storage, file: str, cache: Path) -> str:
    """The SHA-256 of one file in hex, from `cache` where the file is the one that was hashed.

    Raises:
        InputError, SwarmError: as `digests_of`.
    """
    identity = storage.identity(file)
    if identity is None:
        return sha256_of(storage, file)
    remembered = cache / identity
    if digest := _recall(remembered):
        return digest
    digest = sha256_of(storage, file)
    try:
        write_atomically(remembered, digest.encode())
    except OSError as error:
        logger.warning("the hash of %s is not remembered: %s", storage.where(file), error)
    return digest


def _recall(remembered: Path) -> str | None:
    try:
        digest = remembered.read_text("ascii")
        return digest if len(bytes.fromhex(digest)) == hashlib.sha256().digest_size else None
    except (OSError, ValueError):
        return None
