"""Child processes: their events, their last words, and that they end whatever happens."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from swarm.forking import ForkServer
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


@pytest.fixture(params=["anew", "forked"])
def child(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> "Iterator[type[Child]]":
    (tmp_path / "child_of_test.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    Child.folder, Child.fork_server = tmp_path, None
    if request.param == "anew":
        yield Child
        return
    with ForkServer("child_of_test", "json", environment={"CHILD_VARIABLE": "set"}) as Child.fork_server:
        yield Child


class Child(ServerProcess):
    folder: Path
    fork_server: ForkServer | None

    def __init__(self, mode: str, **options: object):
        super().__init__(
            [mode],
            name=f"the {mode} one",
            log=self.folder / f"{mode}.log",
            module="child_of_test",
            launcher=self.fork_server,
            **options,  # type: ignore[arg-type]
        )


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


async def until(is_true: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not is_true():  # noqa: ASYNC110 - processes tell nobody
            await asyncio.sleep(0.02)


async def until_ended(pids: Sequence[int]) -> None:
    await until(lambda: not any(is_running(pid) for pid in pids))


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
    await until_ended([grandchild])


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
from contextlib import ExitStack
from pathlib import Path
from swarm.forking import ForkServer
from swarm.processes import ServerProcess

async def main():
    log, how = sys.argv[1:]
    with ExitStack() as stack:
        launcher = stack.enter_context(ForkServer("child_of_test")) if how == "forked" else None
        child = ServerProcess(
            ["lifeline"], name="child", log=Path(log), module="child_of_test", launcher=launcher
        )
        await child.start()
        await child.wait_for("ready", 20)
        print(child.pid, flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_a_killed_parent_cuts_the_lifeline(child: type[Child]) -> None:
    how = "forked" if child.fork_server else "anew"
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PARENT, str(child.folder / "child.log"), how, stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    pid = int(await asyncio.wait_for(parent.stdout.readline(), PATIENCE))
    below = psutil.Process(parent.pid).children(recursive=True)
    assert pid in {process.pid for process in below}
    parent.kill()
    await parent.wait()
    await until_ended([process.pid for process in below])


def fork_server_of(process: ServerProcess) -> psutil.Process:
    parent = psutil.Process(process.pid).parent()
    assert parent is not None
    return parent


@pytest.mark.parametrize("child", ["forked"], indirect=True)
async def test_forks_are_no_leftovers_of_a_fork_server_that_was_killed(child: type[Child]) -> None:
    async with child("silent") as process:
        await process.wait_for("ready", PATIENCE)
        fork_server_of(process).kill()
        async with asyncio.timeout(PATIENCE):
            await process._started.wait()
        with pytest.raises(ProcessEnded, match="The fork server did not fork"):
            await child("late").start()
    assert process.exit_code == -signal.SIGKILL
    await until_ended([process.pid])


@pytest.mark.parametrize("child", ["forked"], indirect=True)
async def test_a_fork_that_nobody_waits_for_does_not_stay(child: type[Child]) -> None:
    async with child("silent") as process:
        await process.wait_for("ready", PATIENCE)
        fork_server = fork_server_of(process)
        fork_server.suspend()
        launching = asyncio.create_task(child("lifeline").start())
        await asyncio.sleep(0)
        launching.cancel()
        await asyncio.wait({launching})
        fork_server.resume()
        async with child("polite") as other:
            await other.wait_for("ready", PATIENCE)
            await until(lambda: {one.pid for one in fork_server.children()} == {process.pid, other.pid})


async def test_a_fork_server_that_cannot_import_says_so(tmp_path: Path) -> None:
    with ForkServer("swarm.server", "swarm.no_such_module") as fork_server:
        server = ServerProcess([], name="server", log=tmp_path / "log", launcher=fork_server)
        with pytest.raises(ProcessEnded) as ended:
            await server.start()
        assert "No module named 'swarm.no_such_module'" in ended.value.hint
