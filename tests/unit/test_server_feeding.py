"""Steps that go on from hop to hop: links, feeds, and what becomes of them when one end goes."""

import asyncio
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest

from swarm.net import messages
from swarm.net.calls import MessageStream
from swarm.net.messages import (
    AnyMessage,
    Close,
    Closed,
    Error,
    Fed,
    Feed,
    HandOver,
    Link,
    Linked,
    Onward,
    Ping,
    Pong,
    Result,
    Step,
    Unfed,
)
from swarm.net.transport import Stream, StreamClosed
from swarm.net.virtual_time import in_virtual_time
from swarm.sampling import Sampling
from swarm.server import hosted, sessions
from swarm.server import onward as onwards
from swarm.spans import Span
from tests.fake_engine import FakeEngine
from tests.hosting import (
    HIDDEN,
    ONE,
    THREE,
    TWO,
    EndingEngine,
    Host,
    Net,
    ask,
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

SAMPLING = Sampling(0.7, None, None, None, bytes(16))


def link(session_id: str, to: Host, to_session: str, **changes: Any) -> Link:
    asked: dict[str, Any] = {"peer": to.peer, "addresses": (), "dtype": "float32", "codec": "raw"} | changes
    return Link(session_id=session_id, to_session=to_session, **asked)


def onward(session_id: str, rows: int = 0, page_keys: bytes = b"") -> Onward:
    return Onward(session_id, "hidden_states", rows, page_keys)


async def linked(first: Host, then: Host, **changes: Any) -> tuple[MessageStream, MessageStream]:
    """A client's streams to two hops, whose sessions `ONE` and `TWO` are linked."""
    one, two = await opened(first, ONE, **changes), await opened(then, TWO, **changes)
    assert await ask(one, link(ONE, then, TWO)) == Linked(session_id=ONE)
    return one, two


@asynccontextmanager
async def whole(*names: str, **settings: Any) -> AsyncIterator[list[Host]]:
    """Servers of all blocks, which take token ids and tell them again, one higher after hidden states."""
    settings |= {"takes_token_ids": True, "gives_token_ids": True}
    kind: Any = partial(FakeEngine, **settings)
    async with servers(*names, kind=kind, span=Span(0, 4)) as hosts:
        yield hosts


def ids(seq_pos: int = 0, **changes: Any) -> Step:
    """A step that brings one token."""
    return stepping(seq_pos, 1, payload_type="token_ids", shape=(1,), dtype="uint32", **changes)


class Tap:
    """A peer in the place of a hop: it takes what it is fed, and writes it down."""

    def __init__(self, host: Host):
        self.heard: list[tuple[AnyMessage, bytes]] = []
        self.transport = host.net.client("tap")
        self.takes = True

    @property
    def peer(self) -> Any:
        return self.transport.peer

    async def listen(self) -> "Tap":
        await self.transport.listen(self._on_stream)
        return self

    async def _on_stream(self, stream: Stream) -> None:
        calls = MessageStream(stream)
        message, _ = await calls.receive()
        assert isinstance(message, Feed)
        await calls.send(Fed(session_id=message.session_id))
        while self.takes:
            got, body = await calls.receive()
            self.heard.append((got, bytes(body)))
        await asyncio.Event().wait()


@in_virtual_time
async def test_a_step_goes_through_three_hops_and_the_client_hears_of_each() -> None:
    async with servers("a", "b", "c") as (a, b, c):
        one, two = await linked(a, b)
        three = await opened(c, THREE)
        await ask(two, link(TWO, c, THREE))
        for number, tokens in ((1, 4), (2, 1)):
            then = (onward(TWO), onward(THREE, rows=1))
            seq_pos = 0 if number == 1 else 4
            await one.send(stepping(seq_pos, tokens, number=number, then=then), values(tokens))
        for hop, (client, rows) in enumerate(((one, 0), (two, 0), (three, 1)), start=1):
            for number, tokens in ((1, 4), (2, 1)):
                result, body = await client.receive()
                assert isinstance(result, Result)
                assert (result.number, result.pushed) == (number, client is not three)
                assert bytes(body) == values(rows or tokens, float(hop))
        for host, session_id in ((a, ONE), (b, TWO), (c, THREE)):
            assert host.engine.steps == [(session_id, 0, 4), (session_id, 4, 1)]


@in_virtual_time
async def test_hops_go_the_rounds_they_were_asked_for_by_themselves() -> None:
    async with whole("a", "b") as (a, b):
        one, two = await linked(a, b, start=0)
        back = link(TWO, a, ONE, dtype="uint32")
        assert await ask(two, back) == Linked(session_id=TWO)
        then = (Onward(TWO, "token_ids", 1, b""),)
        await one.send(ids(number=4, then=then, rounds=2), array("I", [7]).tobytes())
        for at in range(3):
            given, told = await hear(one), await two.receive()
            assert isinstance(given, Result)
            assert isinstance(told[0], Result)
            assert (given.number, given.seq_pos, given.pushed) == (4 + at, at, True)
            assert (told[0].number, told[0].seq_pos, told[0].pushed) == (4 + at, at, at < 2)
            assert list(told[1].cast("I")) == [7 + 1 + at]
        assert a.engine.steps == [(ONE, at, 1) for at in range(3)]
        await silence(two)


@pytest.mark.parametrize(("ends", "steps"), [((), 3), ((8,), 1)])
@in_virtual_time
async def test_a_last_hop_goes_on_with_what_it_samples_and_gives_hidden_states(
    ends: tuple[int, ...], steps: int
) -> None:
    async with whole("a", "b") as (a, b):
        a.engine.gives_token_ids = False  # as none does that has not the last blocks
        one, two = await linked(a, b, start=0)
        await ask(two, link(TWO, a, ONE, dtype="uint32"))
        first = ids(number=4, then=(onward(TWO, rows=1),), rounds=2, ends=ends, sampling=SAMPLING)
        await one.send(first, array("I", [7]).tobytes())
        for at in range(steps):
            given, (result, body) = await hear(one), await two.receive()
            assert isinstance(given, Result)
            assert isinstance(result, Result)
            assert (given.number, given.token, given.pushed) == (4 + at, None, True)
            goes_on = at < steps - 1
            assert (result.number, result.pushed) == (4 + at, goes_on)
            assert result.token == 8 + at
            assert bytes(body) == values(1, 8.0 + at)
        assert a.engine.steps == [(ONE, at, 1) for at in range(steps)]
        await silence(two)


@pytest.mark.parametrize(("ends", "steps"), [((), 4), ((9,), 4), ((5, 8), 1)])
@in_virtual_time
async def test_a_hop_with_all_blocks_asks_itself_until_a_token_ends_it(
    ends: tuple[int, ...], steps: int
) -> None:
    async with whole("a") as (a,):
        client = await opened(a, ONE, start=0)
        step = ids(response_type="token_ids", rows=1, rounds=3, ends=ends)
        await client.send(step, array("I", [8]).tobytes())
        for at in range(steps):
            result, told = await client.receive()
            assert isinstance(result, Result)
            assert (result.number, result.pushed) == (step.number + at, at < steps - 1)
            assert list(told.cast("I")) == [8]
        await silence(client)
        assert a.engine.steps == [(ONE, at, 1) for at in range(steps)]


@in_virtual_time
async def test_a_newer_step_ends_the_rounds_before_it() -> None:
    async with whole("a", seconds=1.0) as (a,):
        client = await opened(a, ONE, start=0)
        first = ids(number=1, response_type="token_ids", rows=1, rounds=20)
        await client.send(first, array("I", [8]).tobytes())
        for number in (1, 2, 3):
            assert (await hear(client)).number == number  # type: ignore[union-attr]
        newer = ids(number=30, response_type="token_ids", rows=1)
        await client.send(newer, array("I", [8]).tobytes())
        assert [(await hear(client)).number for _ in "ab"] == [4, 30]  # type: ignore[union-attr]
        await silence(client)


@in_virtual_time
async def test_the_next_hop_is_brought_what_the_first_of_then_asks_and_the_rest_goes_on() -> None:
    async with servers("a") as (a,):
        a.engine.max_step_tokens = 40
        tap = await Tap(a).listen()
        one = await opened(a, ONE, max_tokens=64)
        await ask(one, link(ONE, tap, TWO))  # type: ignore[arg-type]
        then = (onward(TWO, page_keys=b"k" * 16), Onward(THREE, "token_ids", 2, b""))
        step = stepping(0, 32, number=9, then=then)
        result, body = await one.call(step, values(32), timeout=5, max_body=10_000)
        assert isinstance(result, Result)
        assert result.pushed
        await asyncio.sleep(1)
        expected = Step(
            session_id=TWO,
            number=9,
            seq_pos=0,
            payload_type="hidden_states",
            response_type="hidden_states",
            shape=(32, HIDDEN),
            dtype="float32",
            page_keys=b"k" * 16,
            then=then[1:],
        )
        assert tap.heard == [(expected, bytes(body))]


@pytest.mark.parametrize(
    ("wire", "dtype", "codec"),
    [("exact", "float32", "raw"), ("half", "float16", "scaled"), ("int8", "int8", "blocks")],
)
@in_virtual_time
async def test_what_goes_on_has_the_form_that_the_next_hop_takes(wire: Any, dtype: Any, codec: Any) -> None:
    async with servers("a", "b") as (a, b):
        one, two = await opened(a, ONE), await opened(b, TWO, wire=wire)
        await ask(one, link(ONE, b, TWO, dtype=dtype, codec=codec))
        await one.send(stepping(0, 2, then=(onward(TWO),)), values(2, 1.0))
        result = await hear(two)
        assert isinstance(result, Result)
        assert (result.dtype, result.codec, result.shape) == (dtype, codec, (2, HIDDEN))


@in_virtual_time
async def test_what_asks_for_another_session_than_the_linked_one_is_not_pushed() -> None:
    async with servers("a", "b") as (a, b):
        one, two = await linked(a, b)
        assert not (await ask(one, stepping(0, 1, then=(onward(THREE),)), values(1))).pushed
        assert not (await ask(one, stepping(1, 1), values(1))).pushed
        assert (await ask(one, stepping(2, 1, then=(onward(TWO),)), values(1))).pushed
        await silence(two)


@in_virtual_time
async def test_a_client_has_a_server_go_to_others_only_so_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "WAYS_AT_ONCE", 1)
    async with servers("a", "b") as (a, b):
        one, _ = await linked(a, b)
        for asked in (
            link(ONE, b, TWO),
            HandOver(session_id=ONE, peer=b.peer, addresses=(), to_session=TWO),
        ):
            error = await refusal(one, asked)
            assert (error.code, error.retry_after) == ("no_capacity", pytest.approx(0.5, abs=0.1))
        await asyncio.sleep(1 / sessions.WAYS_PER_SECOND)
        assert await ask(one, link(ONE, b, TWO)) == Linked(session_id=ONE)


