"""The thread that an engine computes in: order, outcomes, and its end."""

import asyncio
import gc
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from threading import Event

import pytest

from swarm.blocks.compute_thread import ComputeThread
from swarm.net.virtual_time import in_virtual_time

PATIENCE = 10.0


@asynccontextmanager
async def computing() -> AsyncIterator[ComputeThread]:
    thread = ComputeThread()
    try:
        yield thread
    finally:
        thread.close()
        async with asyncio.timeout(PATIENCE):
            await thread.wait_closed()


async def test_work_is_done_in_its_order() -> None:
    done: list[int] = []
    async with computing() as thread:
        given = await asyncio.gather(*(thread.run(lambda at=at: done.append(at) or at) for at in range(20)))
    assert given == done == list(range(20))


async def test_what_fails_fails_for_who_asked_alone() -> None:
    async with computing() as thread:
        with pytest.raises(ZeroDivisionError):
            await thread.run(lambda: 1 // 0)
        assert await thread.run(lambda: "goes on") == "goes on"


async def test_an_outcome_is_told_on_the_event_loop() -> None:
    told: asyncio.Future[tuple[object, object]] = asyncio.get_running_loop().create_future()
    async with computing() as thread:
        thread.start(lambda: 7, lambda given, error: told.set_result((given, error)))
        assert await told == (7, None)


async def test_who_gave_up_is_told_nothing() -> None:
    may_go_on = Event()
    async with computing() as thread:
        waiting = thread.run(lambda: may_go_on.wait(PATIENCE))
        waiting.cancel()
        may_go_on.set()
        assert await thread.run(lambda: "goes on") == "goes on"


async def test_closing_lets_what_runs_end_and_fails_what_waits() -> None:
    may_go_on, has_begun = Event(), Event()

    def work() -> str:
        has_begun.set()
        may_go_on.wait(PATIENCE)
        return "done"

    async with computing() as thread:
        running = thread.run(work)
        await asyncio.to_thread(has_begun.wait, PATIENCE)
        waiting = thread.run(lambda: pytest.fail("was closed before"))
        thread.close()
        thread.close()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        may_go_on.set()
        assert await running == "done"
        with pytest.raises(RuntimeError):
            thread.run(lambda: None)


async def test_a_thread_that_nobody_has_any_more_ends() -> None:
    thread = ComputeThread()
    assert await thread.run(lambda: 1) == 1
    inner = thread._thread
    del thread
    gc.collect()
    await asyncio.to_thread(inner.join, PATIENCE)
    assert not inner.is_alive()


def test_the_interpreter_waits_for_what_is_computed_and_for_no_more() -> None:
    program = """
import asyncio, time
from swarm.blocks.compute_thread import ComputeThread

async def main():
    global idle, busy
    idle, busy = ComputeThread(), ComputeThread()
    await idle.run(lambda: None)
    busy.run(lambda: (time.sleep(0.5), print("computed")))

asyncio.run(main())
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "computed\n", "")


@in_virtual_time
async def test_a_virtual_clock_waits_for_it() -> None:
    async with computing() as thread:
        assert await asyncio.wait_for(thread.run(lambda: time.sleep(0.05) or "in time"), 1e-3) == "in time"
