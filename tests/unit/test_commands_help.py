"""`--help` and completion of every command: what they say fits, tells defaults, and works as written."""

import argparse
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from swarm import __main__ as everything
from swarm.configuring import COMMANDS
from swarm.help_text import EXAMPLES
from swarm.parsing import Parser, settings_of

COLUMNS = 80
ADDRESS = "/ip4/192.0.2.1/tcp/4001/p2p/12D3KooWNHQ4tBB4A9mNvDbpnTRSKgtyRtWm6qVasV3uvfWTQ1Ji"


def walk(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from walk(command)


PARSERS = {parser.prog: parser for parser in walk(everything.parser())}
LEAVES = {name: parser for name, parser in PARSERS.items() if isinstance(parser, Parser) and parser.place}


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(COLUMNS))


def test_all_commands_are_there() -> None:
    assert set(everything.COMMANDS) == set(COMMANDS)
    assert {"swarm", "swarm server", "swarm client", "swarm client chat", "swarm health"} <= PARSERS.keys()
    tables = {parser.place.table for parser in LEAVES.values() if parser.place}
    assert tables == {name.removeprefix("swarm ").replace(" ", ".") for name in LEAVES}


@pytest.mark.parametrize("name", PARSERS)
def test_help_fits_a_narrow_terminal(name: str) -> None:
    lines = PARSERS[name].format_help().splitlines()
    assert lines[0].startswith(f"usage: {name} [OPTIONS]")
    too_long = [line for line in lines if len(line) > COLUMNS]
    assert not too_long, too_long


@pytest.mark.parametrize("name", LEAVES)
def test_help_tells_each_options_default(name: str) -> None:
    told_otherwise = {"identity", "config"}
    for action in LEAVES[name]._actions:
        assert action.help, f"{action.dest} has no help"
    for setting in settings_of(LEAVES[name]):
        (action,) = [action for action in LEAVES[name]._actions if action.dest == setting.dest]
        if setting.kind == "one" and setting.default != "" and setting.key not in told_otherwise:
            assert "(default: " in str(action.help), f"{setting.key} tells no default"


@pytest.mark.parametrize("name", PARSERS)
def test_examples_are_command_lines_that_work(name: str) -> None:
    assert PARSERS[name].epilog
    text = str(PARSERS[name].format_help()).partition(EXAMPLES)[2]
    commands = [line for line in text.splitlines() if line.startswith("    ")]
    assert commands
    for command in commands:
        words = shlex.split(command.replace("ADDRESS", ADDRESS), comments=False)
        if words[0] != "swarm" or "--print-completion" in words:
            continue
        words = words[: next((at for at, word in enumerate(words) if word in ("<", ">", "|")), None)]
        if "--print-config" in words:
            words.remove("--print-config")
        assert everything.parser().parse_args(words[1:])


def completion(shell: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "swarm", "--print-completion", shell],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    return done.stdout


def run(shell: str, script: str, *arguments: str) -> str:
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} on this machine")
    done = subprocess.run([shell, *arguments, "-c", script], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


LINES = [
    ("swarm ", {"server", "client", "health", "demo"}),
    ("swarm client gen", {"generate"}),
    ("swarm server --kv", {"--kv-tokens", "--kv-overcommit"}),
    ("swarm server --dtype bf", {"bfloat16"}),
    ("swarm client chat --top", {"--top-k", "--top-p"}),
]


def test_bash_completes(tmp_path: Path) -> None:
    script = tmp_path / "swarm.bash"
    script.write_text(completion("bash"))
    (tmp_path / "peer.key").touch()
    for line, expected in [*LINES, (f"swarm server --identity {tmp_path}/pe", {f"{tmp_path}/peer.key"})]:
        words = line.split(" ")
        complete = f"""source {script}
COMP_WORDS=({" ".join(shlex.quote(word) for word in words)}); COMP_CWORD={len(words) - 1}; COMP_LINE={line!r}
$(complete -p swarm | sed 's/.*-F \\([^ ]*\\).*/\\1/') swarm {shlex.quote(words[-1])} {shlex.quote(words[-2])}
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
        assert set(run("bash", complete).split()) == expected


def test_fish_completes(tmp_path: Path) -> None:
    script = tmp_path / "swarm.fish"
    script.write_text(completion("fish"))
    for line, expected in LINES:
        said = run("fish", f"source {script}; complete -C {shlex.quote(line)}", "--no-config")
        assert {one.split("\t")[0] for one in said.splitlines()} == expected


def test_zsh_takes_its_completion(tmp_path: Path) -> None:
    script = tmp_path / "swarm.zsh"
    script.write_text(completion("zsh"))
    load = f'autoload -Uz compinit && compinit -u -D; eval "$(< {script})"; print $_comps[swarm]'
    assert run("zsh", load, "-f").split() == ["_shtab_swarm"]
    assert "--kv-tokens" in script.read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--version"], 0, "0."),
        (["server", "--kv-tokens", "9", "--print-config"], 0, "kv-tokens = 9 "),
        (["client", "peers", "--print-config"], 0, "# model is not set"),
        ([], 2, "error: The following arguments are required: COMMAND."),
        (["--print-completion", "tcsh"], 2, "invalid choice: 'tcsh'"),
        (["sever"], 2, "invalid choice: 'sever'"),
        (["--", "server"], 2, "error: "),
        (["client", "caht"], 2, "hint: 'swarm client --help' shows what can be given."),
        (["client", "route", "--nwe"], 2, "hint: 'swarm client route --help' shows what can be given."),
    ],
)
def test_one_name_leads_to_all_commands(
    arguments: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        everything.main(arguments)
    assert ended.value.code == code
    said = capsys.readouterr()
    assert says in said.out + said.err
