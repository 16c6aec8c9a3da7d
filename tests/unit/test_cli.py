"""The shared command line: options, exit codes, signals, JSON lines and progress."""

import argparse
import asyncio
import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm import cli
from swarm.errors import InputError, SwarmError

ONE = "/ip4/192.0.2.1/tcp/4001/p2p/QmOne"
TWO = "/ip6/::1/tcp/4002/p2p/QmTwo"


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Gives back what `configure_logging` changes in this process."""
    monkeypatch.delenv(cli.PEERS_VARIABLE, raising=False)
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    swarm_level = logging.getLogger("swarm").level
    before = dict(os.environ)
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("swarm").setLevel(swarm_level)
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)


def parse(*arguments: str) -> argparse.Namespace:
    parser = cli.Parser(prog="test")
    parser.add_argument("prompt", nargs="?")
    cli.shared_options(parser, timeout=7.0)
    return parser.parse_args(arguments)


def test_defaults() -> None:
    args = parse()
    assert (args.model, args.initial_peers, args.identity) == ("smollm2-135m", (), None)
    assert (args.json, args.timeout, args.verbose, args.prompt) == (False, 7.0, False, None)


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


def test_addresses_reach_a_command_behind_a_subparser() -> None:
    parser = cli.Parser(prog="test")
    command = parser.add_subparsers(parser_class=cli.Parser).add_parser("generate")
    command.add_argument("prompt")
    cli.shared_options(command)
    args = parser.parse_args(["generate", "--initial-peers", ONE, TWO, "Hi"])
    assert (args.initial_peers, args.prompt) == ((ONE, TWO), "Hi")


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
    ],
)
def test_a_mistake_is_one_sentence_a_hint_and_exit_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(*arguments)
    assert ended.value.code == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert error.endswith(".")
    assert hint.startswith("hint: ")


@pytest.mark.parametrize(
    ("text", "seconds"), [("30", 30), ("1.5s", 1.5), ("200ms", 0.2), ("2m", 120), ("1h", 3600), (" 3 s ", 3)]
)
def test_durations(text: str, seconds: float) -> None:
    assert cli.duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("text", "size"),
    [("5", 5), ("5b", 5), ("1k", 1000), ("1KiB", 1024), ("512MB", 512 * 10**6), ("1.5 GiB", 3 * 2**29)],
)
def test_sizes(text: str, size: int) -> None:
    assert cli.size(text) == size


@given(st.text(max_size=12))
def test_any_text_is_a_value_or_refused(text: str) -> None:
    for read in (cli.duration, cli.size, cli.count):
        try:
            value: float = read(text)
        except argparse.ArgumentTypeError:
            continue
        assert value > 0


def ends_with(error: BaseException, *, as_json: bool = False) -> int:
    async def main(args: argparse.Namespace) -> int:
        raise error

    return cli.run(main, argparse.Namespace(json=as_json, verbose=False))


def test_the_exit_code_is_the_commands_own() -> None:
    async def main(args: argparse.Namespace) -> int:
        return 7

    assert cli.run(main, argparse.Namespace(json=False, verbose=False)) == 7


def test_commands_run_on_uvloop() -> None:
    async def main(args: argparse.Namespace) -> int:
        return int(type(asyncio.get_running_loop()).__module__ != "uvloop")

    assert cli.run(main, argparse.Namespace(json=False, verbose=False)) == 0


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SwarmError("It broke.", "Mend it."), 1),
        (InputError("It broke.", "Mend it."), 2),
        (ExceptionGroup("tasks", [ExceptionGroup("inner", [InputError("It broke.", "Mend it.")])]), 2),
        (ExceptionGroup("tasks", [InputError("It broke.", "Mend it."), SwarmError("So did this.")]), 2),
    ],
)
def test_errors_for_people(error: Exception, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert ends_with(error, as_json=True) == code
    said = capsys.readouterr()
    assert said.err == "error: It broke.\nhint: Mend it.\n"
    assert json.loads(said.out) == {"event": "error", "message": "It broke.", "hint": "Mend it."}


@pytest.mark.parametrize(
    "error", [ValueError("oops"), ExceptionGroup("tasks", [SwarmError("It broke."), ValueError("oops")])]
)
def test_a_bug_is_called_one(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert ends_with(error) == 1
    said = capsys.readouterr()
    assert said.out == ""
    first, *trace = said.err.splitlines()
    assert "bug" in first
    assert any("ValueError: oops" in line for line in trace)


def test_emit_prints_one_line_of_plain_json(capsys: pytest.CaptureFixture[str]) -> None:
    cli.emit({"text": "two\nlines … \ud83d"})
    out = capsys.readouterr().out
    assert out.endswith("\n")
    assert out.count("\n") == 1
    assert out.isascii()
    assert json.loads(out) == {"text": "two\nlines … \ud83d"}


COMMAND = """
import argparse, asyncio, sys
from swarm import cli

