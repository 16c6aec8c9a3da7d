"""The command line that commands share: addresses, mistakes, and what is set in the environment or a file."""

import argparse
import os
import tomllib
from pathlib import Path

import pytest

from swarm import cli
from swarm.parsing import settings_of

ONE = "/ip4/192.0.2.1/tcp/4001/p2p/QmOne"
TWO = "/ip6/::1/tcp/4002/p2p/QmTwo"
INVITATION = "swarm1" + "2x" * 60


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SWARM_")]:
        monkeypatch.delenv(name)


def parser_of(command: str = "server") -> cli.Parser:
    parser = cli.Parser(prog="test", place=cli.Place(command, siblings=("chat", "generate")))
    parser.add_argument("prompt", nargs="?")
    parser.add_argument("--kv-tokens", type=cli.count)
    parser.add_argument("--memory", type=cli.size, default=2**30)
    parser.add_argument("--stop", action="append", default=[])
    parser.add_argument("--wire", choices=("exact", "half"), default="exact")
    parser.add_argument("--no-push", dest="push", action="store_false")
    parser.add_argument("--api-key", action="append", default=[])
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--port", type=cli.port)
    either.add_argument("--maddrs", nargs="+", default=[])
    cli.shared_options(parser, timeout=7.0)
    return parser


