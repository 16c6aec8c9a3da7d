"""What commands share from start to exit code: errors, signals, JSON lines and progress."""

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

import pytest

from swarm import cli
from swarm.errors import InputError, SwarmError


@pytest.fixture(autouse=True)
def quiet_environment() -> Iterator[None]:
    """Gives back what `configure_logging` changes in this process."""
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


def test_libraries_are_told_of_threads_before_they_are_imported() -> None:
    asked = (
        "import os, sys, swarm.client.__main__, swarm.server.__main__, swarm.demo;"
        "print({'numpy', 'torch', 'tokenizers'} & set(sys.modules));"
        "from swarm.cli import use_threads_sparingly; use_threads_sparingly();"
        "print(os.environ['OPENBLAS_NUM_THREADS'], os.environ['TOKENIZERS_PARALLELISM'])"
    )
    outside = {name: value for name, value in os.environ.items() if "_NUM_THREADS" not in name}
    said = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, env=outside)
    assert said.stdout.splitlines() == ["set()", "1 false"], said.stderr


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