@in_virtual_time
async def test_a_step_that_is_refused_is_not_pushed() -> None:
    async with servers("a", "b") as (a, b):
        one, _ = await linked(a, b)
        assert (await refusal(one, stepping(3, 1, then=(onward(TWO),)), values(1))).code == "bad_request"
        error = await refusal(one, stepping(0, 1, then=(onward(TWO),), rows=1), values(1))
        assert "all tokens" in error.message
        await asyncio.sleep(1)
        assert not b.engine.steps


@pytest.mark.parametrize("how", ["its peer is lost", "its session is closed", "its stream ends"])
@in_virtual_time
async def test_what_cannot_be_pushed_any_more_is_told_so(how: str) -> None:
    async with servers("a", "b") as (a, b):
        one, two = await linked(a, b)
        assert (await ask(one, stepping(0, 1, then=(onward(TWO),)), values(1))).pushed
        await hear(two)
        match how:
            case "its peer is lost":
                b.network.kill("b")
            case "its session is closed":
                assert await ask(two, Close(session_id=TWO)) == Closed(session_id=TWO)
            case "its stream ends":
                two.close()
        await asyncio.sleep(0.1)
        assert not (await ask(one, stepping(1, 1, then=(onward(TWO),)), values(1))).pushed
        await asyncio.sleep(1)
        assert len(b.engine.steps) == 1


