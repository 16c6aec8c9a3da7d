"""Servers that choose their blocks and move: real servers with fake engines, on a virtual clock."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import msgspec
import pytest

from swarm.blocks.errors import DoesNotFit
from swarm.dht.announcement import Announcement
from swarm.errors import SwarmError
from swarm.net import messages
from swarm.net.calls import MessageStream
from swarm.net.virtual_time import in_virtual_time
from swarm.server.arranging import CALM, LOOK_PERIOD, PATIENCE, REST
from swarm.server.cell import OnProgress
from swarm.spans import Span
from tests.fake_engine import FakeEngine
from tests.server_swarm import MODEL, Life, World, heard, opened, refused, step

LEFT, RIGHT = Span(0, 3), Span(3, 6)
LOADING = 16.0
"""Seconds within which a server has chosen and loaded its blocks."""

FILLED = 40.0
"""Seconds within which a hole is filled: seen, gone to, and loaded."""

BLOCKS = set(range(MODEL.num_blocks))


def free(world: World, name: str, span: Span = LEFT, load: object = None) -> Life:
    return world.server(name, span, load, is_fixed=False)  # type: ignore[arg-type]


@asynccontextmanager
async def lives(*servers: Life) -> AsyncIterator[None]:
    async with AsyncExitStack() as stack:
        for server in servers:
            await stack.enter_async_context(server)
        yield


@asynccontextmanager
async def right(world: World, count: int = 2) -> AsyncIterator[None]:
    """Servers of the right half, so many that nobody is needed there until they die."""
    async with lives(*(world.server(f"right {number}", RIGHT) for number in range(count))):
        yield


def kill_right(world: World, count: int = 2) -> None:
    for number in range(count):
        world.network.kill(f"right {number}")


async def served(world: World) -> set[int]:
    return {
        block for span, state in (await world.spans()).values() if state == "serving" for block in span.blocks
    }


async def until_whole(world: World, seconds: float) -> None:
    """Return once all blocks are served, which takes `seconds` at most."""
    for _ in range(int(2 * seconds)):
        if await served(world) == BLOCKS:
            return
        await asyncio.sleep(0.5)
    raise AssertionError(f"not all blocks are served: {await world.spans()}")


async def moved(life: Life) -> bool:
    return any(name == "moving" for name, _ in life.events.seen)


@in_virtual_time
async def test_who_starts_at_once_takes_what_the_others_leave() -> None:
    for attempt in range(4):
        world = World()
        servers = [free(world, f"{attempt} {number}", Span(0, 2)) for number in range(3)]
        async with lives(*servers):
            await asyncio.sleep(LOADING + 3)
            assert sorted((await world.spans()).values()) == [
                (Span(0, 2), "serving"),
                (Span(2, 4), "serving"),
                (Span(4, 6), "serving"),
            ]


@in_virtual_time
async def test_a_newcomer_says_where_it_goes_before_it_loads_and_may_still_go_elsewhere() -> None:
    world = World()
    async with free(world, "alice"):
        await asyncio.sleep(0.1)
        (alice,) = await world.listed()
        assert (alice.state, alice.progress, alice.undecided, alice.mobility) == (
            "joining",
            0.0,
            True,
            "settled",
        )
        await asyncio.sleep(3)
        (alice,) = await world.listed()
        assert (alice.state, alice.undecided) == ("joining", False)


@in_virtual_time
async def test_a_newcomer_fills_the_hole() -> None:
    world = World()
    async with world.server("alice", RIGHT):
        await asyncio.sleep(LOADING)
        async with free(world, "bob"):
            await asyncio.sleep(LOADING)
            assert (await world.spans())["bob"] == (LEFT, "serving")


@pytest.mark.parametrize("dies", range(4))
@in_virtual_time
async def test_where_a_server_dies_another_comes_and_nothing_else_is_left(dies: int) -> None:
    world = World()
    names = ["alice", "bob", "carol", "dave"]
    servers = [free(world, name) for name in names]
    async with lives(*servers):
        await asyncio.sleep(LOADING + 3)
        assert await served(world) == BLOCKS
        spans = await world.spans()
        rest = {block for name in names if name != names[dies] for block in spans[name][0].blocks}
        world.network.kill(names[dies])
        for _ in range(int(2 * FILLED)):
            await asyncio.sleep(0.5)
            assert rest <= await served(world)
        assert names[dies] not in await world.spans()
        assert await served(world) == BLOCKS
        movers = [one for one in servers if await moved(one)]
        assert len(movers) == (rest != BLOCKS)


@in_virtual_time
async def test_fixed_servers_stay_whatever_happens() -> None:
    world = World()
    async with world.server("alice", LEFT), world.server("bob", LEFT) as bob:
        async with right(world):
            await asyncio.sleep(LOADING)
            kill_right(world)
            await asyncio.sleep(300)
        assert {span for span, _ in (await world.spans()).values()} == {LEFT}
        assert not await moved(bob)


@in_virtual_time
async def test_nobody_moves_who_is_the_only_one() -> None:
    world = World()
    async with free(world, "alice"), right(world):
        await asyncio.sleep(LOADING)
        assert await served(world) == BLOCKS
        kill_right(world)
        await asyncio.sleep(300)
        assert await world.spans() == {"alice": (LEFT, "serving")}


@in_virtual_time
async def test_a_server_goes_where_the_swarm_then_carries_more_once_that_has_lasted() -> None:
    world = World()
    async with world.server("right", RIGHT), free(world, "alice"):
        await asyncio.sleep(LOADING)
        async with world.server("bob", LEFT), world.server("carol", LEFT) as carol:
            await asyncio.sleep(LOADING + CALM[0] - 2 * LOOK_PERIOD)
            assert (await world.spans())["alice"] == (LEFT, "serving")
            await asyncio.sleep(CALM[1] + LOADING)
            assert (await world.spans())["alice"] == (RIGHT, "serving")
            assert not await moved(carol)


@in_virtual_time
async def test_having_moved_it_rests() -> None:
    world = World()
    async with free(world, "alice"), world.server("right", RIGHT):
        await asyncio.sleep(LOADING)
        async with world.server("bob", LEFT), world.server("carol", LEFT):
            await asyncio.sleep(2 * LOADING + CALM[1])
            assert (await world.spans())["alice"] == (RIGHT, "serving")
            async with world.server("dave", RIGHT), world.server("erin", RIGHT):
                world.network.kill("bob")
                await asyncio.sleep(LOADING + 2 * CALM[1])
                assert (await world.spans())["alice"] == (RIGHT, "serving")
                await asyncio.sleep(REST)
                assert (await world.spans())["alice"] == (LEFT, "serving")


@in_virtual_time
@pytest.mark.parametrize("is_room", [True, False])
async def test_who_has_memory_to_serve_on_goes_although_it_is_the_only_one_of_a_block(is_room: bool) -> None:
    world, asked, kept = World(), [], Span(0, 4)

    async def fits_beside(span: Span, kv_tokens: int) -> bool:
        asked.append(span)
        return is_room

    alice = world.server("alice", kept, is_fixed=False, fits_beside=fits_beside)
    async with world.server("rear", Span(4, 6)), alice:
        await asyncio.sleep(LOADING)
        assert (await world.spans())["alice"] == (kept, "serving")
        async with world.server("front", LEFT), world.server("another", LEFT):
            async with no_gap(world):
                await asyncio.sleep(CALM[1] + 3 * LOADING)
            (listed,) = [one for one in await world.listed() if one.name == "alice"]
            assert listed.serves_on == is_room
            span, state = (await world.spans())["alice"]
            assert state == "serving"
            assert ({3, 4} <= set(span.blocks)) == is_room
            assert asked == ([kept, span] if is_room else [kept])


@asynccontextmanager
async def no_gap(world: World) -> AsyncIterator[None]:
    """All blocks are served all the time."""

    async def watch() -> None:
        while True:
            assert await served(world) == BLOCKS
            await asyncio.sleep(0.5)

    async with asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(watch())
        yield
        watching.cancel()


@in_virtual_time
async def test_its_sessions_are_taken_elsewhere_and_it_is_found_again_where_it_is() -> None:
    world = World()
    async with free(world, "alice") as alice, world.server("bob", LEFT) as bob, right(world):
        await asyncio.sleep(LOADING)
        client = await opened(world, alice)
        await client.call(step(), bytes(12), timeout=5, max_body=100)
        kill_right(world)
        async with asyncio.timeout(FILLED):
            assert await heard(client, FILLED) == messages.Leaving(session_id="1" * 32)
        assert (await world.spans())["alice"] == (RIGHT, "serving")
        target = await opened(world, bob, "target", session_id="2" * 32)
        asked = messages.HandOver(
            session_id="1" * 32, peer=bob.transport.peer, addresses=(), to_session="2" * 32
        )
        answer, _ = await client.call(asked, timeout=30)
        assert answer == messages.HandedOver(session_id="1" * 32, tokens=1)
        client.close()
        assert world.engines["bob"].lengths == {"2" * 32: 1}
        error = await refused(opened(world, alice, "late"))
        assert (error.code, "blocks 3:6" in error.message) == ("draining", True)
        await opened(world, alice, "new", RIGHT)
        target.close()


@in_virtual_time
async def test_a_session_that_does_not_leave_is_ended_and_its_engine_closed() -> None:
    world = World()
    async with free(world, "alice") as alice, world.server("bob", LEFT), right(world):
        await asyncio.sleep(LOADING)
        before = world.engines["alice"]
        client = await opened(world, alice)
        kill_right(world)
        await asyncio.sleep(2 * FILLED)
        assert (await world.spans())["alice"] == (RIGHT, "serving")
        assert before.is_closed
        assert not world.engines["alice"].is_closed
        assert isinstance(await heard(client), messages.Leaving)
        assert (await refused(client.call(step(), bytes(12), timeout=5))).code == "unknown_session"


@in_virtual_time
async def test_a_server_stays_while_nobody_has_room_for_its_sessions() -> None:
    world = World()
    async with free(world, "alice") as alice, world.server("bob", LEFT), right(world):
        await asyncio.sleep(LOADING)
        client = await opened(world, alice)
        world.engines["bob"].kv_tokens = 10
        await asyncio.sleep(20)
        kill_right(world)
        await asyncio.sleep(2 * FILLED)
        assert (await world.spans())["alice"] == (LEFT, "serving")
        client.close()
        await until_whole(world, FILLED)


class NoRoomForTwo:
    """Loads one engine at a time."""

    def __init__(self) -> None:
        self.engines: list[FakeEngine] = []
        self.spans: list[Span] = []
        self.broken: set[Span] = set()

    async def __call__(
        self, span: Span, on_progress: OnProgress, *, kv_tokens: int | None = None
    ) -> FakeEngine:
        self.spans.append(span)
        if self.engines and not self.engines[-1].is_closed:
            raise DoesNotFit("Both do not fit.")
        await asyncio.sleep(5)
        if span in self.broken:
            raise SwarmError("The file is gone.")
        self.engines.append(FakeEngine())
        return self.engines[-1]


@in_virtual_time
async def test_without_memory_for_both_the_old_blocks_are_let_go_first() -> None:
    world, load = World(), NoRoomForTwo()
    async with free(world, "alice", load=load) as alice, world.server("bob", LEFT), right(world):
        await asyncio.sleep(LOADING)
        client = await opened(world, alice)
        kill_right(world)
        assert isinstance(await heard(client, FILLED), messages.Leaving)
        assert (await world.spans())["alice"] == (LEFT, "draining")
        client.close()
        await until_whole(world, FILLED)
        assert load.spans == [LEFT, RIGHT, RIGHT]
        phases = [name for name, _ in alice.events.seen]
        moving = phases.index("moving")
        assert phases[moving:] == ["moving", "draining", "joining", "joining", "serving"]


@in_virtual_time
async def test_what_cannot_be_loaded_is_given_up_for_what_was_there() -> None:
    world, load = World(), NoRoomForTwo()
    load.broken.add(RIGHT)
    async with free(world, "alice", load=load), world.server("bob", LEFT), right(world):
        await asyncio.sleep(LOADING)
        kill_right(world)
        await asyncio.sleep(2 * FILLED)
        assert (await world.spans())["alice"] == (LEFT, "serving")
        assert load.spans == [LEFT, RIGHT, RIGHT, LEFT]


@in_virtual_time
async def test_what_cannot_be_loaded_beside_changes_nothing() -> None:
    world, loads = World(), 0

    async def load(span: Span, on_progress: OnProgress, *, kv_tokens: int | None = None) -> FakeEngine:
        nonlocal loads
        loads += 1
        if loads > 1:
            raise SwarmError("The hub does not answer.")
        return FakeEngine()

    async with free(world, "alice", load=load) as alice, world.server("bob", LEFT), right(world):
        await asyncio.sleep(LOADING)
        client = await opened(world, alice)
        kill_right(world)
        await asyncio.sleep(2 * FILLED)
        assert (await world.spans())["alice"] == (LEFT, "serving")
        await client.call(step(), bytes(12), timeout=5, max_body=100)
        assert loads == 2


@in_virtual_time
async def test_who_should_go_and_does_not_is_not_waited_for_long() -> None:
    """Liars say that they would fill holes, and never do."""
    world = World()
    liars = [world.server(f"liar {number}", LEFT) for number in range(3)]
    for liar in liars:
        honest = liar.server.announcement
        liar.server.announcement = lambda honest=honest: lying(honest())  # type: ignore[method-assign]
    async with lives(*liars), right(world, 4), free(world, "alice") as alice:
        await asyncio.sleep(LOADING)
        assert (await world.spans())["alice"] == (LEFT, "serving")
        kill_right(world, 4)
        await asyncio.sleep(FILLED + 3 * (PATIENCE + LOOK_PERIOD))
        assert await served(world) == BLOCKS
        assert await moved(alice)


def lying(announcement: Announcement) -> Announcement:
    return msgspec.structs.replace(announcement, mobility="free")


@pytest.mark.parametrize("after", [0.0, 0.3, 1.0, 4.0, 9.0, 14.0, 20.0, 25.0])
@in_virtual_time
async def test_leaving_in_the_middle_of_a_move_leaves_nothing_behind(after: float) -> None:
    world = World()
    async with free(world, "alice") as alice, world.server("bob", LEFT), right(world):
        await asyncio.sleep(LOADING)
        before = world.engines["alice"]
        client: MessageStream = await opened(world, alice)
        kill_right(world)
        for _ in range(400):
            if alice.server.announcement().goes_to:
                break
            await asyncio.sleep(0.1)
        await asyncio.sleep(after)
        client.close()
        await alice.leave()
        assert "alice" not in await world.spans()
        assert before.is_closed
        assert world.engines["alice"].is_closed
        assert not [one for one in asyncio.all_tasks() if one.get_name() == "arrange alice"]
