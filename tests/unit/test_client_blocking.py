"""The library without async: from a plain thread, where a loop already runs, and with Ctrl-C."""

import asyncio
import gc
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from swarm.client.blocking import BlockingSwarm, LoopThread
from swarm.client.facade import Swarm
from swarm.errors import InputError, SwarmError
from swarm.spans import Span
from tests.toy_swarm import Toy, toy_swarm

THREE = {"a": Span(0, 2), "b": Span(2, 4), "c": Span(4, 6)}


@pytest.fixture
def toys() -> list[Toy]:
    return []


@pytest.fixture
def swarm(toys: list[Toy]) -> Iterator[BlockingSwarm]:
    stack = AsyncExitStack()

    async def joined() -> Swarm:
        toys.append(await stack.enter_async_context(toy_swarm(THREE)))
        return toys[0].swarm

    with BlockingSwarm(joined) as swarm:
        yield swarm
        swarm._thread.run(stack.aclose())


def test_generate_stream_chat_route_and_peers(swarm: BlockingSwarm, toys: list[Toy]) -> None:
    expected = bytes(toys[0].ends.expected(list(b"hi"), 6)).decode()
    assert swarm.generate("hi", raw=True, max_new_tokens=6).text == expected
    stream = swarm.stream("hi", raw=True, max_new_tokens=6)
    assert "".join(stream) == expected
    assert stream.generation is not None
    chat = swarm.chat(max_new_tokens=3)
    assert len("".join(chat.ask("one"))) == 3
    assert len(chat.ask("two").result().token_ids) == 3
    assert len(toys[0]["a"].opened) == 3
    assert len(chat.messages) == 4
    chat.reset()
    assert chat.messages == []
    chat.close()
    assert [hop.span for hop in swarm.route().hops] == list(THREE.values())
    assert len(swarm.peers()) == 3


async def test_works_where_a_loop_already_runs(swarm: BlockingSwarm) -> None:
    assert asyncio.get_running_loop().is_running()
    assert len(swarm.generate("hi", raw=True, max_new_tokens=2).token_ids) == 2


def test_leaving_an_iteration_early_gives_the_answer_up(swarm: BlockingSwarm, toys: list[Toy]) -> None:
    stream = swarm.stream("hi", raw=True, max_new_tokens=500)
    for _ in stream:
        break
    stream.close()
    assert stream.generation is None
    assert toys[0]["a"].tokens_stepped < 100
    assert len(swarm.generate("hi", raw=True, max_new_tokens=2).token_ids) == 2


def test_errors_come_through(swarm: BlockingSwarm) -> None:
    with pytest.raises(InputError):
        swarm.generate("hi", raw=True, temperature=-1)


def test_ctrl_c_cancels_the_work_and_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    thread = LoopThread()
    started, cleaned = threading.Event(), threading.Event()

    async def work() -> None:
        started.set()
        try:
            await asyncio.sleep(60)
        finally:
            cleaned.set()

    def interrupted(future: object) -> None:
        assert started.wait(5)
        raise KeyboardInterrupt

    monkeypatch.setattr("concurrent.futures.Future.result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        thread.run(work())
    assert cleaned.is_set()
    monkeypatch.undo()
    thread.close()


def test_a_failed_joining_leaves_no_thread() -> None:
    async def fails() -> Swarm:
        raise InputError("There is no peer to join by.")

    before = threading.active_count()
    with pytest.raises(InputError):
        BlockingSwarm(fails)
    assert threading.active_count() == before


def test_closed_says_so(toys: list[Toy]) -> None:
    thread = LoopThread()
    thread.close()
    thread.close()
    with pytest.raises(SwarmError, match="closed"):
        thread.call(lambda: 1)


class Leaving:
    """In place of a swarm: notes that it is closed."""

    def __init__(self) -> None:
        self.is_closed = threading.Event()

    async def close(self) -> None:
        await asyncio.sleep(0)
        self.is_closed.set()


def test_what_is_begun_as_the_loop_closes_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    thread, left = LoopThread(), Leaving()
    thread.close()
    monkeypatch.setattr(LoopThread, "is_alive", True)
    for is_last in (False, True):
        thread.start(left.close(), is_last=is_last)
    assert not left.is_closed.is_set()


def test_a_client_that_nobody_holds_leaves() -> None:
    left: Any = Leaving()

    async def joined() -> Swarm:
        return left  # type: ignore[no-any-return]

    swarm = BlockingSwarm(joined)
    thread = swarm.thread
    del swarm
    gc.collect()
    assert left.is_closed.wait(5)
    thread._thread.join(5)
    assert not thread.is_alive
    thread.start(left.close())