@in_virtual_time
async def test_a_next_hop_that_takes_nothing_is_soon_not_linked_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("swarm.net.wire.WINDOW_BYTES", 300)
    async with servers("a") as (a,):
        tap = await Tap(a).listen()
        tap.takes = False
        one = await opened(a, ONE)
        await ask(one, link(ONE, tap, TWO))  # type: ignore[arg-type]
        pushed = []
        for _ in range(8):
            result = await ask(one, stepping(0, 4, then=(onward(TWO),)), values(4))
            pushed.append(result.pushed)
            await asyncio.sleep(1)
        assert pushed[0]
        assert not pushed[-1]


@in_virtual_time
async def test_what_the_next_hop_has_no_room_for_is_not_pushed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swarm.net.wire.WINDOW_BYTES", 300)
    monkeypatch.setattr("swarm.net.outbox.MAX_WAITING_BYTES", 700)
    async with servers("a") as (a,):
        tap = await Tap(a).listen()
        tap.takes = False
        one = await opened(a, ONE)
        await ask(one, link(ONE, tap, TWO))  # type: ignore[arg-type]
        results = [await ask(one, stepping(0, 1, then=(onward(TWO),)), values(1)) for _ in range(8)]
        assert [result.pushed for result in results].index(False) <= 5
        assert isinstance(await ask(one, Ping(nonce=1)), Pong)


