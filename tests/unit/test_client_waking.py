"""Servers that sleep are woken and waited for; where there is too little room, less or later is asked for."""

import asyncio
from typing import Any

import pytest

from swarm.client.faults import NoCapacity
from swarm.client.route import NoRoute
from swarm.client.terminal import waiting_reporter
from swarm.dht.announcement import Throughput
from swarm.errors import SwarmError
from swarm.net import messages
from swarm.net.messages import Open
from swarm.net.virtual_time import in_virtual_time
from swarm.spans import Span
from tests.toy_swarm import Toy, ToyServer, toy_swarm

THREE = {"a": Span(0, 2), "b": Span(2, 4), "c": Span(4, 6)}
REPLICA = {**THREE, "spare": Span(2, 4)}
AWAKE = 8.0


def warming_up(retry_after: float | None = 3.0) -> messages.Error:
    return messages.Error(code="warming_up", message="loading", retry_after=retry_after)


def no_room(retry_after: float | None = None) -> messages.Error:
    return messages.Error(code="no_capacity", message="full", retry_after=retry_after)


class Sleeper:
    """Puts servers to sleep: one serves `AWAKE` seconds after it was asked, and announces what it does."""

    def __init__(self, toy: Toy):
        self._toy = toy
        self.tasks = asyncio.TaskGroup()

    async def put(self, *names: str, is_announced: bool = True) -> None:
        for name in names:
            server = self._toy[name]
            server.refuse = Refusing(self, server)
            if is_announced:
                await self._toy.announce(name, state="joining", progress=0.0, asleep=True, kv_tokens_left=0)
        await self._toy.swarm.directory.refresh()

    async def wake(self, server: ToyServer) -> None:
        await self._toy.announce(server.name, state="joining", progress=0.0)
        await asyncio.sleep(AWAKE / 2)
        await self._toy.announce(server.name, state="joining", progress=0.5)
        await asyncio.sleep(AWAKE / 2)
        server.refuse = []
        await self._toy.announce(server.name)


class Refusing(list[messages.Error]):
    """What a server that sleeps says to who opens a session; the first of them wakes it."""

    def __init__(self, sleeper: Sleeper, server: ToyServer):
        super().__init__([warming_up()])
        self._sleeper = sleeper
        self._server = server
        self._is_woken = False

    def pop(self, index: Any = -1) -> messages.Error:
        if not self._is_woken:
            self._is_woken = True
            self._sleeper.tasks.create_task(self._sleeper.wake(self._server))
        return self[0]


def now() -> float:
    return asyncio.get_running_loop().time()


@in_virtual_time
async def test_all_that_sleep_are_woken_at_once_and_told(capsys: Any) -> None:
    async with toy_swarm(THREE, on_waiting=waiting_reporter()) as toy:
        sleeper = Sleeper(toy)
        async with sleeper.tasks:
            await sleeper.put("a", "b")
            started = now()
            answer = await toy.swarm.generate("hello", raw=True, max_new_tokens=3)
            assert list(answer.token_ids) == toy.ends.expected(list(b"hello"), 3)
            assert AWAKE <= now() - started < AWAKE + 4
        assert not toy["c"].refused
    err = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("Waking blocks 0:2 at a (…") for line in err) == 1
    assert sum(line.startswith("Waking blocks 2:4 at b (…") for line in err) == 1
    assert "is loading blocks 0 to 1" in err[-1]


@in_virtual_time
async def test_nobody_is_woken_where_somebody_serves_or_loads() -> None:
    async with toy_swarm(REPLICA, timeout=20.0) as toy:
        sleeper = Sleeper(toy)
        async with sleeper.tasks:
            await sleeper.put("spare")
            await toy.swarm.generate("hi", raw=True, max_new_tokens=2)
            await sleeper.put("b")
            await toy.announce("b", state="joining", progress=0.9)
            await toy.swarm.directory.refresh()
            asking = asyncio.create_task(toy.swarm.generate("hi", raw=True, max_new_tokens=2))
            await asyncio.sleep(5.0)
            assert not asking.done()
            toy["b"].refuse = []
            await toy.announce("b")
            assert (await asking).route[1].name == "b"
        assert not toy["spare"].refused


