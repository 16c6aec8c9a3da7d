"""What a session holds, given by one server to another: the whole way, refusals, and ends in between."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest

from swarm.blocks.errors import NoCapacity, StepError
from swarm.net.calls import MessageStream, Refused
from swarm.net.messages import (
    Adopt,
    Adopted,
    Close,
    Fed,
    Feed,
    HandedOver,
    HandOver,
    Ping,
    Pong,
    Result,
    Unfed,
)
from swarm.net.transport import Stream, StreamClosed
from swarm.net.virtual_time import in_virtual_time
from swarm.page_keys import PAGE_TOKENS
from swarm.server import hand_over
from tests.fake_engine import KV_BYTES, FakeEngine, FakeResult
from tests.hosting import (
    ONE,
    THREE,
    TWO,
    EndingEngine,
    Host,
    Net,
    ask,
    ended,
    feeding,
    hear,
    hosting,
    nothing_left,
    opened,
    opening,
    refusal,
    servers,
    silence,
    stepping,
    values,
)
from tests.stepping import SteppingLoop, run_stepping

HELD = 70
"""Tokens of the session that is given: two pages and a part of one."""


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page a piece."""
    monkeypatch.setattr(hand_over, "PIECE_BYTES", PAGE_TOKENS * KV_BYTES)


@dataclass
class OneAtATime(FakeEngine):
    """As the real engine, it works on a session at one thing at a time, and refuses another."""

    busy: set[str] = field(default_factory=set)

    async def step(self, session_id: str, *args: Any, **kwargs: Any) -> FakeResult:
        with self._working(session_id):
            return await super().step(session_id, *args, **kwargs)

    async def export_kv(self, session_id: str, first: int, end: int) -> memoryview:
        with self._working(session_id):
            return await super().export_kv(session_id, first, end)

    async def import_kv(self, session_id: str, first: int, end: int, data: memoryview) -> None:
        with self._working(session_id):
            await super().import_kv(session_id, first, end, data)

    @contextmanager
    def _working(self, session_id: str) -> Iterator[None]:
        if session_id in self.busy:
            raise StepError("bad_request", "The last step of this session is still running.")
        self.busy.add(session_id)
        try:
            yield
        finally:
            self.busy.discard(session_id)


@dataclass
class Refusing(FakeEngine):
    """Takes no KV memory in, for that reason."""

    reason: Exception = field(default_factory=lambda: NoCapacity("full", 3.0))

    async def import_kv(self, session_id: str, first: int, end: int, data: memoryview) -> None:
        raise self.reason


def handing(to: Host, to_session: str = TWO, session_id: str = ONE) -> HandOver:
    return HandOver(session_id=session_id, peer=to.peer, addresses=(), to_session=to_session)


async def held(host: Host, tokens: int = HELD, session_id: str = ONE) -> MessageStream:
    """A client's stream with a session that holds so many tokens."""
    host.engine.max_step_tokens = 100
    client = await opened(host, session_id, max_tokens=100)
    if tokens:
        await client.call(stepping(0, tokens, session_id), values(tokens), timeout=5, max_body=10_000)
    return client


async def room(host: Host, session_id: str = TWO, max_tokens: int = 100) -> MessageStream:
    """A client's stream with an empty session."""
    return await opened(host, session_id, max_tokens=max_tokens)


def piece(first: int, end: int, session_id: str = TWO, size: int | None = None) -> tuple[Adopt, bytes]:
    data = b"".join(position.to_bytes(KV_BYTES, "little") for position in range(first, end))
    data = data if size is None else bytes(size)
    return Adopt(session_id=session_id, first=first, end=end, size=max(len(data), 1)), data


def streams_between(host: Host, other: Host) -> int:
    return sum(stream.peer == other.peer for stream in host.transport.streams)


@pytest.mark.parametrize("tokens", [0, 1, 32, 33, HELD])
@in_virtual_time
async def test_a_session_goes_on_elsewhere_where_it_was(tokens: int) -> None:
    async with servers("a", "b") as (a, b):
        one, two = await held(a, tokens), await room(b)
        assert await ask(one, handing(b)) == HandedOver(session_id=ONE, tokens=tokens)
        assert b.engine.lengths == {TWO: tokens}
        assert streams_between(a, b) == streams_between(b, a) == 0
        assert isinstance(await ask(two, stepping(tokens, 1, TWO), values(1)), Result)
        assert (await refusal(two, stepping(tokens + 2, 1, TWO), values(1))).code == "bad_request"
        assert isinstance(await ask(one, stepping(tokens, 1), values(1)), Result), "here it is open still"
        await silence(two)
        assert a.refusals() == {}