@pytest.mark.parametrize(
    ("changes", "seconds"),
    [
        ({"to_session": THREE}, 1.0),
        ({"peer": "nobody"}, 1.0),
        ({"peer": "\x1b[2J\n"}, 1.0),
        ({"dtype": "uint32"}, 1.0),
        ({"dtype": "int8"}, 1.0),
        ({"codec": "scaled"}, 1.0),
        ({"codec": "blocks"}, 1.0),
    ],
)
@in_virtual_time
async def test_a_link_that_leads_nowhere_is_refused_and_the_session_goes_on(
    changes: dict[str, Any], seconds: float, caplog: pytest.LogCaptureFixture
) -> None:
    async with servers("a", "b") as (a, b):
        one, _ = await opened(a, ONE), await opened(b, TWO)
        asked = {"to_session": TWO} | changes
        with caplog.at_level("INFO"):
            error = await refusal(one, link(ONE, b, asked.pop("to_session"), **asked))
        assert (error.code, error.message.isprintable()) == ("bad_request", True)
        assert all(record.getMessage().isprintable() for record in caplog.records)
        assert asyncio.get_running_loop().time() < seconds
        assert a.refusals() == {("link", "bad_request"): 1}
        assert not (await ask(one, stepping(0, 1, then=(onward(TWO),)), values(1))).pushed


@in_virtual_time
async def test_who_links_nothing_is_told_so() -> None:
    async with servers("a", "b") as (a, b):
        client = await a.client()
        assert (await refusal(client, link(ONE, b, TWO))).code == "unknown_session"
        await ask(client, opening())
        assert (await refusal(client, link(THREE, b, TWO))).code == "unknown_session"
        assert a.refusals() == {("link", "unknown_session"): 2}


