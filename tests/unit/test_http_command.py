"""The command `serve`: its options, and the mistakes that it answers in a sentence."""

from pathlib import Path
from typing import Any

import pytest

from swarm.client.__main__ import parser
from swarm.client.http.command import site_options
from swarm.client.http.site import SiteOptions
from swarm.client.http.translation import served_names
from swarm.errors import InputError


def options(*arguments: str) -> SiteOptions:
    return site_options(parser().parse_args(["serve", *arguments]))


def test_it_is_for_this_machine_alone_unless_told_otherwise() -> None:
    plain = options()
    assert (plain.is_local, plain.keys, plain.cors_origins) == (True, (), ())
    assert options("--host", "::1").is_local
    assert not options("--host", "0.0.0.0").is_local
    assert options("--cors-origin", "https://a.example").cors_origins == ("https://a.example",)


def test_keys_come_from_both_places(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("two\n\n three \n")
    assert options("--api-key", "one", "--api-key-file", str(file)).keys == ("one", "two", "three")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read: No such file or directory."),
        (b"", "There are no keys in"),
        (b"\n \n", "There are no keys in"),
        (b"\xff\xfe", "cannot be read: it is no UTF-8 text."),
    ],
)
def test_a_file_without_keys_is_refused(tmp_path: Path, content: bytes | None, says: str) -> None:
    """Else a server that should ask for a key would ask for none."""
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=f"keys.* in {file}") as refused:
        options("--api-key-file", str(file))
    assert says in refused.value.message


def test_an_empty_key_is_refused() -> None:
    with pytest.raises(InputError, match="empty"):
        options("--api-key", "")


@pytest.mark.parametrize(
    "arguments",
    [["--port", "70000"], ["--max-answers", "0"], ["--patience", "soon"], ["--default-tokens", "x"]],
)
def test_values_that_are_none(arguments: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        options(*arguments)
    assert ended.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_names_of_the_model() -> None:
    assert served_names("org/model", "id", "model-alias")[0] == "org/model"
    assert served_names("/home/me/model", "id", "/home/me/model")[0] == "model"
    assert {"org/model", "model", "model-alias", "id"} == set(served_names("org/model", "id", "model-alias"))