@in_virtual_time
async def test_it_goes_there_in_pieces_of_whole_pages() -> None:
    async with servers("a") as (a,):
        heard: list[tuple[int, int, int]] = []
        tap = a.net.client("tap")

        async def on_stream(stream: Stream) -> None:
            calls = MessageStream(stream)
            message, _ = await calls.receive()
            assert isinstance(message, Feed)
            await calls.send(Fed(session_id=message.session_id))
            while True:
                got, body = await calls.receive()
                assert isinstance(got, Adopt)
                heard.append((got.first, got.end, len(body)))
                await calls.send(Adopted(session_id=got.session_id))

        await tap.listen(on_stream)
        one = await held(a)
        asked = HandOver(session_id=ONE, peer=tap.peer, addresses=(), to_session=TWO)
        assert await ask(one, asked) == HandedOver(session_id=ONE, tokens=HELD)
        assert heard == [(0, 32, 64), (32, 64, 64), (64, 70, 12)]


@in_virtual_time
async def test_it_waits_for_its_turn_among_the_steps_and_those_behind_wait_for_it() -> None:
    async with servers("a", "b") as (a, b):
        a.engine.max_step_tokens = 100
        one, _ = await opened(a, ONE, max_tokens=100), await room(b)
        a.engine.seconds = 1.0
        for number, message in enumerate(
            (stepping(0, 40, number=1), handing(b), stepping(40, 3, number=2)), start=1
        ):
            await one.send(message, values(0 if number == 2 else 40 if number == 1 else 3))
        heard = [await hear(one) for _ in range(3)]
        assert [getattr(message, "number", None) for message in heard] == [1, None, 2]
        assert heard[1] == HandedOver(session_id=ONE, tokens=40)
        assert b.engine.lengths == {TWO: 40}


@pytest.mark.parametrize(
    "why",
    ["an engine that cannot", "no such session", "nobody there", "it holds something", "it is too small"],
)
@in_virtual_time
async def test_what_cannot_be_handed_over_is_refused_and_the_session_goes_on(why: str) -> None:
    async with servers("a", "b") as (a, b):
        one = await held(a)
        asked = handing(b)
        match why:
            case "an engine that cannot":
                a.engine.can_hand_over = False
                await room(b)
            case "nobody there":
                asked = HandOver(session_id=ONE, peer="\x1b[2J", addresses=(), to_session=TWO)
            case "it holds something":
                await held(b, 1, TWO)
            case "it is too small":
                await room(b, max_tokens=HELD - 1)
        error = await refusal(one, asked)
        assert (error.code, error.message.isprintable(), error.number) == ("bad_request", True, None)
        assert a.refusals() == {("handover", "bad_request"): 1}
        assert isinstance(await ask(one, stepping(HELD, 1), values(1)), Result)
        await asyncio.sleep(0.1)
        assert streams_between(a, b) == streams_between(b, a) == 0


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        (NoCapacity("full", 3.0), "no_capacity"),
        (StepError("bad_request", "no"), "bad_request"),
        (ZeroDivisionError("oops"), "internal"),
    ],
)
@in_virtual_time
async def test_a_server_that_takes_nothing_in_says_why_and_both_sessions_go_on(
    reason: Exception, code: str
) -> None:
    net = Net()
    async with hosting("a", net) as a, hosting("b", net, engine=Refusing(reason=reason)) as b:
        one, two = await held(a), await room(b)
        assert (await refusal(one, handing(b))).code == "bad_request"
        assert b.refusals() == {("adopt", code): 1}
        assert isinstance(await ask(one, stepping(HELD, 1), values(1)), Result)
        assert isinstance(await ask(two, stepping(0, 1, TWO), values(1)), Result)
        await net.close()
        await asyncio.sleep(1)
        assert not a.transport.streams
    await nothing_left()


@in_virtual_time
async def test_who_hands_nothing_over_is_told_so() -> None:
    async with servers("a", "b") as (a, b):
        client = await a.client()
        assert (await refusal(client, handing(b))).code == "unknown_session"
        await ask(client, opening())
        assert (await refusal(client, handing(b, session_id=THREE))).code == "unknown_session"
        assert a.refusals() == {("handover", "unknown_session"): 2}


@in_virtual_time
async def test_a_target_that_is_lost_on_the_way_is_told_of() -> None:
    async with servers("a", "b") as (a, b):
        one, _ = await held(a), await room(b)
        b.engine.seconds = 1.0
        await one.send(handing(b))
        await asyncio.sleep(1.5)
        b.network.kill("b")
        assert (await hear(one, 1.0)).code == "bad_request"
        assert isinstance(await ask(one, stepping(HELD, 1), values(1)), Result)