@in_virtual_time
async def test_steps_run_and_pings_are_answered_while_a_link_is_made() -> None:
    async with servers("a", "b") as (a, b):
        one, _ = await opened(a, ONE), await opened(b, TWO)
        a.network.partition(["a"], ["b"])
        await one.send(link(ONE, b, TWO))
        assert isinstance(await ask(one, stepping(0, 1), values(1)), Result)
        assert isinstance(await ask(one, Ping(nonce=1)), Pong)
        error = await hear(one)
        assert (type(error), error.number) == (Error, None)
        assert asyncio.get_running_loop().time() == pytest.approx(10, abs=1)


@in_virtual_time
async def test_a_new_link_takes_the_place_of_the_one_before() -> None:
    async with servers("a", "b", "c") as (a, b, c):
        one, two = await linked(a, b)
        three = await opened(c, THREE)
        assert await ask(one, link(ONE, c, THREE)) == Linked(session_id=ONE)
        assert await hear(two) == Unfed(session_id=TWO)
        assert (await ask(one, stepping(0, 1, then=(onward(THREE),)), values(1))).pushed
        assert isinstance(await hear(three), Result)
        assert not (await ask(one, stepping(1, 1, then=(onward(TWO),)), values(1))).pushed


@in_virtual_time
async def test_links_one_upon_the_other_leave_only_the_last() -> None:
    async with servers("a", "b", "c") as (a, b, c):
        one, two = await linked(a, b)
        await opened(c, THREE)
        for _ in range(3):
            await one.send(link(ONE, c, THREE))
        assert await hear(one) == Linked(session_id=ONE)
        assert await hear(two) == Unfed(session_id=TWO)
        await silence(one)
        assert sum(stream.peer == a.peer for stream in c.transport.streams) == 1


@in_virtual_time
async def test_a_link_whose_closing_is_interrupted_ends_all_the_same() -> None:
    async with servers("a", "b") as (a, b):
        two = await opened(b, TWO)
        made = await onwards.Onward.connect(a.transport, link(ONE, b, TWO))
        closing = asyncio.create_task(made.close())
        await asyncio.sleep(0)
        closing.cancel()
        await asyncio.gather(closing, return_exceptions=True)
        assert await hear(two) == Unfed(session_id=TWO)


@in_virtual_time
async def test_a_new_link_takes_the_place_of_one_that_is_being_made() -> None:
    async with servers("a", "b", "c") as (a, b, c):
        one, two, three = await opened(a, ONE), await opened(b, TWO), await opened(c, THREE)
        a.network.partition(["a"], ["b"])
        await one.send(link(ONE, b, TWO))
        await asyncio.sleep(1)
        assert await ask(one, link(ONE, c, THREE)) == Linked(session_id=ONE)
        for _ in range(5):
            await one.send(link(ONE, c, THREE))
        assert await hear(one) == Linked(session_id=ONE)
        await silence(one, 20)
        assert (await ask(one, stepping(0, 1, then=(onward(THREE),)), values(1))).pushed
        while not isinstance(heard := await hear(three), Result):
            assert heard == Unfed(session_id=THREE)
        await silence(two)
        feeds = [stream for stream in c.transport.streams if stream.peer == a.peer]
        assert len(feeds) == 1, "a link that was replaced is still there"


@in_virtual_time
async def test_the_client_is_told_when_the_feeder_has_gone_and_may_bring_steps_itself() -> None:
    async with servers("a", "b") as (a, b):
        one, two = await linked(a, b)
        await one.send(stepping(0, 1, then=(onward(TWO),)), values(1))
        assert isinstance(await hear(two), Result)
        assert isinstance(await ask(two, Ping(nonce=1)), Pong)
        one.close()
        assert await hear(two) == Unfed(session_id=TWO)
        assert isinstance(await ask(two, stepping(1, 1, TWO), values(1)), Result)
        await silence(two)