def parse(*arguments: str) -> argparse.Namespace:
    return parser_of().parse_args(arguments)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that SWARM_CONFIG names, empty at first."""
    path = tmp_path / "swarm.toml"
    path.write_text("")
    monkeypatch.setenv("SWARM_CONFIG", str(path))
    return path


def test_defaults() -> None:
    args = parse()
    assert (args.model, args.initial_peers, args.identity) == ("smollm2-135m", (), None)
    assert (args.json, args.timeout, args.verbose, args.prompt) == (False, 7.0, False, None)
    assert (args.kv_tokens, args.stop, args.push) == (None, [], True)
    assert (args.swarm_key, args.allow_peers, args.block_peers, args.remembers) == (None, None, None, True)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--initial-peers", ONE, TWO, "Hello there"],
        ["--initial-peers", ONE, "Hello there", "--initial-peers", TWO],
        [f"--initial-peers={ONE}", TWO, "Hello there"],
        ["--initial-peers", f"{ONE},{TWO}", "--json", "Hello there"],
        ["Hello there", "--initial-peers", f"{ONE} {TWO}"],
    ],
)
def test_addresses_end_where_the_prompt_begins(arguments: list[str]) -> None:
    args = parse(*arguments)
    assert args.initial_peers == (ONE, TWO)
    assert args.prompt == "Hello there"


def test_addresses_come_from_the_environment_unless_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWARM_INITIAL_PEERS", f" {ONE}, {TWO}\n")
    assert parse().initial_peers == (ONE, TWO)
    assert parse("--initial-peers", TWO).initial_peers == (TWO,)


def test_an_invitation_stands_in_for_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    args = parse("--initial-peers", ONE, INVITATION, "swarm1 is a word of my prompt")
    assert (args.initial_peers, args.prompt) == ((ONE, INVITATION), "swarm1 is a word of my prompt")
    monkeypatch.setenv("SWARM_INITIAL_PEERS", INVITATION)
    assert parse("Hi").initial_peers == (INVITATION,)


def test_a_damaged_invitation_is_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse("--initial-peers", INVITATION + "0").initial_peers == (INVITATION + "0",)
    assert not capsys.readouterr().err


def test_the_swarm_key_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SWARM_SWARM_KEY", "~/key")
    assert parse().swarm_key == tmp_path / "key"
    assert parse("--swarm-key", "other").swarm_key == Path("other")


def test_lists_and_memory_are_options() -> None:
    args = parse("--allow-peers", "a", "--block-peers", "b", "--no-remembered-peers")
    assert (args.allow_peers, args.block_peers, args.remembers) == (Path("a"), Path("b"), False)


def test_options_reach_a_command_behind_a_subparser(config: Path) -> None:
    config.write_text('timeout = "9s"\n[client.generate]\nraw = true\n[client.chat]\nnonsense = 1')
    root = cli.Parser(prog="test")
    commands = root.add_subparsers(dest="command", parser_class=cli.Parser)
    command = commands.add_parser(
        "generate", place=cli.Place("client.generate", siblings=("chat", "generate"))
    )
    command.add_argument("prompt")
    command.add_argument("--raw", action="store_true")
    cli.shared_options(command)
    args = root.parse_args(["generate", "--initial-peers", ONE, TWO, "Hi"])
    assert (args.initial_peers, args.prompt, args.command) == ((ONE, TWO), "Hi", "generate")
    assert (args.raw, args.timeout) == (True, 9.0)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--initial-peers"],
        ["--initial-peers", "example.org:4001"],
        ["--initial-peers", "/ip4/192.0.2.1/tcp/4001"],
        ["--timeout", "0"],
        ["--timeout", "-3"],
        ["--timeout", "nan"],
        ["--timeout", "soon"],
        ["--no-such-option"],
        ["--config"],
        ["--config", "/no/such/file.toml"],
        ["--port", "1", "--maddrs", "x"],
    ],
)
def test_a_mistake_is_one_sentence_a_hint_and_exit_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(capsys, *arguments)


def assert_refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        parse(*arguments)
    assert ended.value.code == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert error.endswith(".")
    assert hint.startswith("hint: ")
    return f"{error} {hint}"


def test_the_command_line_comes_before_the_environment_and_that_before_the_file(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.write_text("[server]\nkv-tokens = 1\nmemory = '1KiB'\nstop = ['a', 'b']")
    assert (parse().kv_tokens, parse().memory, parse().stop) == (1, 1024, ["a", "b"])
    monkeypatch.setenv("SWARM_KV_TOKENS", "2")
    monkeypatch.setenv("SWARM_STOP", "c, d")
    assert (parse().kv_tokens, parse().stop) == (2, ["c, d"])
    assert parse("--kv-tokens", "3").kv_tokens == 3
    assert parse("--stop", "e", "--stop", "f").stop == ["e", "f"]


def test_a_file_that_is_named_on_the_command_line_replaces_the_other(config: Path, tmp_path: Path) -> None:
    config.write_text("[server]\nkv-tokens = 1")
    other = tmp_path / "other.toml"
    other.write_text("[server]\nmemory = 5")
    args = parse("--config", str(other))
    assert (args.kv_tokens, args.memory, args.config) == (None, 5, other)


def test_help_needs_no_file(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text("nonsense")
    with pytest.raises(SystemExit) as ended:
        parse("--help")
    assert ended.value.code == 0
    assert "--kv-tokens" in capsys.readouterr().out


def test_of_options_that_exclude_each_other_the_one_from_nearer_holds(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.write_text("[server]\nport = 1")
    assert (parse("--maddrs", "x").maddrs, parse("--maddrs", "x").port) == (["x"], None)
    monkeypatch.setenv("SWARM_MADDRS", '["x", "y"]')
    assert (parse().maddrs, parse().port) == (["x", "y"], None)
    assert (parse("--port", "2").maddrs, parse("--port", "2").port) == ([], 2)


def test_what_is_printed_brings_the_same_about_again(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config.write_text(f'model = "tiny"\n[server]\nmemory = "3MB"\ninitial-peers = "{ONE} {TWO}"')
    monkeypatch.setenv("SWARM_STOP", 'a "quoted"\n\x7f\\ text')
    monkeypatch.setenv("SWARM_KV_TOKNES", "5")
    asked = ("--no-push", "--kv-tokens", "9", "--timeout", "2m")
    with pytest.raises(SystemExit) as ended:
        parse(*asked, "--print-config")
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    before = parse(*asked)
    for name in ("SWARM_STOP", "SWARM_CONFIG"):
        monkeypatch.delenv(name)
    saved = tmp_path / "saved.toml"
    saved.write_text(printed)
    after = parse("--config", str(saved))
    assert {**vars(after), "config": None} == {**vars(before), "config": None}
    comments = {
        line.split(" = ")[0]: line.rpartition(" # ")[2] for line in printed.splitlines() if " = " in line
    }
    assert comments["kv-tokens"] == "--kv-tokens"
    assert comments["stop"] == "SWARM_STOP"
    assert comments["model"] == comments["memory"] == str(config)
    assert comments["wire"] == "default"
    assert "# SWARM_KV_TOKNES in the environment is no option of this command." in printed


def test_secrets_are_printed_nowhere(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text('[server]\napi-key = ["hush"]')
    config.chmod(0o644)
    assert parse().api_key == ["hush"]
    assert f"can read the api-key in {config}" in capsys.readouterr().err
    config.chmod(0o600)
    with pytest.raises(SystemExit):
        parse("--print-config")
    said = capsys.readouterr()
    assert "hush" not in said.out + said.err
    assert f"# api-key is a secret, set by {config}, and not shown" in said.out
    assert "warning" not in said.err
    assert "api-key" not in tomllib.loads(said.out)["server"]


def test_an_invitation_is_a_secret(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text(f'[server]\ninitial-peers = ["{ONE}", "{INVITATION}"]')
    config.chmod(0o644)
    with pytest.raises(SystemExit):
        parse("--print-config")
    said = capsys.readouterr()
    assert INVITATION not in said.out + said.err
    assert f"# initial-peers is a secret, set by {config}, and not shown" in said.out
    assert f"can read the initial-peers in {config}" in said.err


def test_settings_are_what_a_command_takes() -> None:
    found = {setting.key: setting for setting in settings_of(parser_of())}
    assert not found.keys() & {"help", "config", "print-config", "prompt"}
    assert {key for key, setting in found.items() if setting.kind == "switch"} == {
        "no-push",
        "no-remembered-peers",
        "json",
        "verbose",
    }
    assert {key for key, setting in found.items() if setting.kind == "many"} == {
        "stop",
        "api-key",
        "maddrs",
        "initial-peers",
    }
    assert found["no-push"].on is False
    assert found["verbose"].variable == "SWARM_VERBOSE"
    assert found["port"].excludes == {"maddrs"}