@in_virtual_time
async def test_a_target_whose_client_leaves_on_the_way_is_told_of() -> None:
    async with servers("a", "b", kind=EndingEngine) as (a, b):
        one, two = await held(a), await room(b)
        b.engine.seconds = 1.0
        await one.send(handing(b))
        await asyncio.sleep(1.5)
        two.close()
        await asyncio.sleep(0.1)
        assert not b.engine.sessions
        assert (await hear(one, 5.0)).code == "bad_request"
        assert isinstance(await ask(one, stepping(HELD, 1), values(1)), Result)


@pytest.mark.parametrize("part", ["a", "b"])
@in_virtual_time
async def test_a_target_or_a_source_that_takes_too_long_is_given_up(part: str) -> None:
    async with servers("a", "b") as (a, b):
        one, _ = await held(a), await room(b)
        {"a": a, "b": b}[part].engine.seconds = 1000.0 if part == "a" else 20.0
        started = asyncio.get_running_loop().time()
        await one.send(handing(b))
        assert isinstance(await ask(one, Ping(nonce=1)), Pong)
        assert (await hear(one)).code == "bad_request"
        took = asyncio.get_running_loop().time() - started
        assert took == pytest.approx(hand_over.DEADLINE if part == "a" else hand_over.PIECE_DEADLINE, abs=1)
        await asyncio.sleep(10)
        assert streams_between(a, b) == streams_between(b, a) == 0


@in_virtual_time
async def test_eviction_on_the_way_ends_it_with_a_reason() -> None:
    async with servers("a", "b", kind=EndingEngine) as (a, b):
        one, _ = await held(a), await room(b)
        a.engine.seconds = 1.0
        await one.send(handing(b))
        await asyncio.sleep(1.5)
        a.sessions.evict()
        assert (await hear(one, 5.0)).code == "bad_request"
        assert (await refusal(one, handing(b))).code == "bad_request"
        assert (await refusal(one, stepping(HELD, 1), values(1))).code == "unknown_session"


@in_virtual_time
async def test_a_piece_that_does_not_fit_is_refused_and_the_right_one_is_taken_then() -> None:
    async with servers("b") as (b,):
        two = await room(b)
        feed = await feeding(b, TWO)
        for wrong in (piece(1, 3), piece(0, 101), piece(0, 3, size=7), piece(3, 2, size=4)):
            assert (await refusal(feed, *wrong)).code == "bad_request"
        assert await ask(feed, *piece(0, 3)) == Adopted(session_id=TWO)
        assert (await refusal(feed, *piece(0, 3))).code == "bad_request"
        assert await ask(feed, *piece(3, 40)) == Adopted(session_id=TWO)
        assert isinstance(await ask(two, stepping(40, 1, TWO), values(1)), Result)
        assert b.refusals() == {("adopt", "bad_request"): 5}
        feed.close()
        await silence(two)


@in_virtual_time
async def test_a_piece_of_another_length_than_it_says_ends_its_stream() -> None:
    async with servers("b") as (b,):
        two = await room(b)
        feed = await feeding(b, TWO)
        message, data = piece(0, 3)
        await feed.send(message, data[:-1])
        with pytest.raises(StreamClosed):
            await hear(feed)
        assert await hear(two) == Unfed(session_id=TWO)
        assert b.engine.lengths == {TWO: 0}


@in_virtual_time
async def test_pieces_are_taken_from_who_feeds_the_session_and_from_nobody_else() -> None:
    async with servers("b") as (b,):
        two = await room(b)
        three = await room(b, THREE)
        stranger = await b.client("stranger")
        for client in (stranger, three):
            await client.send(*piece(0, 3))
            await ended(client)
        assert b.engine.lengths == {TWO: 0}
        assert isinstance(await ask(two, stepping(0, 1, TWO), values(1)), Result)


@in_virtual_time
async def test_nothing_is_taken_in_while_steps_wait() -> None:
    async with servers("b", kind=OneAtATime) as (b,):
        two = await room(b)
        feed = await feeding(b, TWO)
        b.engine.seconds = 1.0
        await two.send(stepping(0, 3, TWO), values(3))
        await asyncio.sleep(0.5)
        assert (await refusal(feed, *piece(0, 3))).code == "bad_request"
        assert isinstance(await hear(two), Result)
        assert await ask(feed, *piece(3, 6)) == Adopted(session_id=TWO)