@in_virtual_time
async def test_only_one_of_two_that_sleep_is_woken() -> None:
    async with toy_swarm(REPLICA) as toy:
        sleeper = Sleeper(toy)
        async with sleeper.tasks:
            await sleeper.put("b", "spare")
            await toy.announce("b", state="joining", asleep=True, throughput=Throughput(decode=1000.0))
            await toy.swarm.directory.refresh()
            assert (await toy.swarm.generate("hi", raw=True, max_new_tokens=2)).route[1].name == "b"
        assert toy["b"].refused
        assert not toy["spare"].refused


@in_virtual_time
async def test_one_that_sleeps_and_cannot_be_reached_is_passed_over() -> None:
    async with toy_swarm(REPLICA) as toy:
        sleeper = Sleeper(toy)
        async with sleeper.tasks:
            await sleeper.put("b", "spare")
            await toy.announce("b", state="joining", asleep=True, throughput=Throughput(decode=1000.0))
            await toy.swarm.directory.refresh()
            toy.network.kill(toy["b"].identity)
            assert (await toy.swarm.generate("hi", raw=True, max_new_tokens=2)).route[1].name == "spare"


@in_virtual_time
async def test_who_sleeps_although_it_is_announced_as_serving_is_waited_for() -> None:
    async with toy_swarm(THREE) as toy:
        sleeper = Sleeper(toy)
        async with sleeper.tasks:
            await sleeper.put("a", "b", "c", is_announced=False)
            answer = await toy.swarm.generate("hi", raw=True, max_new_tokens=2)
            assert list(answer.token_ids) == toy.ends.expected(list(b"hi"), 2)
            assert now() < 3 * AWAKE


@in_virtual_time
async def test_who_never_wakes_is_given_up_at_the_deadline_and_not_pestered() -> None:
    async with toy_swarm(THREE, timeout=30.0) as toy:
        await toy.announce("b", state="joining", asleep=True)
        await toy.swarm.directory.refresh()
        toy["b"].refuse = [warming_up(5.0)] * 100
        with pytest.raises(NoRoute, match=r"No server serves blocks 2 to 3 of toy: b \(…\w{6}\) is"):
            await toy.swarm.generate("hi", raw=True)
        assert 30.0 <= now() < 32.0
        assert len(toy["b"].refused) <= 8
        assert toy["b"].refused[0].start == 2


@in_virtual_time
async def test_a_gap_that_nobody_fills_wakes_nobody() -> None:
    async with toy_swarm(THREE, timeout=3.0, announced=["a"]) as toy:
        await toy.announce("b", state="joining", asleep=True)
        await toy.swarm.directory.refresh()
        with pytest.raises(NoRoute, match="blocks 2 to 5") as caught:
            await toy.swarm.generate("hi", raw=True)
        assert caught.value.to_wake == ()
        assert not toy["b"].refused
        assert not toy["b"].opened


@in_virtual_time
async def test_one_that_wakes_up_meanwhile_gets_no_session_for_nothing() -> None:
    async with toy_swarm(THREE) as toy:
        await toy.announce("b", state="joining", asleep=True)
        await toy.swarm.directory.refresh()

        async def late() -> None:
            await asyncio.sleep(4.0)
            await toy.announce("b")

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(late())
            await toy.swarm.generate("hi", raw=True, max_new_tokens=2)
        # it was asked about once a second, and each stream given up at once
        assert len(toy["b"].opened) <= 7
        assert len(toy["b"].memory.streams) <= 2


@in_virtual_time
async def test_an_evicted_session_is_opened_anew_without_blame() -> None:
    async with toy_swarm(THREE) as toy:
        chat = toy.swarm.chat(max_new_tokens=3)
        await chat.ask("hi").result()
        toy["b"].refuse_steps = [messages.Error(code="unknown_session", message="evicted")]
        started = now()
        assert (await chat.ask("more").result()).finish_reason == "length"
        assert len(toy["b"].opened) == 2
        assert now() == started


