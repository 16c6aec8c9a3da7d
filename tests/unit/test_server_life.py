"""A server's whole life: in-process network, records in memory, a fake engine, a virtual clock."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable

import pytest

from swarm.dht.directory import list_models
from swarm.dht.store import StoreUnreachable
from swarm.errors import InputError, SwarmError
from swarm.net import messages
from swarm.net.calls import MessageStream
from swarm.net.transport import TransportError
from swarm.net.virtual_time import in_virtual_time
from swarm.server.cell import OnProgress
from swarm.server.evicting import evict_on_request, evict_when_idle, requests
from swarm.server.server import DRAIN_PATIENCE, DRAIN_TIMEOUT
from swarm.server.stopping import LEAVE_TIMEOUT, unless
from swarm.spans import Span
from tests.fake_engine import FakeEngine
from tests.server_swarm import MODEL, World, heard, opened, refused, step


@in_virtual_time
async def test_a_life_in_order() -> None:
    world = World()
    async with world.server("alice") as life:
        await asyncio.sleep(0.1)
        (joining,) = await world.listed()
        assert (joining.state, joining.progress, joining.span) == ("joining", 0.0, Span(0, 3))
        assert joining.name == "alice"
        assert joining.addresses == tuple(await life.transport.addresses())
        await asyncio.sleep(6)
        (joining,) = await world.listed()
        assert (joining.state, joining.progress) == ("joining", 0.5)
        await asyncio.sleep(5)
        (serving,) = await world.listed()
        assert (serving.state, serving.dtype, serving.kv_tokens_left) == ("serving", "float16", 1000)
        assert serving.throughput.decode == 100.0
        assert await list_models(world.store) == [MODEL]
        await life.leave()
        assert await world.states() == []
        assert [name for name, _ in life.events.seen] == [
            "listening",
            *["joining"] * 3,
            "serving",
            "draining",
            "left",
        ]
        assert world.engines["alice"].is_closed


@in_virtual_time
async def test_it_stays_listed_for_an_hour_and_tells_of_free_memory() -> None:
    world = World()
    async with world.server("alice") as life:
        await asyncio.sleep(12)
        client = await opened(world, life)
        await asyncio.sleep(4)
        assert [peer.kv_tokens_left for peer in await world.listed()] == [980]
        client.close()
        await asyncio.sleep(3600)
        assert [peer.kv_tokens_left for peer in await world.listed()] == [1000]


@in_virtual_time
async def test_it_announces_the_round_trips_to_holders_of_the_next_block() -> None:
    world = World()
    world.network.set_link("alice", "bob", latency=0.05)
    async with world.server("alice", Span(0, 3)) as alice, world.server("bob", Span(2, 6)) as bob:
        async with world.server("carol", Span(4, 6)):
            await asyncio.sleep(40)
            by_name = {peer.name: peer for peer in await world.listed()}
            assert by_name["alice"].rtts == {bob.transport.peer: pytest.approx(0.1)}
            assert by_name["bob"].rtts == {}
        assert alice.server.cell.phase == "serving"


@in_virtual_time
async def test_leaving_serves_the_sessions_it_has_until_they_have_gone() -> None:
    world = World()
    async with world.server("alice") as life:
        await asyncio.sleep(12)
        client = await opened(world, life)
        world.engines["alice"].seconds = 2.0
        await client.send(step(1), bytes(12))
        await asyncio.sleep(0.5)
        life.stop.set()
        assert await heard(client) == messages.Leaving(session_id="1" * 32)
        assert await world.states() == ["draining"]
        assert (await refused(opened(world, life, "late"))).code == "draining"
        assert isinstance(await heard(client), messages.Result)
        answer, _ = await client.call(step(2, 1), bytes(12), timeout=10, max_body=100)
        assert isinstance(answer, messages.Result)
        assert not life.task.done()
        await client.call(messages.Close(session_id="1" * 32), timeout=5)
        await asyncio.sleep(0.5)
        assert life.task.done()
        assert await world.states() == []


@in_virtual_time
async def test_leaving_waits_for_answers_that_go_on_as_nobody_else_takes_them() -> None:
    world = World()
    async with world.server("alice") as life:
        await asyncio.sleep(12)
        client = await opened(world, life)
        life.stop.set()
        assert isinstance(await heard(client), messages.Leaving)
        for position in range(4):
            await asyncio.sleep(DRAIN_PATIENCE - 0.5)
            await client.call(step(position + 1, position), bytes(12), timeout=5, max_body=100)
        assert not life.task.done()
        await asyncio.sleep(2 * DRAIN_PATIENCE + 1.0)
        assert life.task.done(), "but not for one that says nothing more"


@in_virtual_time
async def test_leaving_waits_for_a_session_that_is_being_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swarm.server.hand_over.PIECE_BYTES", 1)
    world = World()
    async with world.server("alice") as alice, world.server("bob") as bob:
        await asyncio.sleep(12)
        client = await opened(world, alice)
        target = MessageStream(await world.network.transport("target").open_stream(bob.transport.peer))
        there = messages.Open(session_id="2" * 32, model_id="m", start=0, end=3, max_tokens=20)
        await target.call(there, timeout=5)
        await client.call(step(), bytes(12), timeout=5, max_body=100)
        world.engines["alice"].seconds = 12.0
        alice.stop.set()
        await heard(client)
        asked = messages.HandOver(
            session_id="1" * 32, peer=bob.transport.peer, addresses=(), to_session="2" * 32
        )
        answer, _ = await client.call(asked, timeout=30)
        assert answer == messages.HandedOver(session_id="1" * 32, tokens=1)
        assert world.engines["bob"].lengths == {"2" * 32: 1}
        assert not alice.task.done()
        client.close()
        await asyncio.sleep(0.5)
        assert alice.task.done()


@in_virtual_time
async def test_leaving_waits_neither_for_a_long_step_nor_for_unreachable_records() -> None:
    world = World()
    async with world.server("alice") as life:
        await asyncio.sleep(12)
        client = await opened(world, life)
        world.engines["alice"].seconds = 1000.0
        running = asyncio.create_task(client.call(step(), bytes(12), timeout=1e4))
        await asyncio.sleep(0.5)
        life.store.reachable = False
        started = asyncio.get_running_loop().time()
        await life.leave()
        assert asyncio.get_running_loop().time() - started <= DRAIN_PATIENCE + 0.1
        assert (await asyncio.gather(running, return_exceptions=True))[0] is not None


@in_virtual_time
async def test_leaving_does_not_last_for_ever_while_sessions_go_slowly() -> None:
    world = World()
    async with world.server("alice") as life:
        await asyncio.sleep(12)
        transport = world.network.transport("client")
        clients = []
        for number in range(20):
            client = MessageStream(await transport.open_stream(life.transport.peer))
            asked = messages.Open(session_id=f"{number:032x}", model_id="m", start=0, end=3, max_tokens=20)
            await client.call(asked, timeout=5)
            clients.append(client)
        life.stop.set()
        for client in clients[:9]:
            await asyncio.sleep(3.0)
            client.close()
        assert not life.task.done()
        for client in clients[9:11]:
            await asyncio.sleep(3.0)
            client.close()
        assert life.task.done()
        assert DRAIN_TIMEOUT < LEAVE_TIMEOUT, "or the process would end in the middle of it"


@in_virtual_time
async def test_leaving_while_loading() -> None:
    world = World()
    async with world.server("alice") as life:
        await asyncio.sleep(6)
        await life.leave()
        assert await world.states() == []
        assert [name for name, _ in life.events.seen] == ["listening", "joining", "joining", "left"]


@in_virtual_time
async def test_a_shard_that_cannot_be_loaded_is_withdrawn() -> None:
    async def fail(span: Span, on_progress: OnProgress) -> FakeEngine:
        await asyncio.sleep(1)
        raise InputError("The file is cut short.")

    world = World()
    async with world.server("alice", load=fail) as life:
        await asyncio.sleep(0.5)
        assert await world.states() == ["joining"]
        assert isinstance((await caught(life.task)), InputError)
        assert await world.states() == []


@in_virtual_time
async def test_evicted_it_is_announced_asleep_and_loads_again_for_the_next_session() -> None:
    world = World()
    async with world.server("alice") as life:
        await asyncio.sleep(12)
        client = await opened(world, life)
        await life.server.evict()
        await asyncio.sleep(1)
        (asleep,) = await world.listed()
        assert (asleep.state, asleep.asleep, asleep.progress) == ("joining", True, 0.0)
        assert (asleep.kv_tokens_left, asleep.dtype) == (0, "float16")
        assert world.engines["alice"].is_closed
        await asyncio.sleep(500)
        assert [peer.asleep for peer in await world.listed()] == [True]
        assert (await refused(client.call(step(), bytes(12), timeout=5))).code == "unknown_session"
        error = await refused(opened(world, life, "client2"))
        assert error.code == "warming_up"
        await asyncio.sleep(1)
        (joining,) = await world.listed()
        assert (joining.state, joining.asleep) == ("joining", False)
        await asyncio.sleep(10)
        (serving,) = await world.listed()
        assert (serving.state, serving.asleep, serving.progress) == ("serving", False, 1.0)
        await opened(world, life, "client3")
        assert [name for name, _ in life.events.seen] == [
            "listening",
            *["joining"] * 3,
            "serving",
            "asleep",
            *["joining"] * 3,
            "serving",
        ]


@in_virtual_time
async def test_evicting_what_is_not_serving_does_nothing() -> None:
    world = World()
    async with world.server("alice") as life:
        await life.server.evict()
        await asyncio.sleep(1)
        await life.server.evict()
        await asyncio.sleep(11)
        assert await world.states() == ["serving"]
        await asyncio.gather(life.server.evict(), life.server.evict())
        await life.leave()
        await life.server.evict()
        assert [name for name, _ in life.events.seen][-3:] == ["serving", "asleep", "left"]


@in_virtual_time
async def test_a_reload_that_fails_ends_the_server_with_its_reason() -> None:
    engines = iter([FakeEngine()])

    async def once(span: Span, on_progress: OnProgress) -> FakeEngine:
        for engine in engines:
            return engine
        raise InputError("The file is gone.")

    world = World()
    async with world.server("alice", load=once) as life:
        await asyncio.sleep(1)
        await life.server.evict()
        await refused(opened(world, life))
        assert isinstance((await caught(life.task)), InputError)
        assert await world.states() == []


@in_virtual_time
async def test_a_server_is_evicted_after_serving_for_long_without_a_session() -> None:
    world = World()
    async with world.server("alice") as life:
        idling = asyncio.create_task(evict_when_idle(life.server, 60.0))
        await asyncio.sleep(10 + 59)
        assert await world.states() == ["serving"]
        client = await opened(world, life)
        await asyncio.sleep(500)
        assert await world.states() == ["serving"]
        client.close()
        await asyncio.sleep(59)
        assert not life.server.cell.is_asleep
        await asyncio.sleep(2)
        assert life.server.cell.is_asleep
        await refused(opened(world, life, "client2"))
        await asyncio.sleep(10 + 59)
        assert life.server.cell.phase == "serving"
        await asyncio.sleep(2)
        assert life.server.cell.is_asleep
        idling.cancel()


@in_virtual_time
async def test_a_closed_session_is_none_though_its_stream_stays() -> None:
    world = World()
    async with world.server("alice") as life:
        idling = asyncio.create_task(evict_when_idle(life.server, 60.0))
        await asyncio.sleep(12)
        client = await opened(world, life)
        await asyncio.sleep(100)
        await client.call(messages.Close(session_id="1" * 32), timeout=5)
        await asyncio.sleep(59)
        assert not life.server.cell.is_asleep
        await asyncio.sleep(2)
        assert life.server.cell.is_asleep
        idling.cancel()


@in_virtual_time
async def test_each_request_evicts_once_and_one_in_vain_is_forgotten() -> None:
    world = World()
    async with world.server("alice") as life:
        asked = asyncio.Event()
        evicting = asyncio.create_task(evict_on_request(life.server, asked))
        await asyncio.sleep(5)
        asked.set()
        await asyncio.sleep(10)
        assert life.server.cell.phase == "serving"
        asked.set()
        await asyncio.sleep(1)
        assert life.server.cell.is_asleep
        await refused(opened(world, life))
        await asyncio.sleep(12)
        assert life.server.cell.phase == "serving"
        evicting.cancel()


def test_the_signal_sets_the_event_and_later_does_no_harm() -> None:
    async def ask() -> None:
        with requests() as asked:
            os.kill(os.getpid(), signal.SIGUSR1)
            async with asyncio.timeout(5):
                await asked.wait()
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.getsignal(signal.SIGUSR1)
    try:
        asyncio.run(ask())
    finally:
        signal.signal(signal.SIGUSR1, before)


@in_virtual_time
async def test_a_network_that_fails_ends_the_server_with_its_reason() -> None:
    world = World()
    async with world.server("alice") as life:
        await asyncio.sleep(12)
        world.network.kill("alice")
        assert isinstance(await caught(life.task), TransportError)
        assert world.engines["alice"].is_closed


@in_virtual_time
async def test_a_server_that_cannot_be_listed_ends() -> None:
    world = World()
    life = world.server("alice")
    life.store.reachable = False
    async with life:
        assert isinstance(await caught(life.task), StoreUnreachable)


@in_virtual_time
async def test_records_that_cannot_be_written_for_a_while_do_not_end_it() -> None:
    world = World()
    async with world.server("alice") as life:
        await asyncio.sleep(12)
        life.store.reachable = False
        await asyncio.sleep(100)
        assert await world.states() == []
        life.store.reachable = True
        await asyncio.sleep(10)
        assert await world.states() == ["serving"]


@pytest.mark.parametrize("at", [0.0, 0.05, 3.0, 11.0, 13.0])
@in_virtual_time
async def test_being_cancelled_at_any_time_withdraws(at: float) -> None:
    world = World()
    async with world.server("alice") as life:
        await asyncio.sleep(at)
        life.task.cancel()
        await asyncio.gather(life.task, return_exceptions=True)
        assert await world.states() == []


@in_virtual_time
async def test_unless_gives_the_result_the_error_or_nothing() -> None:
    asked = asyncio.Event()

    async def after(seconds: float, end: Callable[[], Awaitable[int]] | None = None) -> int:
        await asyncio.sleep(seconds)
        if end:
            raise InputError("no")
        return 7

    assert await unless(asked, after(1)) == 7
    with pytest.raises(InputError):
        await unless(asked, after(1, asyncio.sleep))  # type: ignore[arg-type]
    asyncio.get_running_loop().call_later(1, asked.set)
    assert await unless(asked, after(1e6)) is None


async def caught(task: "asyncio.Task[None]") -> BaseException:
    """The one error that ended `task`."""
    (error,) = await asyncio.gather(task, return_exceptions=True)
    while isinstance(error, BaseExceptionGroup):
        (error,) = error.exceptions
    assert isinstance(error, SwarmError)
    return error
