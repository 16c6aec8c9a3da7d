import errno
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from swarm.errors import InputError
from swarm.net.identity import Identity, is_peer_id, verify

# The Ed25519 test vector of the libp2p specification, peer-ids.md.
SPEC_KEY = bytes.fromhex(
    "080112407e0830617c4a7de83925dfb2694556b12936c477a0e1feb2e148ec9da60fee7d"
    "1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e"
)


def test_reads_the_specifications_key(tmp_path):
    file = tmp_path / "key"
    file.write_bytes(SPEC_KEY)
    file.chmod(0o600)
    identity = Identity.load(file)
    assert identity.peer.startswith("12D3KooW")
    assert len(identity.peer) == 52
    identity.save(tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == SPEC_KEY


def test_a_new_identity_is_private_and_stays(tmp_path):
    file = tmp_path / "deep" / "down" / "identity"
    first = Identity.load_or_create(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert Identity.load_or_create(file).peer == first.peer
    assert Identity.load(file).peer == first.peer
    assert os.listdir(file.parent) == ["identity"]


def test_many_at_once_agree_on_one_identity(tmp_path):
    file = tmp_path / "new" / "identity"
    with ThreadPoolExecutor(16) as pool:
        peers = {i.peer for i in pool.map(lambda _: Identity.load_or_create(file), range(64))}
    assert len(peers) == 1
    assert os.listdir(file.parent) == ["identity"]


def test_signatures():
    identity, other = Identity.generate(), Identity.generate()
    signature = identity.sign(b"data")
    assert verify(identity.peer, b"data", signature)
    assert not verify(other.peer, b"data", signature)
    assert not verify(identity.peer, b"Data", signature)
    assert not verify(identity.peer, b"data", signature[:-1])
    assert not verify(identity.peer, b"data", b"")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "12D3KooW",
        "0OIl",
        "ü",
        "1" * 52,
        "1" * 10_000,
        "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",
    ],
)
def test_what_is_no_ed25519_peer_id(text):
    assert not is_peer_id(text)
    assert not verify(text, b"data", bytes(64))


def test_a_peer_id_has_one_spelling():
    peer = Identity.generate().peer
    assert is_peer_id(peer)
    for other in (peer + " ", " " + peer, peer + "\n", "1" + peer, peer[:-1], peer.lower()):
        assert not is_peer_id(other)


def test_the_same_seed_gives_the_same_identity():
    assert Identity.from_seed("a").peer == Identity.from_seed("a").peer != Identity.from_seed("b").peer


def rsa_key_file() -> bytes:
    key = rsa.generate_private_key(65537, 2048)
    der = key.private_bytes(Encoding.DER, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    return b"\x08\x00\x12" + bytes([len(der) & 0x7F | 0x80, len(der) >> 7]) + der


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not an identity"),
        (b"garbage", "is not an identity"),
        (os.urandom(100_000), "is not an identity"),
        (SPEC_KEY[:-1], "is not an identity"),
        (SPEC_KEY + b"x", "is not an identity"),
        (SPEC_KEY[4:], "is not an identity"),
        (SPEC_KEY[:-1] + b"\0", "is damaged"),
        (rsa_key_file(), "RSA"),
    ],
    ids=["empty", "garbage", "long", "short", "longer", "bare", "halves", "rsa"],
)
def test_a_file_that_holds_no_identity(tmp_path, content, words):
    file = tmp_path / "key"
    file.write_bytes(content)
    for read in (Identity.load, Identity.load_or_create):
        with pytest.raises(InputError) as raised:
            read(file)
        assert words in raised.value.message
        assert str(file) in raised.value.message
        assert raised.value.hint
    assert file.read_bytes() == content


def test_a_path_that_cannot_be_read_or_written(tmp_path):
    (tmp_path / "file").write_bytes(SPEC_KEY)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "at" / "all")
    for read, path in [
        (Identity.load, tmp_path / "missing"),
        (Identity.load, tmp_path),
        (Identity.load_or_create, tmp_path),
        (Identity.load_or_create, tmp_path / "file" / "below"),
        (Identity.load_or_create, tmp_path / "dangling"),
        (Identity.generate().save, tmp_path),
    ]:
        with pytest.raises(InputError) as raised:
            read(path)
        assert str(path) in raised.value.message
    assert sorted(os.listdir(tmp_path)) == ["dangling", "file"]


def test_warns_of_a_key_that_others_can_read(tmp_path, caplog):
    file = tmp_path / "key"
    file.write_bytes(SPEC_KEY)
    file.chmod(0o644)
    Identity.load(file)
    assert "chmod 600" in caplog.text


def test_a_file_in_a_folder_that_may_not_be_searched_is_a_clear_error(tmp_path, monkeypatch):
    def refuse(path, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "stat", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(InputError, match="cannot be written: Permission denied"):
        Identity.load_or_create(tmp_path / "closed" / "key")