async def main(args):
    try:
        cli.emit({"event": "started"})
        while sys.argv[1] == "talk":
            cli.emit({"event": "noise"})
        await asyncio.sleep(60)
    finally:
        cli.emit({"event": "cleaned"})
        if sys.argv[1] == "stubborn":
            await asyncio.sleep(60)
    return 0

sys.exit(cli.run(main, argparse.Namespace(json=False, verbose=False)))
"""


@pytest.fixture
def command() -> "Iterator[CommandProcess]":
    with CommandProcess() as process:
        yield process


class CommandProcess:
    """`COMMAND` as a process, ended with the test."""

    def __init__(self) -> None:
        self.started: subprocess.Popen[str] | None = None

    def __enter__(self) -> "CommandProcess":
        return self

    def __exit__(self, *failure: object) -> None:
        if self.started is not None:
            self.started.kill()
            self.started.communicate(timeout=10)

    def start(self, mode: str) -> subprocess.Popen[str]:
        self.started = subprocess.Popen(
            [sys.executable, "-c", COMMAND, mode], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.started.stdout is not None
        assert json.loads(self.started.stdout.readline()) == {"event": "started"}
        return self.started


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_command_clean_up(
    number: signal.Signals, code: int, command: CommandProcess
) -> None:
    process = command.start("wait")
    process.send_signal(number)
    out, err = process.communicate(timeout=10)
    assert process.returncode == code
    assert json.loads(out) == {"event": "cleaned"}
    assert err == ""


def test_a_second_sigterm_ends_at_once(command: CommandProcess) -> None:
    process = command.start("stubborn")
    process.terminate()
    assert process.stdout is not None
    assert json.loads(process.stdout.readline()) == {"event": "cleaned"}
    process.terminate()
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGTERM


def test_a_reader_that_goes_away_ends_the_command_quietly(command: CommandProcess) -> None:
    process = command.start("talk")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.wait(timeout=10) == 1
    assert process.stderr.read() == ""


async def test_cancelled_work_in_a_thread_ends_at_its_next_report() -> None:
    has_begun, has_ended = threading.Event(), threading.Event()

    def work(report: cli.OnProgress) -> None:
        try:
            while True:
                report(0.5)
                has_begun.set()
                time.sleep(0.001)
        finally:
            has_ended.set()

    task = asyncio.create_task(cli.in_thread(work, lambda fraction: None))
    await asyncio.to_thread(has_begun.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(has_ended.wait, 10)


async def test_work_in_a_thread_reports_and_returns() -> None:
    reports: list[tuple[str, float]] = []

    def work(report: "cli.Callable[[str, float], None]") -> int:
        report("reading", 1.0)
        return 3

    assert await cli.in_thread(work, lambda stage, fraction: reports.append((stage, fraction))) == 3
    assert reports == [("reading", 1.0)]


def test_progress_outside_a_terminal_is_one_line_a_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with cli.Progress() as progress:
        on_progress = progress.stage("Loading")
        for percent in range(101):
            on_progress(percent / 100)
            progress.on_stage("Hashing", percent / 100)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "Loading…\nHashing…\n"


def test_quiet_progress_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with cli.Progress(quiet=True) as progress:
        progress.stage("Loading")(0.5)
        progress.on_stage("Hashing", 0.5)
    assert capsys.readouterr() == ("", "")


def test_progress_in_a_terminal_draws_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with cli.Progress() as progress:
        progress.stage("Loading")(0.25)
        waiting = progress.stage("Joining", counted=False)
        waiting(1.0)
    shown = terminal.getvalue()
    assert "Loading" in shown
    assert "25%" in shown
    assert "100%" in shown


def test_a_path_may_begin_at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse("--identity", "~/key").identity == tmp_path / "key"