@in_virtual_time
async def test_a_step_that_comes_while_something_is_taken_in_waits_for_it() -> None:
    async with servers("b", kind=OneAtATime) as (b,):
        two = await room(b)
        feed = await feeding(b, TWO)
        b.engine.seconds = 1.0
        await feed.send(*piece(0, 3))
        await asyncio.sleep(0.5)
        await two.send(stepping(3, 1, TWO, number=1), values(1))
        result = await hear(two)
        assert (type(result), result.number) == (Result, 1)
        assert b.engine.lengths == {TWO: 4}


@in_virtual_time
async def test_of_two_who_give_at_the_same_time_one_is_refused() -> None:
    async with servers("b", kind=OneAtATime) as (b,):
        await room(b)
        b.engine.seconds = 1.0
        first = await feeding(b, TWO, "x")
        await first.send(*piece(0, 3))
        await asyncio.sleep(0.5)
        second = await feeding(b, TWO, "y")
        assert (await refusal(second, *piece(0, 5))).code == "bad_request"
        assert b.engine.lengths == {TWO: 3}


@in_virtual_time
async def test_eviction_while_pieces_are_taken_in_refuses_them() -> None:
    async with servers("b", kind=EndingEngine) as (b,):
        await room(b)
        b.engine.seconds = 1.0
        first = await feeding(b, TWO, "x")
        await first.send(*piece(0, 3))
        await asyncio.sleep(0.1)
        second = await feeding(b, TWO, "y")
        await second.send(*piece(0, 5))
        await asyncio.sleep(0.1)
        b.sessions.evict()
        assert (await hear(second)).code == "bad_request"
        assert (await refusal(second, *piece(0, 5))).code == "bad_request"
        assert b.refusals() == {("adopt", "bad_request"): 3}


@in_virtual_time
async def test_a_flood_of_pieces_whose_answers_nobody_reads_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("swarm.net.wire.WINDOW_BYTES", 500)
    monkeypatch.setattr("swarm.net.outbox.MAX_WAITING_BYTES", 20_000)
    async with servers("b") as (b,):
        await room(b)
        feed = await feeding(b, TWO)
        sent = 0
        with suppress(StreamClosed):
            while True:
                await feed.send(*piece(5, 6))
                sent += 1
        assert sent < 200
        assert asyncio.get_running_loop().time() == pytest.approx(60, abs=2)


@pytest.mark.parametrize("seconds", [0.0, 0.015, 0.025, 0.5, 1.5, 3.5])
@in_virtual_time
async def test_a_client_that_goes_while_its_session_is_handed_over_leaves_nothing(seconds: float) -> None:
    async with servers("a", "b") as (a, b):
        one, two = await held(a), await room(b)
        a.engine.seconds = b.engine.seconds = 0.5
        await one.send(handing(b))
        await asyncio.sleep(seconds)
        one.close()
        await asyncio.sleep(1)
        assert not a.engine.sessions
        assert streams_between(a, b) == streams_between(b, a) == 0
        await two.send(stepping(0, 1, TWO), values(1))
        while not isinstance(heard := await hear(two), Result):
            assert heard == Unfed(session_id=TWO), "as long as nothing came, it could have been steps"


async def move(a: Host, b: Host) -> None:
    one, two = await held(a), await room(b)
    try:
        await ask(one, handing(b))
    except Refused:
        await ask(one, stepping(HELD, 1), values(1))
        raise
    await ask(one, Close(session_id=ONE))
    await ask(two, stepping(HELD, 1, TWO), values(1))
    await ask(two, Close(session_id=TWO))


@pytest.mark.parametrize("who", ["client", "a", "b"])
def test_whoever_is_lost_at_whatever_moment_leaves_nothing_elsewhere(who: str) -> None:
    moment = 1
    while run_stepping(lose(who, moment)):
        moment += 1
    assert moment > 50, "it did not go through the conversation"


async def lose(who: str, moment: int) -> bool:
    """Lose `who` at that moment while a session moves, unless it is done before; whether it was lost."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, SteppingLoop)
    net = Net()
    net.client("client")
    lost: list[str] = []

    def lose_it() -> None:
        net.network.kill(who)
        lost.append(who)

    async with hosting("a", net, engine=EndingEngine()) as a, hosting("b", net, engine=OneAtATime()) as b:
        for host in (a, b):
            host.engine.seconds = 0.02
        loop.act_at(moment, lose_it)
        (error,) = await asyncio.gather(move(a, b), return_exceptions=True)
        loop.moment = None
        assert lost or error is None
        await net.close()
        await asyncio.sleep(1)
        for host in (a, b):
            assert not host.engine.sessions
            assert not host.transport.streams
    await nothing_left()
    return bool(lost)
