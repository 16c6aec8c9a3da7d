"""Equal models have equal fingerprints, other models have others, and files are hashed once."""

import hashlib
import os

import pytest

from swarm.blocks import fingerprint as hashing
from swarm.blocks import storage
from swarm.blocks.fingerprint import digests_of, file_digest, fingerprint
from swarm.blocks.storage import LocalStorage
from swarm.errors import InputError

CONFIG = {"model_type": "llama", "hidden_size": 16, "architectures": ["A", "B"], "rope": {"theta": 1e4}}
DIGESTS = {"model-1.safetensors": "11" * 32, "model-2.safetensors": "22" * 32}


@pytest.mark.parametrize(
    "same",
    [
        dict(reversed(CONFIG.items())),
        CONFIG | {"transformers_version": "5.23.0", "_name_or_path": "me/mine", "torch_dtype": "float16"},
        CONFIG | {"dtype": "bfloat16", "auto_map": {"AutoModel": "x.Y"}, "use_cache": False},
        CONFIG | {"rope": {"theta": 1e4, "dtype": "float32"}},
    ],
)
def test_what_does_not_change_the_model_leaves_no_trace(same):
    assert fingerprint(same, DIGESTS) == fingerprint(CONFIG, DIGESTS)
    assert fingerprint(same, dict(reversed(DIGESTS.items()))) == fingerprint(CONFIG, DIGESTS)


@pytest.mark.parametrize(
    ("config", "digests"),
    [
        (CONFIG | {"hidden_size": 17}, DIGESTS),
        (CONFIG | {"rope": {"theta": 1e5}}, DIGESTS),
        (CONFIG | {"architectures": ["B", "A"]}, DIGESTS),
        (CONFIG, DIGESTS | {"model-2.safetensors": "33" * 32}),
        (CONFIG, {"model-1.safetensors": "22" * 32, "model-2.safetensors": "11" * 32}),
        (CONFIG, {"model-1.safetensors": "11" * 32}),
    ],
)
def test_what_changes_the_model_changes_its_fingerprint(config, digests):
    assert fingerprint(config, digests) != fingerprint(CONFIG, DIGESTS)


def test_the_digest_is_sha256(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "HASH_CHUNK_BYTES", 7)
    data = os.urandom(1000)
    (tmp_path / "a").write_bytes(data)

    assert file_digest(LocalStorage(tmp_path), "a", tmp_path / "cache") == hashlib.sha256(data).hexdigest()


def test_an_untouched_file_is_hashed_once(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    first = file_digest(LocalStorage(tmp_path), "a", tmp_path / "cache")
    monkeypatch.setattr(hashing, "sha256_of", lambda *_: pytest.fail("hashed again"))

    assert file_digest(LocalStorage(tmp_path), "a", tmp_path / "cache") == first
    assert file_digest(LocalStorage(tmp_path), "link", tmp_path / "cache") == first


def test_a_changed_file_is_hashed_again(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"x")
    first = file_digest(LocalStorage(tmp_path), "a", tmp_path / "cache")
    path.write_bytes(b"y")
    os.utime(path, ns=(1, 1))

    assert file_digest(LocalStorage(tmp_path), "a", tmp_path / "cache") != first


@pytest.mark.parametrize("garbage", [b"", b"zz", b"ab" * 31, b"\xff" * 64])
def test_a_garbled_cache_is_not_believed(tmp_path, garbage):
    (tmp_path / "a").write_bytes(b"x")
    first = file_digest(LocalStorage(tmp_path), "a", tmp_path / "cache")
    for remembered in (tmp_path / "cache").iterdir():
        remembered.write_bytes(garbage)

    assert file_digest(LocalStorage(tmp_path), "a", tmp_path / "cache") == first


def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "cache").write_bytes(b"a file where the folder should be")

    assert file_digest(LocalStorage(tmp_path), "a", tmp_path / "cache") == hashlib.sha256(b"x").hexdigest()


def test_digests_come_by_file_name_with_progress(tmp_path):
    paths = [tmp_path / name for name in "cab"]
    for path in paths:
        path.write_bytes(path.name.encode() * 10)
    progress: list[float] = []

    digests = digests_of(
        LocalStorage(tmp_path), [path.name for path in paths], tmp_path / "cache", progress.append
    )

    assert digests == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    assert progress == sorted(progress)
    assert progress[-1] == 1.0


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        file_digest(LocalStorage(tmp_path), "a", tmp_path / "cache")