@in_virtual_time
async def test_a_new_feed_takes_the_place_of_the_old_one_without_a_word() -> None:
    async with servers("b") as (b,):
        two = await opened(b, TWO)
        old = await feeding(b, TWO, "x")
        new = await feeding(b, TWO, "y")
        with pytest.raises(StreamClosed):
            await hear(old)
        await new.send(stepping(0, 1, TWO, number=3), values(1))
        assert (await hear(two)).number == 3
        await silence(two)
        new.close()
        assert await hear(two) == Unfed(session_id=TWO)
        await silence(two)


@in_virtual_time
async def test_there_is_no_feeding_of_what_is_not_there() -> None:
    async with servers("b", kind=EndingEngine) as (b,):
        feeder = await b.client("feeder")
        assert (await refusal(feeder, Feed(session_id=TWO))).code == "unknown_session"
        with pytest.raises(StreamClosed):
            await hear(feeder)
        two = await opened(b, TWO)
        b.sessions.evict()
        assert (await refusal(await b.client("feeder"), Feed(session_id=TWO))).code == "unknown_session"
        assert b.refusals() == {("feed", "unknown_session"): 2}
        again = await opened(b, TWO)
        feed = await feeding(b, TWO)
        await feed.send(stepping(0, 1, TWO), values(1))
        assert isinstance(await hear(again), Result), "of two streams, the one whose session is open is fed"
        await silence(two)


@in_virtual_time
async def test_a_stream_that_carries_a_session_feeds_none() -> None:
    async with servers("b") as (b,):
        one, two = await opened(b, ONE), await opened(b, TWO)
        await one.send(Feed(session_id=TWO))
        assert (await hear(one)).code == "bad_request"
        with pytest.raises(StreamClosed):
            await hear(one)
        assert b.engine.sessions == {TWO: 20}
        assert isinstance(await ask(two, stepping(0, 1, TWO), values(1)), Result)


@pytest.mark.parametrize(
    ("message", "body"),
    [
        (stepping(0, 1, ONE), values(1)),
        (stepping(0, 1, THREE), values(1)),
        (Ping(nonce=1), b""),
        (Close(session_id=TWO), b""),
        (Feed(session_id=ONE), b""),
        (opening(THREE), b""),
        (Unfed(session_id=TWO), b""),
        (messages.Adopt(session_id=ONE, first=0, end=1, size=2), bytes(2)),
    ],
)
@in_virtual_time
async def test_a_feed_that_brings_anything_else_is_cut_and_harms_nobody(
    message: AnyMessage, body: bytes
) -> None:
    async with servers("b") as (b,):
        one, two = await opened(b, ONE), await opened(b, TWO)
        feed = await feeding(b, TWO)
        await feed.send(message, body)
        with pytest.raises(StreamClosed):
            await hear(feed)
        assert await hear(two) == Unfed(session_id=TWO)
        assert b.engine.steps == []
        assert isinstance(await ask(one, stepping(0, 1, ONE), values(1)), Result)
        assert isinstance(await ask(two, stepping(0, 1, TWO), values(1)), Result)


@in_virtual_time
async def test_a_malformed_frame_ends_a_feed_and_nothing_else() -> None:
    async with servers("b") as (b,):
        two = await opened(b, TWO)
        stream = await b.stream("feeder")
        await ask(MessageStream(stream), Feed(session_id=TWO))
        await stream.send(b"\xff")
        assert await hear(two) == Unfed(session_id=TWO)
        assert isinstance(await ask(two, stepping(0, 1, TWO), values(1)), Result)


