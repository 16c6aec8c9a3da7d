"""Settings from the environment and a file: what they mean there, and what is refused, with a hint."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.config_text import as_toml
from swarm.configuring import (
    MAX_FILE_BYTES,
    SHARED,
    ConfigFile,
    Place,
    Setting,
    Source,
    read_file,
    settle,
    unused_variables,
    without_options,
)
from swarm.errors import InputError
from swarm.option_values import addresses, count, duration, number, size
from swarm.parsing import Parser, settings_of, shared_options

SETTINGS = (
    Setting("kv-tokens", "kv_tokens", read=count),
    Setting("memory-limit", "memory_limit", read=size),
    Setting("kv-overcommit", "kv_overcommit", read=number, default=1.0),
    Setting("public-name", "public_name", default=""),
    Setting("wire", "wire", choices=("exact", "half"), default="exact"),
    Setting("json", "json", "switch", default=False),
    Setting("no-push", "push", "switch", default=True, on=False),
    Setting("stop", "stop", "many", default=[]),
    Setting("initial-peers", "initial_peers", "many", read=addresses, default=()),
    Setting("timeout", "timeout", read=duration, default=60.0),
)
SERVER, CHAT = Place("server"), Place("client.chat", siblings=("chat", "generate"))
ONE, TWO = "/ip4/192.0.2.1/tcp/1/p2p/A", "/ip4/192.0.2.2/tcp/1/p2p/B"


def values(
    tables: dict[str, Any] | None = None,
    place: Place = SERVER,
    given: dict[str, Any] | None = None,
    **variables: str,
) -> dict[str, Any]:
    file = None if tables is None else ConfigFile(Path("swarm.toml"), tables)
    settled = settle(SETTINGS, given or {}, variables, file, place)
    return {dest: one.value for dest, one in settled.items() if one.source != Source.DEFAULT}


def refused(tables: dict[str, Any] | None = None, place: Place = SERVER, **variables: str) -> str:
    with pytest.raises(InputError) as error:
        values(tables, place, **variables)
    assert error.value.hint.endswith((".", "?"))
    return str(error.value)


def test_a_file_has_numbers_texts_switches_and_lists() -> None:
    table = {
        "kv-tokens": 4096,
        "memory-limit": "6GiB",
        "kv-overcommit": 2,
        "json": True,
        "no-push": True,
        "stop": ["one", "two"],
        "initial-peers": [ONE, f"{TWO} {ONE}"],
    }
    assert values({"server": table}) == {
        "kv_tokens": 4096,
        "memory_limit": 6 * 2**30,
        "kv_overcommit": 2.0,
        "json": True,
        "push": False,
        "stop": ["one", "two"],
        "initial_peers": (ONE, TWO, ONE),
    }


def test_a_switch_in_the_file_is_turned_off_by_the_environment() -> None:
    tables = {"server": {"json": True, "no-push": True}}
    assert values(tables, SWARM_JSON="0", SWARM_NO_PUSH="off") == {"json": False, "push": True}
    assert values({"server": {"json": False}}) == {"json": False}


def test_the_more_particular_table_holds() -> None:
    tables: dict[str, Any] = {
        "timeout": 1,
        "model": "unused here",
        "client": {"timeout": 2, "chat": {"timeout": 3}, "generate": {"anything": 4}},
        "health": {"anything": 5},
    }
    assert values(tables, CHAT) == {"timeout": 3.0}
    del tables["client"]["chat"]
    assert values(tables, CHAT) == {"timeout": 2.0}
    assert values(tables, SERVER) == {"timeout": 1.0}


def test_a_variable_has_one_text_or_a_list() -> None:
    assert values(SWARM_STOP="a, b") == {"stop": ["a, b"]}
    assert values(SWARM_STOP='["a", "b"]') == {"stop": ["a", "b"]}
    assert values(SWARM_INITIAL_PEERS=f"{ONE}, {TWO}") == {"initial_peers": (ONE, TWO)}
    assert values(SWARM_KV_TOKENS="", SWARM_JSON="") == {}
    assert values(SWARM_JSON="Yes", SWARM_MEMORY_LIMIT="1k") == {"json": True, "memory_limit": 1000}


def test_variables_that_name_no_option_break_nothing() -> None:
    assert values(SWARM_CACHE="x", SWARM_CONFIG="y", SWARM_WHATEVER="z") == {}
    variables = {
        "SWARM_CACHE": "x",
        "SWARM_CONFIG": "y",
        "SWARM_WHATEVER": "z",
        "SWARM_JSON": "1",
        "HOME": "h",
    }
    assert unused_variables(SETTINGS, variables) == ["SWARM_WHATEVER"]
    assert without_options(variables) == {"SWARM_CACHE": "x", "HOME": "h"}


@pytest.mark.parametrize(
    ("tables", "says"),
    [
        (
            {"server": {"kv-token": 1}},
            "In [server] of swarm.toml, there is no option kv-token. Did you mean kv-tokens?",
        ),
        ({"server": {"kv_tokens": 1}}, "Did you mean kv-tokens?"),
        ({"server": {"zzz": 1}}, "Known are: initial-peers, json"),
        ({"sever": {"kv-tokens": 1}}, "no command is called [sever]. Did you mean [server]?"),
        ({"xyz": {}}, "There are [server], [client], [health], [demo]."),
        ({"kv-tokens": 1}, "In swarm.toml, kv-tokens stands above its table. Write it below [server]."),
        ({"kv-tokns": 1}, "In swarm.toml, there is no option kv-tokns."),
        ({"server": 5}, "server is not a table. Write [server]"),
        (
            {"server": {"kv-tokens": "many"}},
            "In [server] of swarm.toml, kv-tokens cannot be used: 'many' is not a whole number",
        ),
        ({"server": {"kv-tokens": 1.5}}, "'1.5' is not a whole number"),
        ({"server": {"kv-tokens": True}}, "it takes a number or a text, and this is true"),
        ({"server": {"kv-tokens": [1]}}, "and this is a list"),
        ({"server": {"kv-tokens": {"a": 1}}}, "no command is called [server.kv-tokens]"),
        ({"server": {"public-name": 5}}, "it takes a text, in quotes, and this is the number 5"),
        ({"server": {"json": 1}}, "it is on or off, and this is the number 1. Write json = true in the file"),
        ({"server": {"json": "true"}}, "it is on or off, and this is a text"),
        ({"server": {"wire": "int4"}}, "'int4' is none of exact, half"),
        ({"server": {"stop": [1]}}, 'and this is the number 1. Write stop = ["one", "another"]'),
        ({"server": {"initial-peers": ["nonsense"]}}, "'nonsense' is not the address of a peer"),
    ],
)
def test_what_is_wrong_in_a_file_is_told_with_its_place(tables: dict[str, Any], says: str) -> None:
    assert says in refused(tables)


@pytest.mark.parametrize(
    ("tables", "says"),
    [
        ({"client": {"caht": {}}}, "no command is called [client.caht]. Did you mean [client.chat]?"),
        ({"client": {"stop": "x"}}, "In [client] of swarm.toml, stop stands above its table. Write it below"),
        ({"client": {"chat": {"deeper": {}}}}, "[client.chat] holds no tables."),
    ],
)
def test_what_is_wrong_in_nested_tables(tables: dict[str, Any], says: str) -> None:
    assert says in refused(tables, CHAT)


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"SWARM_KV_TOKENS": "many"}, "SWARM_KV_TOKENS cannot be used: 'many' is not a whole number"),
        ({"SWARM_JSON": "maybe"}, "SWARM_JSON cannot be used: 'maybe' is neither 1 nor 0."),
        ({"SWARM_STOP": "[INST]"}, "it begins like a list and is none"),
        ({"SWARM_STOP": '["a", 1]'}, "this is the number 1"),
        ({"SWARM_WIRE": "int4"}, "'int4' is none of exact, half. What --wire takes is told by --help."),
    ],
)
def test_what_is_wrong_in_the_environment(variables: dict[str, str], says: str) -> None:
    assert says in refused(**variables)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"kv-tokens == 4", "is not TOML"),
        (b"\xff\xfe", "is not TOML"),
        (b"a = " + b"[" * 5000, "is not TOML"),
        (b"#" * (MAX_FILE_BYTES + 1), "too large"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "swarm.toml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=says):
        read_file(path)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match="cannot be read"):
            read_file(path)


@given(st.text(), st.lists(st.text(), max_size=3))
def test_any_text_is_written_as_toml(name: str, stops: list[str]) -> None:
    given: dict[str, Any] = {"public_name": name, "stop": stops}
    settled = settle(SETTINGS, given, {}, None, SERVER)
    printed = as_toml("server", SERVER, SETTINGS, settled, {})
    path = Path("saved.toml")
    again = settle(SETTINGS, {}, {}, ConfigFile(path, tomllib.loads(printed)), SERVER)
    assert (again["public_name"].value, again["stop"].value) == (name, stops)


def test_the_shared_keys_are_the_shared_options() -> None:
    parser = Parser(prog="test", place=SERVER)
    shared_options(parser)
    assert tuple(sorted(setting.key for setting in settings_of(parser))) == tuple(sorted(SHARED))
