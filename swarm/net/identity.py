"""A peer's identity: an Ed25519 key pair, the peer id that contains its public half, and its file.

The file is libp2p's own format (a protobuf `PrivateKey`), so that the daemon signs its handshakes with
the same key that signs records. Knows nothing of networks or of what is signed.

Sources: libp2p specs, `peer-ids/peer-ids.md` (protobuf encodings, identity multihash, base58 text).
"""

import hashlib
import logging
import os
from functools import lru_cache
from pathlib import Path

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from swarm.errors import InputError
from swarm.net.private_file import read_private, write_private
from swarm.net.transport import PeerId

logger = logging.getLogger(__name__)

_KEY_BYTES = 32
_PRIVATE_PREFIX = bytes((0x08, 0x01, 0x12, 0x40))  # key type 1, then 64 bytes: private and public half
_PUBLIC_PREFIX = bytes((0x08, 0x01, 0x12, 0x20))  # key type 1, then 32 bytes
_MULTIHASH_PREFIX = bytes((0x00, 0x24))  # identity "hash" of 36 bytes: the public key's protobuf itself
_PEER_PREFIX = _MULTIHASH_PREFIX + _PUBLIC_PREFIX
_MAX_PEER_CHARACTERS = 64  # an Ed25519 peer id has 52
_MAX_FILE_BYTES = 8192  # a 4096-bit RSA key, which is named in its error, takes 2.4 KB
_OTHER_KEY_TYPES = {0: "RSA", 2: "secp256k1", 3: "ECDSA"}


class Identity:
    """A private key and the peer id that belongs to it."""

    def __init__(self, key: Ed25519PrivateKey):
        self._key = key
        self.peer = _peer_of(key.public_key().public_bytes_raw())

    @classmethod
    def generate(cls) -> "Identity":
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_seed(cls, seed: str) -> "Identity":
        """The same identity for the same text: for simulations and tests, where a key need not be secret."""
        return cls(Ed25519PrivateKey.from_private_bytes(hashlib.sha256(seed.encode()).digest()))

    @classmethod
    def load(cls, path: Path | str) -> "Identity":
        """Read a key file.

        Raises:
            InputError: the file cannot be read or is not an Ed25519 key in libp2p's format.
        """
        path = Path(path)
        return cls(_parse_private(_read(path), path))

    @classmethod
    def load_or_create(cls, path: Path | str) -> "Identity":
        """Read a key file, or make one, together with its folder, where there is none.

        Of several processes that do so at once, one file wins and all of them get its identity.

        Raises:
            InputError: as `load`; or the file cannot be written.
        """
        path = Path(path)
        if not os.path.exists(path):
            try:
                cls.generate()._write(path, keep_existing=True)
            except FileExistsError:
                logger.debug("another process made the identity %s first", path)
        return cls.load(path)

    def save(self, path: Path | str) -> None:
        """Write the key file, for this user alone to read (mode 0600), in place of what was there.

        Raises:
            InputError: the file cannot be written.
        """
        self._write(Path(path), keep_existing=False)

    def sign(self, data: bytes) -> bytes:
        """The Ed25519 signature of `data`, 64 bytes."""
        return self._key.sign(data)

    def secret(self, purpose: str) -> bytes:
        """32 bytes that only who has this key can know: for one `purpose` always the same, and its own.

        BLAKE2 with a key is a pseudorandom function (RFC 7693), as a derivation of keys needs.
        """
        return hashlib.blake2b(purpose.encode(), key=self._key.private_bytes_raw(), digest_size=32).digest()

    def _write(self, path: Path, keep_existing: bool) -> None:
        """
        Raises:
            FileExistsError: `keep_existing`, and there is a file at `path`.
            InputError: the file cannot be written.
        """
        private = self._key.private_bytes_raw() + self._key.public_key().public_bytes_raw()
        try:
            write_private(path, _PRIVATE_PREFIX + private, keep_existing=keep_existing)
        except FileExistsError:
            if keep_existing and path.is_file():
                raise
            raise InputError(f"The identity file {path} cannot be written.", "Choose another path.") from None
        except OSError as error:
            raise InputError(
                f"The identity file {path} cannot be written: {error.strerror}.",
                "Choose a path in a folder that you may write to.",
            ) from error


def verify(peer: PeerId, data: bytes, signature: bytes) -> bool:
    """Whether `signature` is that of `data` by `peer`'s key. False too if any of them is malformed."""
    public = _public_of(peer)
    if public is None:
        return False
    try:
        public.verify(signature, data)
    except InvalidSignature:
        return False
    return True


def is_peer_id(text: str) -> bool:
    """Whether `text` is the one valid spelling of an Ed25519 peer id."""
    return _public_of(PeerId(text)) is not None


def is_binary_peer_id(raw: bytes) -> bool:
    """Whether `raw` has the form of an Ed25519 peer id before it is written in base58."""
    return len(raw) == len(_PEER_PREFIX) + _KEY_BYTES and raw.startswith(_PEER_PREFIX)


def _peer_of(public: bytes) -> PeerId:
    return PeerId(base58.b58encode(_PEER_PREFIX + public).decode())


@lru_cache(maxsize=4096)
def _public_of(peer: PeerId) -> Ed25519PublicKey | None:
    if len(peer) > _MAX_PEER_CHARACTERS:
        return None
    try:
        encoded = base58.b58decode(peer)
    except ValueError:
        return None
    public = encoded.removeprefix(_PEER_PREFIX)
    if len(public) != _KEY_BYTES or len(encoded) == len(public) or _peer_of(public) != peer:
        return None
    return Ed25519PublicKey.from_public_bytes(public)


def _read(path: Path) -> bytes:
    try:
        data, is_shared = read_private(path, _MAX_FILE_BYTES)
    except OSError as error:
        raise InputError(
            f"The identity file {path} cannot be read: {error.strerror}.", "Give the path of a key file."
        ) from error
    if is_shared:
        logger.warning("The identity file %s can be read by other users: `chmod 600` it.", path)
    return data


def _parse_private(data: bytes, path: Path) -> Ed25519PrivateKey:
    other = "Remove the file to get a new identity, or choose another path."
    if len(data) > 4 and data[0] == 0x08 and data[2] == 0x12 and data[1] in _OTHER_KEY_TYPES:
        kind = _OTHER_KEY_TYPES[data[1]]
        raise InputError(f"The identity file {path} holds an {kind} key instead of an Ed25519 key.", other)
    halves = data.removeprefix(_PRIVATE_PREFIX)
    if len(halves) != 2 * _KEY_BYTES or len(halves) == len(data):
        raise InputError(f"The file {path} is not an identity: it holds no libp2p private key.", other)
    key = Ed25519PrivateKey.from_private_bytes(halves[:_KEY_BYTES])
    if key.public_key().public_bytes_raw() != halves[_KEY_BYTES:]:
        raise InputError(f"The identity file {path} is damaged: its halves do not fit together.", other)
    return key
