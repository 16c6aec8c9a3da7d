import asyncio
import threading
import time

import pytest

from swarm.net import virtual_time
from swarm.net.virtual_time import Deadlock, in_virtual_time


def loop() -> virtual_time.VirtualTimeLoop:
    running = asyncio.get_running_loop()
    assert isinstance(running, virtual_time.VirtualTimeLoop)
    return running


@in_virtual_time
async def test_an_hour_takes_no_time():
    began = time.monotonic()
    epoch = loop().now()
    await asyncio.sleep(3600)
    assert loop().time() == pytest.approx(3600)
    assert loop().now() - epoch == pytest.approx(3600)
    assert time.monotonic() - began < 1


@in_virtual_time
async def test_timers_fire_in_order():
    fired = []

    async def wait(seconds):
        await asyncio.sleep(seconds)
        fired.append((seconds, loop().time()))

    await asyncio.gather(*(wait(seconds) for seconds in (30, 10, 20)))
    assert fired == [(10, 10), (20, 20), (30, 30)]


@in_virtual_time
async def test_timeouts_fire():
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(50):
            await asyncio.sleep(100)
    assert loop().time() == pytest.approx(50)


@in_virtual_time
async def test_the_clock_stands_while_a_job_runs():
    timer = asyncio.create_task(asyncio.sleep(5))
    await loop().run_in_executor(None, time.sleep, 0.05)
    assert loop().time() == 0
    assert not timer.done()
    await timer
    assert loop().time() == 5


@in_virtual_time
async def test_the_clock_stands_while_a_foreign_thread_works():
    answer = loop().create_future()
    thread = threading.Timer(0.05, loop().call_soon_threadsafe, (answer.set_result, 1))
    thread.start()
    with loop().outside_work():
        assert await answer == 1
    assert loop().time() == 0


def test_a_deadlock_is_an_error_and_names_who_waits():
    async def main():
        asyncio.current_task().set_name("the one who waits")
        await asyncio.Event().wait()

    with pytest.raises(Deadlock, match="the one who waits"):
        virtual_time.run(main())


def test_a_run_ends_after_a_job():
    async def main():
        return await asyncio.to_thread(lambda: 7)

    assert virtual_time.run(main()) == 7
