"""The demo as a user runs it: an answer with route and speed, and no process left behind on any way out."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

READY_TIMEOUT = 200
LEAVE_TIMEOUT = 20
LONG = "Write a very long story about a ship and its crew."


class Demo:
    """`python -m swarm.demo` as a process, and every process that was seen below it."""

    def __init__(self, *arguments: str, stdin: int | None = subprocess.DEVNULL):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "swarm.demo", *arguments],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.below: list[psutil.Process] = []

    def events(self) -> Iterator[dict[str, Any]]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            yield json.loads(line)

    def until(self, event: str, server: str) -> None:
        """Read events until `server` says `event`, and remember the processes that run then."""
        assert any(said.get("event") == event and said.get("server") == server for said in self.events())
        self.below = psutil.Process(self.process.pid).children(recursive=True)
        assert self.below

    def nothing_is_left(self) -> bool:
        _, alive = psutil.wait_procs(self.below, timeout=LEAVE_TIMEOUT)
        return all(process.status() == psutil.STATUS_ZOMBIE for process in alive)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=LEAVE_TIMEOUT)
        for process in self.below:
            if process.is_running():
                process.kill()


@pytest.fixture
def start() -> "Iterator[type[Demo]]":
    started: list[Demo] = []

    class Started(Demo):
        def __init__(self, *arguments: str, stdin: int | None = subprocess.DEVNULL):
            super().__init__(*arguments, stdin=stdin)
            started.append(self)

    yield Started
    for demo in started:
        demo.end()


def test_a_prompt_is_answered_with_route_and_speed(start: type[Demo]) -> None:
    demo = start("What is the capital of France?", "--dtype", "float32")
    out, err = demo.process.communicate(timeout=READY_TIMEOUT)
    assert demo.process.returncode == 0, err
    assert "Paris" in out
    assert "server-1 [0:10] → server-2 [10:20] → server-3 [20:30]" in out
    assert "tokens/s" in out
    assert "Starting server-1 with blocks 0:10" in err


def test_a_prompt_from_a_pipe_is_answered_in_json(start: type[Demo]) -> None:
    demo = start("--json", stdin=subprocess.PIPE)
    out, err = demo.process.communicate("What is the capital of France?\n", timeout=READY_TIMEOUT)
    assert demo.process.returncode == 0, err
    *events, answer = [json.loads(line) for line in out.splitlines()]
    assert {event["server"] for event in events if event["event"] == "serving"} == {
        "server-1",
        "server-2",
        "server-3",
    }
    assert "Paris" in answer["text"]
    assert [hop["blocks"] for hop in answer["route"]] == [[0, 10], [10, 20], [20, 30]]
    assert answer["timing"]["tokens_per_s"] > 0


@pytest.mark.parametrize(
    ("number", "code", "event", "server"),
    [
        (signal.SIGINT, 130, "listening", "server-1"),
        (signal.SIGTERM, 143, "joining", "server-2"),
        (signal.SIGKILL, -signal.SIGKILL, "serving", "server-3"),
    ],
)
def test_a_signal_ends_every_process(
    number: signal.Signals, code: int, event: str, server: str, start: type[Demo]
) -> None:
    demo = start("--json", LONG)
    demo.until(event, server)
    demo.process.send_signal(number)
    assert demo.process.wait(LEAVE_TIMEOUT) == code
    assert demo.nothing_is_left()


def test_a_server_that_dies_ends_the_demo_with_its_name(start: type[Demo]) -> None:
    demo = start("--json", LONG)
    demo.until("joining", "server-2")
    servers = [process for process in demo.below if process.name() == "swarm.server"]
    sorted(servers, key=psutil.Process.create_time)[1].kill()
    _, err = demo.process.communicate(timeout=LEAVE_TIMEOUT)
    assert demo.process.returncode == 1
    assert "error: server-2 ended with exit code -9." in err
    assert "Traceback" not in err
    assert demo.nothing_is_left()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["   "], "prompt is empty"),
        ([], "prompt is empty"),
        (["--model", "./no/such/folder", "Hello"], "no/such/folder"),
        (["--timeout", "never", "Hello"], "not a time"),
    ],
)
def test_mistakes_are_one_sentence_and_a_hint(arguments: list[str], message: str, start: type[Demo]) -> None:
    demo = start(*arguments)
    _, err = demo.process.communicate(timeout=60)
    assert demo.process.returncode == 2
    assert message in err
    assert "Traceback" not in err
    assert "hint: " in err