@in_virtual_time
async def test_a_chat_takes_a_smaller_session_where_a_large_one_has_no_room() -> None:
    async with toy_swarm(THREE) as toy:
        toy["b"].refuse = [no_room(30.0)]
        answer = await toy.swarm.chat(max_new_tokens=5).ask("hi").result()
        assert len(answer.token_ids) == 5
        assert now() == 0.0
        assert _asked(toy["b"]) == [len("u:hi\na:") + 5]
        assert toy["b"].refused[0].max_tokens == 2048


@in_virtual_time
async def test_a_chat_takes_a_smaller_session_where_less_is_announced() -> None:
    async with toy_swarm(THREE) as toy:
        await toy.announce("b", kv_tokens_left=100)
        await toy.swarm.directory.refresh()
        chat = toy.swarm.chat(max_new_tokens=5)
        await chat.ask("hi").result()
        assert _asked(toy["b"]) == [len("u:hi\na:") + 5]
        await toy.announce("b")
        await toy.swarm.directory.refresh()
        await chat.ask("and now for something completely different").result()
        assert _asked(toy["b"])[1:] == [2048]


@in_virtual_time
async def test_lasting_lack_of_room_is_waited_out_and_then_said() -> None:
    async with toy_swarm(THREE, timeout=20.0) as toy:
        toy["b"].refuse = [no_room(4.0)] * 4
        await toy.swarm.generate("hi", raw=True, max_new_tokens=2)
        assert 12.0 <= now() < 20.0
        toy["b"].refuse = [no_room(4.0)] * 99
        with pytest.raises((NoRoute, NoCapacity), match="has no room for another session"):
            await toy.swarm.generate("hi", raw=True)


@in_virtual_time
async def test_too_little_announced_room_is_waited_for_without_haste() -> None:
    heard: list[SwarmError] = []
    async with toy_swarm(THREE, timeout=10.0, on_waiting=heard.append) as toy:
        await toy.announce("b", kv_tokens_left=5)
        await toy.swarm.directory.refresh()
        with pytest.raises(NoRoute, match="has room for 5 tokens where 22 are needed"):
            await toy.swarm.generate("hi", raw=True, max_new_tokens=20)
        assert 10.0 <= now() < 12.0
        assert len(heard) <= 12


@in_virtual_time
async def test_peer_that_ends_streams_at_once_is_not_asked_in_haste() -> None:
    async with toy_swarm(THREE, timeout=10.0) as toy:
        tries = 0

        async def hang_up(stream: Any) -> None:
            nonlocal tries
            tries += 1

        await toy["b"].transport.listen(hang_up)
        with pytest.raises(SwarmError, match="closed the connection"):
            await toy.swarm.generate("hi", raw=True)
        assert tries < 40  # pings among them


@in_virtual_time
async def test_step_without_room_is_repeated_with_the_same_names() -> None:
    prompt = "x" * 80
    async with toy_swarm(THREE) as toy:
        for name in ("a", "b"):
            toy[name].refuse_steps = [no_room(2.0), no_room(1.0)]
        answer = await toy.swarm.generate(prompt, raw=True, max_new_tokens=3)
        assert list(answer.token_ids) == toy.ends.expected(list(prompt.encode()), 3)
        assert 3.0 <= now() <= 6.0
        first = [step for step in toy["b"].received if step.seq_pos == 0]
        assert len(first) == 3
        assert len({(step.shape, step.page_keys) for step in first}) == 1
        assert first[0].page_keys
        again = await toy.swarm.generate(prompt, raw=True, max_new_tokens=3)
        assert again.cached_tokens == 64


@pytest.mark.parametrize("retry_after", [None, 1000.0])
@in_virtual_time
async def test_step_without_room_is_not_repeated_in_vain(retry_after: float | None) -> None:
    async with toy_swarm(REPLICA) as toy:
        full = toy[toy.swarm.route().hops[1].announcement.name]
        full.refuse_steps = [no_room(retry_after)]
        answer = await toy.swarm.generate("hi", raw=True, max_new_tokens=2)
        assert list(answer.token_ids) == toy.ends.expected(list(b"hi"), 2)
        assert (answer.recoveries, answer.route[1].name != full.name) == (1, True)
        assert now() == 0.0
        assert len(full.steps) == 1


def _asked(server: ToyServer) -> list[int]:
    return [opened.max_tokens for opened in server.opened if isinstance(opened, Open)]
