"""The key of a private swarm: 32 random bytes that all its members share, and the file that holds them.

Whoever has it is a member; there is nothing else to know. The key itself is never used nor sent: each use
takes a secret derived for it. Knows nothing of what is kept from others by it.
"""

import os
import secrets
from pathlib import Path

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from swarm.errors import InputError
from swarm.net.private_file import read_private, write_private

KEY_BYTES = 32
VERSION_LINE = "swarm-key v1"
_MAX_FILE_BYTES = 1024
_NEW = "Make one with: python -m swarm.server --new-swarm-key FILE"


class SwarmKey:
    """The shared secret of one private swarm."""

    def __init__(self, secret: bytes):
        """
        Raises:
            ValueError: these are not 32 bytes.
        """
        if len(secret) != KEY_BYTES:
            raise ValueError(f"a swarm key has {KEY_BYTES} bytes, not {len(secret)}")
        self._secret = secret

    def __repr__(self) -> str:
        return "SwarmKey(...)"  # a log must not have it

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SwarmKey) and secrets.compare_digest(self._secret, other._secret)

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def generate(cls) -> "SwarmKey":
        return cls(secrets.token_bytes(KEY_BYTES))

    @classmethod
    def load(cls, path: Path | str) -> "SwarmKey":
        """Read a key file.

        Raises:
            InputError: it cannot be read, other users can read it too, or it is no swarm key.
        """
        path = Path(path)
        try:
            data, is_shared = read_private(path, _MAX_FILE_BYTES)
        except OSError as error:
            raise InputError(f"The swarm key {path} cannot be read: {error.strerror}.", _NEW) from error
        if is_shared and os.name == "posix":
            raise InputError(
                f"The swarm key {path} can be read by other users of this machine.",
                f"Make it yours alone: chmod 600 {path}",
            )
        return cls(_parse(data, path))

    def save_new(self, path: Path | str) -> None:
        """Write a key file for this user alone, where there is none yet.

        Raises:
            InputError: there is a file already, or it cannot be written.
        """
        path = Path(path)
        text = f"{VERSION_LINE}\n{self._secret.hex()}\n"
        try:
            write_private(path, text.encode(), keep_existing=True)
        except FileExistsError:
            raise InputError(
                f"There is a file {path} already.", "Choose another path: a swarm key is never overwritten."
            ) from None
        except OSError as error:
            raise InputError(
                f"The swarm key {path} cannot be written: {error.strerror}.",
                "Choose a path in a folder that you may write to.",
            ) from error

    def secret_for(self, purpose: str) -> bytes:
        """32 bytes for one `purpose`: always the same, and of no use for finding others or the key.

        Source: RFC 5869, section 2.3; the key is uniformly random, so that nothing need be extracted first.
        """
        return HKDFExpand(SHA256(), 32, f"{VERSION_LINE}: {purpose}".encode()).derive(self._secret)

    def to_bytes(self) -> bytes:
        """The secret itself, for an invitation."""
        return self._secret


def _parse(data: bytes, path: Path) -> bytes:
    lines = data.decode("ascii", errors="replace").split("\n")
    if lines[0].strip() != VERSION_LINE:
        raise InputError(f"The file {path} is no swarm key: it does not begin with '{VERSION_LINE}'.", _NEW)
    text = "".join(lines[1:]).strip()
    try:
        secret = bytes.fromhex(text)
    except ValueError:
        secret = b""
    if len(secret) != KEY_BYTES or len(text) != 2 * KEY_BYTES:
        raise InputError(f"The swarm key {path} is damaged.", "Get the file again from a member.")
    return secret