@in_virtual_time
async def test_a_gap_is_dropped_without_a_word_if_fed_and_refused_if_the_client_made_it() -> None:
    async with servers("b") as (b,):
        two = await opened(b, TWO)
        feed = await feeding(b, TWO)
        await feed.send(stepping(2, 1, TWO, number=5), values(1))
        await silence(two)
        error = await refusal(two, stepping(2, 1, TWO, number=3), values(1))
        assert (error.code, error.number) == ("bad_request", 3)
        await two.send(stepping(0, 2, TWO, number=4), values(2))
        assert (await hear(two)).number == 4
        await two.send(stepping(2, 1, TWO, number=5), values(1))
        assert (await hear(two)).number == 5, "what was dropped was not taken up"
        await feed.send(stepping(3, 1, TWO, number=6), values(1))
        assert (await hear(two)).number == 6


@in_virtual_time
async def test_a_step_that_both_the_feed_and_the_client_bring_is_answered_once() -> None:
    async with servers("b") as (b,):
        two = await opened(b, TWO)
        feed = await feeding(b, TWO)
        b.engine.seconds = 1.0
        for sender in (feed, two, two, feed):
            await sender.send(stepping(0, 1, TWO, number=1), values(1))
        assert (await hear(two)).number == 1
        await silence(two)
        assert len(b.engine.steps) == 1


@in_virtual_time
async def test_what_is_wrong_with_a_fed_step_is_told_to_the_client() -> None:
    async with servers("b") as (b,):
        two = await opened(b, TWO)
        feed = await feeding(b, TWO)
        await feed.send(stepping(0, 17, TWO, number=1), values(17))
        await feed.send(stepping(0, 1, TWO, number=2, dtype="bfloat16"), bytes(6))
        for number in (1, 2):
            error = await hear(two)
            assert (error.code, error.number) == ("bad_request", number)
        await feed.send(stepping(0, 1, TWO, number=3), values(1))
        assert (await hear(two)).number == 3


@in_virtual_time
async def test_a_body_larger_than_any_step_or_piece_ends_the_feed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swarm.server.sessions.MAX_PIECE_BYTES", 100)
    async with servers("b") as (b,):
        two = await opened(b, TWO)
        feed = await feeding(b, TWO)
        await feed.send(stepping(0, 17, TWO), values(17))
        assert await hear(two) == Unfed(session_id=TWO)
        assert isinstance(await ask(two, stepping(0, 16, TWO), values(16)), Result)


@in_virtual_time
async def test_a_feeder_that_waits_for_nothing_loses_its_stream_and_what_came_is_answered() -> None:
    async with servers("b") as (b,):
        two = await opened(b, TWO)
        feed = await feeding(b, TWO)
        b.engine.seconds = 1.0
        for number in range(1, hosted.MAX_WAITING + 2):
            await feed.send(stepping(0, 1, TWO, number=number), values(1))
        assert await hear(two) == Unfed(session_id=TWO)
        answers = [await hear(two) for _ in range(hosted.MAX_WAITING)]
        assert [answer.number for answer in answers] == list(range(1, hosted.MAX_WAITING + 1))
        assert all(isinstance(answer, Result) for answer in answers)
        await silence(two)


@in_virtual_time
async def test_a_feed_that_waits_for_room_ends_with_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosted, "MAX_WAITING_BYTES", 100)
    async with servers("b") as (b,):
        two = await opened(b, TWO)
        feed = await feeding(b, TWO)
        b.engine.seconds = 1000.0
        for number, tokens in enumerate([1, *[16] * 9], start=1):
            await feed.send(stepping(0, tokens, TWO, number=number), values(tokens))
        await asyncio.sleep(1)
        two.close()
        await asyncio.sleep(1)
        assert not b.engine.sessions
        with pytest.raises(StreamClosed):
            await hear(feed)
        assert not b.transport.streams


@in_virtual_time
async def test_eviction_ends_fed_steps_with_their_numbers_too() -> None:
    async with servers("b", kind=EndingEngine) as (b,):
        two = await opened(b, TWO)
        feed = await feeding(b, TWO)
        b.engine.seconds = 1000.0
        await feed.send(stepping(0, 1, TWO, number=1), values(1))
        await two.send(stepping(1, 1, TWO, number=2), values(1))
        await asyncio.sleep(1)
        b.sessions.evict()
        for number in (1, 2):
            error = await hear(two)
            assert (error.code, error.number) == ("unknown_session", number)
        two.close()


