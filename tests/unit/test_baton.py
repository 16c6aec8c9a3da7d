"""What a task waits for and goes on with at once: who runs first, errors, and giving up."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest
import uvloop

from swarm.baton import Baton, Bell

PATIENCE = 5.0


def told_by(baton: "Baton[str]", told: list[str]) -> "asyncio.Task[None]":
    """A task that tells what it was given, and as whom it runs."""

    async def wait() -> None:
        told.append(await baton)
        task = asyncio.current_task()
        assert task is not None
        told.append(task.get_name())

    return asyncio.create_task(wait(), name="waiter")


async def test_given_by_a_callback_it_is_taken_up_within_it() -> None:
    baton, told = Baton[str](), list[str]()
    waiter = told_by(baton, told)

    def give() -> None:
        baton.set_result("given")
        told.append("given back")

    asyncio.get_running_loop().call_soon(give)
    await waiter
    assert told == ["given", "waiter", "given back"]


async def test_given_by_a_task_it_is_taken_up_after_that() -> None:
    baton, told = Baton[str](), list[str]()
    waiter = told_by(baton, told)
    await asyncio.sleep(0)
    baton.set_result("given")
    told.append("giver")
    await waiter
    assert told == ["giver", "given", "waiter"]


async def test_what_failed_is_raised_a_turn_later() -> None:
    baton, told = Baton[str](), list[str]()
    waiter = told_by(baton, told)

    def fail() -> None:
        baton.set_exception(ZeroDivisionError())
        assert not waiter.done()

    asyncio.get_running_loop().call_soon(fail)
    with pytest.raises(ZeroDivisionError):
        await waiter
    assert not told


async def test_what_is_there_already_is_not_waited_for() -> None:
    baton = Baton[str]()
    baton.set_result("given")
    assert await baton == "given"


async def test_who_gave_up_waiting_is_given_nothing() -> None:
    baton, told = Baton[str](), list[str]()
    waiter = told_by(baton, told)
    await asyncio.sleep(0)
    waiter.cancel()
    assert baton.cancelled()
    assert not waiter.done()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert not told


async def test_a_deadline_ends_the_waiting() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await Baton[str]()


async def test_a_bell_is_heard_by_who_waits_and_by_who_comes_later() -> None:
    bell, heard = Bell(), list[str]()

    async def hear() -> None:
        for ring in ("first", "second"):
            await bell.wait()
            bell.clear()
            heard.append(ring)

    async with asyncio.timeout(PATIENCE):
        bell.set()
        hearing = asyncio.create_task(hear())
        await asyncio.sleep(0)
        assert (heard, bell.is_set) == (["first"], False)
        asyncio.get_running_loop().call_soon(bell.set)
        await hearing
        assert heard == ["first", "second"]
        bell.set()
        bell.set()
    assert bell.is_set


async def test_a_bell_rings_for_nobody_after_the_waiting_was_cancelled() -> None:
    bell = Bell()
    waiting = asyncio.create_task(bell.wait())
    await asyncio.sleep(0)
    waiting.cancel()
    bell.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await bell.wait()


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_a_task_that_ends_the_process_ends_the_loop(run: Callable[[Coroutine[Any, Any, None]], None]) -> None:
    async def end() -> None:
        baton = Baton[None]()

        def give() -> None:
            with suppress(SystemExit):
                baton.set_result(None)

        asyncio.get_running_loop().call_soon(give)
        await baton
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        run(end())
