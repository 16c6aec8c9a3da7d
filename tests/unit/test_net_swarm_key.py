"""The key of a private swarm and its file."""

import os
import stat
from pathlib import Path

import pytest

from swarm.errors import InputError
from swarm.net.swarm_key import KEY_BYTES, SwarmKey

SOME = "ab" * KEY_BYTES


def written(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_key_is_kept_in_a_file_of_ones_own(tmp_path: Path) -> None:
    key, path = SwarmKey.generate(), tmp_path / "keys" / "home.key"
    key.save_new(path)
    assert SwarmKey.load(path) == key != SwarmKey.generate()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    version, secret, end = path.read_text().split("\n")
    assert (version, len(secret), end) == ("swarm-key v1", 64, "")
    assert os.listdir(path.parent) == ["home.key"]


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "key"
    (first := SwarmKey.generate()).save_new(path)
    with pytest.raises(InputError, match="already"):
        SwarmKey.generate().save_new(path)
    assert SwarmKey.load(path) == first
    with pytest.raises(InputError, match="cannot be written"):
        first.save_new(path / "beneath a file")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_key_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = written(tmp_path / "key", f"swarm-key v1\n{SOME}\n", mode)
    with pytest.raises(InputError, match="other users") as refusal:
        SwarmKey.load(path)
    assert refusal.value.hint.endswith(f"chmod 600 {path}")


@pytest.mark.parametrize(
    "text", [f"swarm-key v1\n{SOME}", f"swarm-key v1\r\n{SOME}\r\n", f"swarm-key v1\n{SOME}\n\n"]
)
def test_what_an_editor_does_to_ends_of_lines_does_no_harm(tmp_path: Path, text: str) -> None:
    assert SwarmKey.load(written(tmp_path / "key", text)) == SwarmKey(bytes.fromhex(SOME))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no swarm key"),
        (f"swarm-key v2\n{SOME}", "no swarm key"),
        (f"{SOME}\n", "no swarm key"),
        ("/key/swarm/psk/1.0.0/\n/base16/\n" + SOME, "no swarm key"),
        ("swarm-key v1\n", "damaged"),
        (f"swarm-key v1\n{SOME[:-1]}", "damaged"),
        (f"swarm-key v1\n{SOME}ab", "damaged"),
        (f"swarm-key v1\n{SOME}\n{SOME}", "damaged"),
        (f"swarm-key v1\n{SOME[:-2]} ab", "damaged"),
        ("swarm-key v1\n" + "ü" * 64, "damaged"),
        ("swarm-key v1\n" + "x" * 10_000, "damaged"),
    ],
)
def test_what_is_no_key_is_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        SwarmKey.load(written(tmp_path / "key", text))


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            SwarmKey.load(path)


def test_each_purpose_has_a_secret_of_its_own() -> None:
    key, other = SwarmKey(bytes(KEY_BYTES)), SwarmKey(b"\1" * KEY_BYTES)
    secrets = {one.secret_for(purpose) for one in (key, other) for purpose in ("a", "b")}
    assert len(secrets) == 4
    assert key.secret_for("a") == SwarmKey(bytes(KEY_BYTES)).secret_for("a")
    assert all(len(secret) == 32 for secret in secrets)
    with pytest.raises(ValueError, match="32 bytes"):
        SwarmKey(b"short")


def test_a_key_is_not_shown() -> None:
    assert SOME not in f"{SwarmKey(bytes.fromhex(SOME))!r} {SwarmKey(bytes.fromhex(SOME))}"