@in_virtual_time
async def test_a_fed_step_that_takes_long_keeps_its_session_too() -> None:
    async with servers("b", idle=600.0) as (b,):
        two = await opened(b, TWO)
        feed = await feeding(b, TWO)
        b.engine.seconds = 1000.0
        await feed.send(stepping(0, 1, TWO, number=1), values(1))
        assert await hear(two, 700) == Unfed(session_id=TWO)
        assert (await hear(two, 700)).number == 1


@in_virtual_time
async def test_a_feed_keeps_its_session_from_falling_idle_and_falls_idle_itself() -> None:
    async with servers("b", idle=600.0) as (b,):
        two = await opened(b, TWO)
        feed = await feeding(b, TWO)
        for number in range(1, 4):
            await asyncio.sleep(500)
            await feed.send(stepping(0, 1, TWO, number=number), values(1))
            assert (await hear(two)).number == number
        assert b.engine.sessions
        await asyncio.sleep(400)
        await ask(two, stepping(0, 1, TWO), values(1))
        assert await hear(two, 300) == Unfed(session_id=TWO)
        assert b.engine.sessions


@pytest.mark.parametrize("seconds", [0.0, 0.01, 0.02, 0.03, 0.05, 5.0, 9.999])
@pytest.mark.parametrize("is_cut", [False, True])
@in_virtual_time
async def test_a_client_that_goes_while_its_hops_are_being_linked_leaves_nothing(
    seconds: float, is_cut: bool
) -> None:
    async with servers("a", "b") as (a, b):
        one, two = await opened(a, ONE), await opened(b, TWO)
        if is_cut:
            a.network.partition(["a"], ["b"])
        await one.send(link(ONE, b, TWO))
        await asyncio.sleep(seconds)
        one.close()
        await asyncio.sleep(1)
        assert not a.engine.sessions
        a.network.heal()
        assert isinstance(await ask(await b.client(), Ping(nonce=1)), Pong)
        two.close()


async def talk(a: Host, b: Host) -> None:
    """A client's conversation with two linked hops, several steps at a time."""
    one, two = await linked(a, b)
    for number in range(1, 4):
        await one.send(stepping(number - 1, 1, number=number, then=(onward(TWO),)), values(1))
    for client in (one, two):
        for number in range(1, 4):
            assert (await hear(client)).number == number
    await ask(one, Close(session_id=ONE))
    assert await hear(two) == Unfed(session_id=TWO)
    await ask(two, Close(session_id=TWO))


@pytest.mark.parametrize("who", ["client", "a", "b"])
def test_whoever_is_lost_at_whatever_moment_leaves_nothing_elsewhere(who: str) -> None:
    moment = 1
    while run_stepping(lose(who, moment)):
        moment += 1
    assert moment > 50, "it did not go through the conversation"


async def lose(who: str, moment: int) -> bool:
    """Lose `who` at that moment of a conversation, unless it ends before; whether it was lost."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, SteppingLoop)
    net = Net()
    net.client("client")
    lost: list[str] = []

    def lose_it() -> None:
        net.network.kill(who)
        lost.append(who)

    async with hosting("a", net) as a, hosting("b", net) as b:
        for host in (a, b):
            host.engine.seconds = 0.02
        loop.act_at(moment, lose_it)
        (error,) = await asyncio.gather(talk(a, b), return_exceptions=True)
        loop.moment = None
        assert lost or error is None
        await net.close()
        await asyncio.sleep(1)
        for host in (a, b):
            assert not host.engine.sessions
            assert not host.transport.streams
    await nothing_left()
    return bool(lost)
