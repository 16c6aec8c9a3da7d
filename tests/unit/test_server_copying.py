"""Copies of a session for its standby: how they go, what rollbacks do, and whose room standbys take."""

import asyncio

import pytest

from swarm.blocks.errors import NoCapacity
from swarm.net.calls import MessageStream
from swarm.net.messages import (
    Adopt,
    Adopted,
    Held,
    Leaving,
    Mirror,
    Mirrored,
    Opened,
    Ping,
    Pong,
    Result,
    Unfed,
)
from swarm.net.virtual_time import in_virtual_time
from swarm.page_keys import PAGE_TOKENS
from swarm.server import copying
from swarm.server.copying import LINE_SHARE, Pace, next_piece, pacing
from swarm.server.giving_way import giving_way
from tests.fake_engine import KV_BYTES, FakeStats
from tests.hosting import (
    ONE,
    THREE,
    TWO,
    Host,
    ask,
    ended,
    feeding,
    hear,
    opened,
    opening,
    refusal,
    servers,
    silence,
    stepping,
    values,
)

PAGE = PAGE_TOKENS
ROOM = 200


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page a piece."""
    monkeypatch.setattr(copying, "PIECE_BYTES", PAGE * KV_BYTES)


def mirroring(to: Host, to_session: str = TWO, session_id: str = ONE) -> Mirror:
    return Mirror(session_id=session_id, peer=to.peer, addresses=(), to_session=to_session)


async def held(host: Host, tokens: int, session_id: str = ONE) -> MessageStream:
    host.engine.max_step_tokens = ROOM
    client = await opened(host, session_id, max_tokens=ROOM)
    if tokens:
        await run(client, 0, tokens, session_id)
    return client


async def run(client: MessageStream, at: int, tokens: int, session_id: str = ONE) -> None:
    step = stepping(at, tokens, session_id)
    assert isinstance((await client.call(step, values(tokens), timeout=5, max_body=10_000))[0], Result)


async def standby(host: Host, session_id: str = TWO, max_tokens: int = ROOM) -> MessageStream:
    host.engine.max_step_tokens = ROOM
    return await opened(host, session_id, max_tokens=max_tokens, standby=True)


def told(tokens: int, taken: int) -> Held:
    return Held(session_id=TWO, tokens=tokens, taken=taken)


def test_pieces_are_whole_pages() -> None:
    assert next_piece(0, PAGE - 1, 2 * PAGE) == (0, 0)
    assert next_piece(0, PAGE, 2 * PAGE) == (0, PAGE)
    assert next_piece(PAGE, 9 * PAGE + 3, 2 * PAGE) == (PAGE, 3 * PAGE)
    assert next_piece(PAGE + 5, 3 * PAGE, 4 * PAGE) == (PAGE, 3 * PAGE), "a page that was cut goes anew"
    assert next_piece(3 * PAGE, 2 * PAGE, 4 * PAGE) == (3 * PAGE, 3 * PAGE)


def test_copies_take_a_part_of_the_line() -> None:
    assert pacing(1000, 0.0) == 0.0
    assert pacing(1000, 1e4) == pytest.approx(0.1 / LINE_SHARE)
    pace = Pace(lambda: 1e4)
    assert pace.wait(1000, 50.0) == 0.0
    assert pace.wait(1000, 50.0) == pytest.approx(0.5)
    assert pace.wait(1000, 50.5) == pytest.approx(0.5)
    assert pace.wait(1000, 60.0) == 0.0
    assert Pace().wait(10**9, 0.0) == Pace().wait(10**9, 0.0) == 0.0


@pytest.mark.parametrize(
    ("standbys", "tokens", "left", "gone"),
    [
        ([], 10, 10, 0),
        ([], 10, 5, 0),
        ([5, 5], 10, 10, 0),
        ([5, 5], 10, 5, 1),
        ([5, 5], 10, 3, 2),
        ([5, 5], 20, 3, 0),
    ],
)
def test_no_more_standbys_go_than_must_and_none_in_vain(
    standbys: list[int], tokens: int, left: int, gone: int
) -> None:
    assert giving_way(standbys, tokens, left) == gone


@in_virtual_time
async def test_pages_are_copied_as_they_fill_and_the_client_is_told() -> None:
    async with servers("a", "b") as (a, b):
        one, two = await held(a, 2 * PAGE + 5), await standby(b)
        taken = a.sessions._on(None)[0].taken
        assert await ask(one, mirroring(b)) == Mirrored(session_id=ONE)
        assert [await hear(two), await hear(two)] == [told(PAGE, taken), told(2 * PAGE, taken)]
        await silence(two)
        await run(one, 2 * PAGE + 5, PAGE)
        assert (await hear(two)).tokens == 3 * PAGE
        assert b.engine.lengths == {TWO: 3 * PAGE}
        await ask(one, stepping(3 * PAGE + 5, 1), values(1))
        await silence(two)


@in_virtual_time
async def test_steps_go_on_while_pages_are_under_way() -> None:
    async with servers("a", "b") as (a, b):
        one, two = await held(a, PAGE), await standby(b)
        b.engine.seconds = 4.0
        await ask(one, mirroring(b))
        await asyncio.sleep(0.5)
        clock = asyncio.get_running_loop().time
        since = clock()
        for at in range(PAGE, PAGE + 10):
            await run(one, at, 1)
        assert clock() - since < 1.0
        assert (await hear(two)).tokens == PAGE


@in_virtual_time
async def test_the_copy_follows_what_is_rolled_back() -> None:
    async with servers("a", "b") as (a, b):
        one, two = await held(a, 3 * PAGE), await standby(b)
        await ask(one, mirroring(b))
        assert [(await hear(two)).tokens for _ in range(3)] == [PAGE, 2 * PAGE, 3 * PAGE]
        await run(one, PAGE + 7, 1)
        await silence(two)
        assert b.engine.lengths == {TWO: 3 * PAGE}, "it is told nothing until there is something to copy"
        await run(one, PAGE + 8, PAGE)
        assert (await hear(two)).tokens == 2 * PAGE
        assert b.engine.lengths == {TWO: 2 * PAGE}


@in_virtual_time
async def test_a_standby_that_gets_a_step_adopts_no_more() -> None:
    async with servers("a", "b") as (a, b):
        one, two = await held(a, 2 * PAGE), await standby(b)
        await ask(one, mirroring(b))
        await hear(two)
        await hear(two)
        assert b.sessions.count == 0
        await run(two, PAGE, 1, TWO)
        assert b.sessions.count == 1
        await run(one, 2 * PAGE, PAGE)
        await silence(two)
        assert b.engine.lengths == {TWO: PAGE + 1}
        assert b.refusals() == {}
        await run(one, 3 * PAGE, 2 * PAGE)
        await asyncio.sleep(1.0)
        assert not any(stream.peer == b.peer for stream in a.transport.streams)


@in_virtual_time
async def test_a_standby_is_told_that_nothing_comes_any_more() -> None:
    async with servers("a", "b") as (a, b):
        one, two = await held(a, PAGE), await standby(b)
        await ask(one, mirroring(b))
        await hear(two)
        one.close()
        assert await hear(two) == Unfed(session_id=TWO)
        await run(two, PAGE, 1, TWO)


@in_virtual_time
async def test_another_mirror_takes_the_place_of_the_first() -> None:
    async with servers("a", "b", "c") as (a, b, c):
        one, two, three = await held(a, PAGE), await standby(b), await standby(c, THREE)
        await ask(one, mirroring(b))
        await hear(two)
        await ask(one, mirroring(c, THREE))
        assert (await hear(three)).tokens == PAGE
        assert await hear(two) == Unfed(session_id=TWO)
        await run(one, PAGE, PAGE)
        assert (await hear(three)).tokens == 2 * PAGE


@in_virtual_time
async def test_a_standby_that_takes_nothing_ends_the_copying_alone() -> None:
    async with servers("a", "b") as (a, b):
        one, two = await held(a, PAGE), await standby(b, max_tokens=PAGE + 1)
        await ask(one, mirroring(b))
        await hear(two)
        await run(one, PAGE, PAGE)
        assert await hear(two) == Unfed(session_id=TWO)
        assert b.refusals() == {("adopt", "bad_request"): 1}
        await run(one, 2 * PAGE, 1)
        assert isinstance(await ask(two, Ping(nonce=1)), Pong)


@pytest.mark.parametrize("why", ["an engine that cannot", "nobody there", "no such session"])
@in_virtual_time
async def test_what_cannot_be_copied_is_refused(why: str) -> None:
    async with servers("a", "b") as (a, b):
        one = await held(a, PAGE)
        asked = mirroring(b)
        if why == "an engine that cannot":
            await standby(b)
            a.engine.can_hand_over = False
        elif why == "nobody there":
            asked = Mirror(session_id=ONE, peer="\x1b[2J", addresses=(), to_session=TWO)
        error = await refusal(one, asked)
        assert (error.code, error.message.isprintable(), error.number) == ("bad_request", True, None)
        await run(one, PAGE, 1)


@in_virtual_time
async def test_no_more_sessions_are_copied_to_one_peer_than_its_streams_bear() -> None:
    async with servers("a", "b", copies_per_peer=1) as (a, b):
        a.engine.kv_tokens = b.engine.kv_tokens = 10 * ROOM
        one, other = await held(a, PAGE), await held(a, PAGE, THREE)
        await standby(b)
        await standby(b, "4" * 32)
        await ask(one, mirroring(b))
        asked = mirroring(b, "4" * 32, THREE)
        assert (await refusal(other, asked)).code == "no_capacity"
        await ask(one, mirroring(b))
        one.close()
        await asyncio.sleep(1.0)
        await ask(other, asked)


@in_virtual_time
async def test_a_server_that_has_no_page_to_spare_copies_later() -> None:
    async with servers("a", "b") as (a, b):
        one, two = await held(a, PAGE), await standby(b)
        whole, full = a.engine.copy_kv, [NoCapacity("full", 5.0)]

        async def copy_kv(session_id: str, first: int, end: int) -> memoryview:
            if full:
                raise full.pop()
            return await whole(session_id, first, end)

        a.engine.copy_kv = copy_kv  # type: ignore[method-assign]
        await ask(one, mirroring(b))
        await silence(two, 4.0)
        assert (await hear(two)).tokens == PAGE


@in_virtual_time
async def test_standbys_take_no_room_that_sessions_want() -> None:
    async with servers("a") as (a,):
        a.engine.kv_tokens, a.engine.stats = 16 * PAGE, FakeStats(kv_pages=16)
        first = await standby(a, ONE, 8 * PAGE)
        assert a.sessions.tokens_left == 16 * PAGE, "what they have is announced as free"
        stream = await a.client()
        error = await refusal(stream, opening(TWO, max_tokens=5 * PAGE, standby=True))
        assert (error.code, error.retry_after is not None) == ("no_capacity", True)
        second = await standby(a, TWO, 4 * PAGE)
        await ask(first, Ping(nonce=1))
        session = await opened(a, THREE, max_tokens=6 * PAGE)
        await ended(second)
        assert isinstance(await ask(first, Ping(nonce=2)), Pong), "the one that was in use last stays"
        assert (await refusal(stream, opening(TWO, max_tokens=11 * PAGE))).code == "no_capacity"
        assert isinstance(await ask(first, Ping(nonce=3)), Pong), "none goes in vain"
        await opened(a, TWO, max_tokens=10 * PAGE)
        await ended(first)
        assert a.sessions.count == 2
        session.close()


@in_virtual_time
async def test_a_step_without_a_page_has_a_standby_give_way() -> None:
    async with servers("a") as (a,):
        one = await held(a, PAGE)
        two = await standby(a)
        a.engine.failure = NoCapacity("full", 5.0)
        await run(one, PAGE, 1)
        await ended(two)
        a.engine.failure = NoCapacity("full", 5.0)
        assert (await refusal(one, stepping(PAGE + 1, 1), values(1))).code == "no_capacity"


@in_virtual_time
async def test_standbys_count_apart() -> None:
    async with servers("a", sessions_per_peer=1, standbys_per_peer=1) as (a,):
        await standby(a, ONE)
        stream = await a.client()
        assert (await refusal(stream, opening(TWO, standby=True))).code == "no_capacity"
        assert isinstance(await ask(stream, opening(TWO)), Opened)
        assert (await refusal(await a.client(), opening(THREE))).code == "no_capacity"
        assert a.sessions.demands() == [(a.cell.span, 20)]


@in_virtual_time
async def test_a_ping_keeps_a_standby() -> None:
    async with servers("a", "b") as (a, b):
        one, two = await held(a, PAGE), await standby(b)
        await ask(one, mirroring(b))
        await hear(two)
        for at in range(5):
            await asyncio.sleep(400.0)
            await ask(two, Ping(nonce=at))
            await run(one, PAGE + at, 1)
        await run(one, PAGE + 5, PAGE)
        assert (await hear(two)).tokens == 2 * PAGE, "nor does the stream from the hop end"
        await asyncio.sleep(601.0)
        await ended(two)


@in_virtual_time
async def test_who_leaves_waits_for_no_standby() -> None:
    async with servers("a") as (a,):
        two = await standby(a)
        a.cell.move("draining")
        since = asyncio.get_running_loop().time()
        await a.sessions.drain(30.0, 5.0)
        assert asyncio.get_running_loop().time() - since < 2.0
        assert await hear(two) == Leaving(session_id=TWO)
        await ended(two)
        a.cell.move("left")


@in_virtual_time
async def test_a_session_that_is_no_standby_forgets_nothing_by_what_it_adopts() -> None:
    async with servers("b") as (b,):
        two = await held(b, PAGE, TWO)
        feed = await feeding(b, TWO)
        piece = Adopt(session_id=TWO, first=0, end=1, size=KV_BYTES)
        assert (await refusal(feed, piece, bytes(KV_BYTES))).code == "bad_request"
        first = Adopt(session_id=TWO, first=PAGE, end=PAGE + 1, size=KV_BYTES)
        assert await ask(feed, first, PAGE.to_bytes(KV_BYTES, "little")) == Adopted(session_id=TWO)
        await silence(two)


@in_virtual_time
async def test_models_that_keep_a_state_have_no_standbys() -> None:
    async with servers("a") as (a,):
        a.engine.can_hand_over = False
        stream = await a.client()
        assert (await refusal(stream, opening(standby=True))).code == "bad_request"
        answer = await ask(stream, opening())
        assert not answer.mirrors
