"""Child processes: their events, their last words, and that they end whatever happens."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from swarm.processes import ProcessEnded, ServerProcess, stop_all

PATIENCE = 20.0

CHILD = """
import json, os, signal, subprocess, sys, time

def say(event, **more):
    print(json.dumps({"event": event, **more}), flush=True)

mode = sys.argv[1]
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if mode == "parent":
    grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    say("parent", pid=grandchild.pid)
if mode == "polite":
    def leave(number, frame):
        say("left")
        sys.exit(0)
    signal.signal(signal.SIGTERM, leave)
print("last words", file=sys.stderr, flush=True)
if mode == "broken":
    sys.exit(3)
if mode == "sorry":
    say("error", message="No such model.", hint="Choose another.")
    sys.exit(2)
if mode == "garbage":
    print("not json"); print('["no object"]'); print("x" * 3_000_000)
say("ready", arguments=sys.argv[2:], variable=os.environ.get("CHILD_VARIABLE"))
if mode == "lifeline":
    sys.stdin.read()
    say("lifeline is cut")
else:
    time.sleep(60)
"""


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "type[Child]":
    (tmp_path / "child_of_test.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    Child.folder = tmp_path
    return Child


class Child(ServerProcess):
    folder: Path

    def __init__(self, mode: str, **options: object):
        super().__init__(
            [mode],
            name=f"the {mode} one",
            log=self.folder / f"{mode}.log",
            module="child_of_test",
            **options,  # type: ignore[arg-type]
        )


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


async def test_events_arrive_and_the_child_ends_politely(child: type[Child]) -> None:
    heard: list[str] = []
    async with child(
        "polite", environment={"CHILD_VARIABLE": "set"}, on_event=lambda event: heard.append(event["event"])
    ) as process:
        ready = await process.wait_for("ready", PATIENCE)
        assert ready["arguments"] == ["--json"]
        assert ready["variable"] == "set"
        assert await process.wait_for("ready", PATIENCE) is ready
        assert os.getsid(process.pid) == process.pid
    assert process.exit_code == 0
    assert heard == ["ready", "left"]


@pytest.mark.parametrize(
    ("mode", "message", "hint"),
    [
        ("broken", "the broken one ended with exit code 3.", "last words"),
        ("sorry", "the sorry one: No such model.", "Choose another."),
    ],
)
async def test_a_child_that_ends_early_says_why(
    child: type[Child], mode: str, message: str, hint: str
) -> None:
    async with child(mode) as process:
        with pytest.raises(ProcessEnded) as ended:
            await process.wait_for("ready", PATIENCE)
        assert ended.value.message == message
        assert hint in ended.value.hint
        assert await process.wait_ended() == process.exit_code


async def test_waiting_has_a_deadline(child: type[Child]) -> None:
    async with child("silent") as process:
        await process.wait_for("ready", PATIENCE)
        with pytest.raises(ProcessEnded, match="did not say 'serving' within"):
            await process.wait_for("serving", 0.05)


async def test_lines_that_are_no_events_are_passed_over(child: type[Child]) -> None:
    async with child("garbage") as process:
        await process.wait_for("ready", PATIENCE)
        assert [event["event"] for event in process.events] == ["ready"]


async def test_a_stubborn_child_is_killed(child: type[Child]) -> None:
    process = child("stubborn")
    await process.start()
    await process.wait_for("ready", PATIENCE)
    await process.stop(grace=0.05)
    assert process.exit_code == -signal.SIGKILL


async def test_a_cancelled_stop_kills(child: type[Child]) -> None:
    process = child("stubborn")
    await process.start()
    await process.wait_for("ready", PATIENCE)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await process.stop(grace=60)
    assert await process.wait_ended() == -signal.SIGKILL


async def test_what_the_child_started_ends_with_it(child: type[Child]) -> None:
    async with child("parent") as process:
        grandchild = (await process.wait_for("parent", PATIENCE))["pid"]
        assert is_running(grandchild)
        await process.stop(grace=0.2)
    for _ in range(100):
        if not is_running(grandchild):
            break
        await asyncio.sleep(0.02)
    assert not is_running(grandchild)


async def test_an_error_in_the_parent_ends_the_child(child: type[Child]) -> None:
    process = child("silent")

    async def fail() -> None:
        async with process:
            await process.wait_for("ready", PATIENCE)
            raise ValueError("parent")

    with pytest.raises(ValueError, match="parent"):
        await fail()
    assert not is_running(process.pid)


async def test_several_stop_together_and_more_than_once(child: type[Child]) -> None:
    processes = [child("polite"), child("silent"), child("never started")]
    for process in processes[:2]:
        await process.start()
        await process.wait_for("ready", PATIENCE)
    await stop_all(processes)
    await stop_all(processes)
    assert [process.exit_code for process in processes[:2]] == [0, -signal.SIGTERM]


PARENT = """
import asyncio, sys
from pathlib import Path
from swarm.processes import ServerProcess

async def main():
    child = ServerProcess(["lifeline"], name="child", log=Path(sys.argv[1]), module="child_of_test")
    await child.start()
    await child.wait_for("ready", 20)
    print(child.pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_a_killed_parent_cuts_the_lifeline(child: type[Child]) -> None:
    log = child.folder / "child.log"
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PARENT, str(log), stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    pid = int(await asyncio.wait_for(parent.stdout.readline(), PATIENCE))
    parent.kill()
    await parent.wait()
    for _ in range(250):
        if not is_running(pid):
            break
        await asyncio.sleep(0.02)
    assert not is_running(pid)
