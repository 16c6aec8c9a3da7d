"""Servers that are allowed several models: whole lives with fake engines, on a virtual clock."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace

import pytest

from swarm.dht.announcement import Announcement, ModelEntry
from swarm.dht.directory import list_peers
from swarm.dht.joining import Network
from swarm.errors import InputError
from swarm.net import messages
from swarm.net.transport import Transport
from swarm.net.virtual_time import in_virtual_time
from swarm.server.arranging import CALM
from swarm.server.cell import OnProgress
from swarm.server.lives import Lives
from swarm.server.server import Server, Shard
from swarm.server.switching import HURRY, LOOK_PERIOD
from swarm.spans import Span
from tests.fake_engine import FakeEngine
from tests.server_swarm import MODEL, Recorded, World, heard, opened

OTHER = ModelEntry(model_id="n", name="other", num_blocks=6, fingerprint="g")
ALL = Span(0, 6)
LOADING = 10.0
GONE = 31.0
"""Seconds after which nobody takes a dead server for one that serves."""

SWITCHED = HURRY[1] + 2 * LOOK_PERIOD + LOADING
"""Seconds within which a server serves the model that lacks it."""


async def load(span: Span, on_progress: OnProgress, *, kv_tokens: int | None = None) -> FakeEngine:
    await asyncio.sleep(5)
    return FakeEngine()


@dataclass(frozen=True)
class Choosing:
    """A server while it runs, and what is seen of it."""

    transport: Transport
    events: Recorded


def shard(model: ModelEntry, span: Span = ALL, *, is_fixed: bool = False) -> Shard:
    return Shard(model, 3, span, load, is_fixed=is_fixed)


def network_of(world: World, name: str) -> Network:
    transport = world.network.transport(name)
    return Network(transport.identity, transport, world.store.another())


@asynccontextmanager
async def choosing(world: World, name: str, *models: ModelEntry) -> AsyncIterator[Choosing]:
    """A server that may serve all blocks of any of these `models`."""
    network, events, stop = network_of(world, name), Recorded(), asyncio.Event()
    lives = Lives([shard(model) for model in models], network, lambda index: events, name=name)
    async with network.transport:
        running = asyncio.create_task(lives.run(stop, asyncio.Event()))
        try:
            yield Choosing(network.transport, events)
        finally:
            stop.set()
            async with asyncio.timeout(60):
                await running


@asynccontextmanager
async def fixed(
    world: World, model: ModelEntry, *names: str, spans: Sequence[Span] = (ALL,)
) -> AsyncIterator[None]:
    """Servers of that model, which never move; the spans go round."""
    async with AsyncExitStack() as stack:
        for number, name in enumerate(names):
            network = network_of(world, name)
            await stack.enter_async_context(network.transport)
            span = spans[number % len(spans)]
            server = Server(shard(model, span, is_fixed=True), network, Recorded(), name=name)
            task = asyncio.create_task(server.run(asyncio.Event()))
            stack.push_async_callback(asyncio.gather, task, return_exceptions=True)
            stack.callback(task.cancel)
        yield


async def listed(world: World, model: ModelEntry) -> dict[str, Announcement]:
    return {one.name: one for one in await list_peers(world.store, model)}


async def serving(world: World, model: ModelEntry) -> set[str]:
    return {name for name, one in (await listed(world, model)).items() if one.state == "serving"}


@in_virtual_time
async def test_a_newcomer_takes_the_model_that_lacks_blocks() -> None:
    world = World()
    async with fixed(world, MODEL, "bob"):
        await asyncio.sleep(LOADING)
        async with choosing(world, "alice", MODEL, OTHER) as alice:
            await asyncio.sleep(LOADING)
            assert await serving(world, OTHER) == {"alice"}
            assert alice.events.seen[1] == ("model", "other")


@in_virtual_time
async def test_it_goes_on_with_another_model_that_lacks_it_and_is_seen_to_leave_once() -> None:
    world = World()
    async with choosing(world, "alice", MODEL, OTHER) as alice:
        await asyncio.sleep(3 * SWITCHED)
        assert await serving(world, MODEL) == {"alice"}, "nobody else has its blocks"
        async with fixed(world, MODEL, "bob"):
            for _ in range(int(SWITCHED + LOADING)):
                await asyncio.sleep(1)
                assert await serving(world, MODEL)
            assert await serving(world, OTHER) == {"alice"}
            assert await serving(world, MODEL) == {"bob"}
    names = [name for name, _ in alice.events.seen]
    assert names[:2] == ["listening", "model"]
    assert (names.count("listening"), names.count("left"), names[-1]) == (1, 1, "left")
    going = names.index("model", 2)
    assert [name for name in names[going:] if name != "joining"][:3] == ["model", "draining", "serving"]


async def fail_to_load(span: Span, on_progress: OnProgress, *, kv_tokens: int | None = None) -> FakeEngine:
    await asyncio.sleep(5)
    raise InputError("The weights are damaged.")


@in_virtual_time
async def test_where_a_model_cannot_be_loaded_another_one_is_served() -> None:
    world, events, stop = World(), Recorded(), asyncio.Event()
    network = network_of(world, "alice")
    shards = [replace(shard(MODEL), load=fail_to_load), shard(OTHER)]
    async with network.transport:
        lives = Lives(shards, network, lambda index: events, name="alice")
        running = asyncio.create_task(lives.run(stop, asyncio.Event()))
        await asyncio.sleep(2 * LOADING)
        assert (await serving(world, MODEL), await serving(world, OTHER)) == (set(), {"alice"})
        async with fixed(world, OTHER, "bob"):
            await asyncio.sleep(3 * SWITCHED)
            assert "alice" in await serving(world, OTHER), "it does not try again soon what has failed"
            stop.set()
            await running
    models = [event[1] for event in events.seen if event[0] == "model"]
    assert models == [MODEL.name, OTHER.name]
    assert [name for name, *_ in events.seen].count("left") == 1


@in_virtual_time
async def test_where_no_model_can_be_loaded_the_last_reason_is_told() -> None:
    world, events = World(), Recorded()
    network = network_of(world, "alice")
    shards = [replace(shard(model), load=fail_to_load) for model in (MODEL, OTHER)]
    async with network.transport:
        lives = Lives(shards, network, lambda index: events, name="alice")
        with pytest.raises(ExceptionGroup) as caught:
            await lives.run(asyncio.Event(), asyncio.Event())
    assert caught.group_contains(InputError, match="The weights are damaged.", depth=2)


@pytest.mark.parametrize("attempt", range(5))
@in_virtual_time
async def test_of_several_that_mean_to_go_at_once_one_does(
    attempt: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swarm.server.switching.HURRY", (15.0, 15.0))
    world, names = World(), [f"{attempt} {number}" for number in range(3)]
    doomed = [f"doomed {number}" for number in range(4)]
    async with fixed(world, MODEL, "bob"), fixed(world, OTHER, *doomed), AsyncExitStack() as stack:
        await asyncio.sleep(LOADING)
        for name in names:
            await stack.enter_async_context(choosing(world, name, MODEL, OTHER))
        await asyncio.sleep(2 * LOADING)
        assert await serving(world, MODEL) == {"bob", *names}
        for name in doomed:
            world.network.kill(name)
        await asyncio.sleep(GONE)
        for _ in range(int(2 * SWITCHED)):
            await asyncio.sleep(0.5)
            if await serving(world, OTHER):
                break
        here, (there,) = await listed(world, MODEL), await listed(world, OTHER)
        assert here.keys() == {"bob", *names} - {there}
        assert all(one.goes_to is None and not one.undecided for one in here.values())


@in_virtual_time
async def test_it_goes_where_the_weaker_model_then_carries_more_once_that_has_lasted() -> None:
    world = World()
    async with choosing(world, "alice", MODEL, OTHER), fixed(world, OTHER, "dave"):
        await asyncio.sleep(LOADING)
        assert await serving(world, MODEL) == {"alice"}
        async with fixed(world, MODEL, "bob", "carol"):
            await asyncio.sleep(CALM[0])
            assert await serving(world, MODEL) == {"alice", "bob", "carol"}
            await asyncio.sleep(CALM[1] + SWITCHED)
            assert await serving(world, OTHER) == {"alice", "dave"}


@in_virtual_time
async def test_its_sessions_are_asked_to_go_elsewhere_first() -> None:
    world = World()
    async with choosing(world, "alice", MODEL, OTHER) as alice:
        await asyncio.sleep(LOADING)
        async with fixed(world, MODEL, "bob"):
            client = await opened(world, alice)
            assert isinstance(await heard(client, 2 * SWITCHED), messages.Leaving)
            client.close()
            await asyncio.sleep(SWITCHED)
            assert await serving(world, OTHER) == {"alice"}
