"""Streams and their sessions, over the in-process network on a virtual clock, with a fake engine."""

import asyncio
import logging
from array import array
from typing import Any

import pytest

from swarm.blocks.errors import NoCapacity, StepError
from swarm.net import messages
from swarm.net.calls import MessageStream, ping
from swarm.net.forms import tensor_bytes
from swarm.net.messages import Close, Closed, Error, Leaving, Opened, Ping, Pong, Result
from swarm.net.transport import FrameError, Stream, StreamClosed
from swarm.net.virtual_time import in_virtual_time
from swarm.server import hosted
from swarm.spans import Span
from tests.hosting import (
    HIDDEN,
    ONE,
    THREE,
    TWO,
    EndingEngine,
    ask,
    hear,
    hosting,
    opening,
    refusal,
    silence,
    stepping,
    values,
)


@in_virtual_time
async def test_a_session_from_open_to_close() -> None:
    async with hosting() as host:
        client = await host.client()
        opened = await ask(client, opening())
        assert opened == Opened(
            session_id=ONE, dtype="float32", codec="raw", max_step_tokens=16, mirrors=True, goes_round=True
        )
        assert host.engine.kv_tokens_left == 980
        result, body = await client.call(stepping(0, 5, number=1), values(5, 1.0), timeout=5, max_body=100)
        assert result == Result(
            session_id=ONE,
            number=1,
            seq_pos=0,
            response_type="hidden_states",
            shape=(5, HIDDEN),
            dtype="float32",
            queue_ms=1.0,
            compute_ms=2.0,
        )
        assert bytes(body) == values(5, 2.0)
        await ask(client, stepping(5, 1), values(1))
        await ask(client, stepping(2, 2), values(2))
        assert (await refusal(client, stepping(5, 1), values(1))).code == "bad_request"
        await ask(client, stepping(4, 1), values(1))
        assert host.engine.steps == [(ONE, 0, 5), (ONE, 5, 1), (ONE, 2, 2), (ONE, 4, 1)]
        assert await ask(client, Close(session_id=ONE)) == Closed(session_id=ONE)
        assert host.engine.kv_tokens_left == 1000


@in_virtual_time
async def test_two_sessions_interleaved() -> None:
    async with hosting() as host:
        host.engine.seconds = 1.0
        first, second = await host.client("a"), await host.client("b")
        await asyncio.gather(ask(first, opening(ONE)), ask(second, opening(TWO)))
        await asyncio.gather(
            ask(first, stepping(0, 3, ONE), values(3)), ask(second, stepping(0, 2, TWO), values(2))
        )
        await asyncio.gather(
            ask(first, stepping(3, 1, ONE), values(1)), ask(second, stepping(2, 1, TWO), values(1))
        )
        assert sorted(host.engine.steps) == [(ONE, 0, 3), (ONE, 3, 1), (TWO, 0, 2), (TWO, 2, 1)]
        assert host.sessions.count == 2


@pytest.mark.parametrize(
    ("message", "body", "code"),
    [
        (opening(model_id="other"), b"", "model_mismatch"),
        (opening(start=1), b"", "bad_request"),
        (opening(max_tokens=1001), b"", "no_capacity"),
        (Close(session_id=ONE), b"", "unknown_session"),
    ],
)
@in_virtual_time
async def test_what_is_refused_before_a_session_is_open(message: Any, body: bytes, code: str) -> None:
    async with hosting() as host:
        client = await host.client()
        assert (await refusal(client, message, body)).code == code
        assert isinstance(await ask(client, opening()), Opened), "the stream stays usable"


@in_virtual_time
async def test_a_step_without_a_session_ends_its_stream_before_its_body_is_taken() -> None:
    async with hosting() as host:
        client = await host.client()
        with pytest.raises(StreamClosed):
            await client.call(stepping(0, 1), values(1), timeout=5)
        assert await ping(await host.client()) > 0


@pytest.mark.parametrize(
    ("message", "body", "code"),
    [
        (opening(TWO), b"", "bad_request"),
        (stepping(0, 1, TWO), values(1), "unknown_session"),
        (stepping(0, 1, payload_type="token_ids"), values(1), "bad_request"),
        (stepping(0, 1, response_type="logits"), values(1), "bad_request"),
        (stepping(1, 1), values(1), "bad_request"),
        (stepping(0, 2), values(1), "bad_request"),
        (stepping(0, 1, shape=(1, 4)), bytes(16), "bad_request"),
        (stepping(0, 1, dtype="bfloat16"), bytes(6), "bad_request"),
        (stepping(0, 17), values(16), "bad_request"),
        (Close(session_id=TWO), b"", "unknown_session"),
    ],
)
@in_virtual_time
async def test_what_is_refused_inside_a_session_leaves_it_usable(
    message: Any, body: bytes, code: str
) -> None:
    async with hosting() as host:
        client = await host.client()
        await ask(client, opening())
        assert (await refusal(client, message, body)).code == code
        assert isinstance(await ask(client, stepping(0, 1), values(1)), Result)


@in_virtual_time
async def test_a_full_server_says_when_to_come_back() -> None:
    async with hosting() as host:
        await ask(await host.client("a"), opening(ONE, max_tokens=900))
        error = await refusal(await host.client("b"), opening(TWO, max_tokens=200))
        assert (error.code, error.retry_after) == ("no_capacity", 5.0)


@in_virtual_time
async def test_a_peer_may_have_only_so_many_sessions() -> None:
    async with hosting(sessions_per_peer=1) as host:
        first = await host.client("a")
        await ask(first, opening(ONE))
        error = await refusal(await host.client("a"), opening(TWO))
        assert error.code == "no_capacity"
        assert error.retry_after is not None
        assert isinstance(await ask(await host.client("b"), opening(TWO)), Opened)


@in_virtual_time
async def test_a_session_id_in_use_is_refused() -> None:
    async with hosting() as host:
        await ask(await host.client("a"), opening(ONE))
        error = await refusal(await host.client("b"), opening(ONE))
        assert error.code == "bad_request"
        assert host.engine.sessions == {ONE: 20}


@in_virtual_time
async def test_who_comes_early_is_told_to_wait_and_pings_are_answered() -> None:
    async with hosting(is_filled=False) as host:
        client = await host.client()
        error = await refusal(client, opening())
        assert error.code == "warming_up"
        assert error.retry_after is not None
        assert await ping(client, clock=asyncio.get_running_loop().time) == pytest.approx(0.02)
        await host.cell.fill()
        assert isinstance(await ask(client, opening()), Opened)


@in_virtual_time
async def test_a_disconnect_frees_the_session() -> None:
    async with hosting() as host:
        client = await host.client()
        await ask(client, opening())
        client.close()
        await asyncio.sleep(1)
        assert not host.engine.sessions


@in_virtual_time
async def test_a_disconnect_cancels_the_running_step_and_frees_the_session_at_once() -> None:
    async with hosting() as host:
        client = await host.client()
        await ask(client, opening())
        host.engine.seconds = 1000.0
        await client.send(stepping(0, 1), values(1))
        await asyncio.sleep(1)
        client.close()
        await asyncio.sleep(0.02)
        assert host.engine.dropped == [(ONE, 0)]
        assert not host.engine.sessions


@in_virtual_time
async def test_a_ping_is_answered_while_a_step_runs_with_what_was_taken_up() -> None:
    async with hosting() as host:
        client = await host.client()
        assert (await ask(client, Ping(nonce=1))).taken == 0
        await ask(client, opening())
        host.engine.seconds = 5.0
        await client.send(stepping(0, 1, number=7), values(1))
        await client.send(Ping(nonce=1))
        assert await hear(client, 1.0) == Pong(nonce=1, taken=7)
        await client.send(stepping(1, 1, number=9), values(1))
        await client.send(Ping(nonce=2))
        assert await hear(client, 1.0) == Pong(nonce=2, taken=9), "one that waits is in good hands"
        assert [(await hear(client)).number for _ in range(2)] == [7, 9]
        assert (await ask(client, Ping(nonce=3))).taken == 9


@pytest.mark.parametrize("header", [b"\xff", messages.encode(Pong(nonce=1))])
@in_virtual_time
async def test_a_message_that_has_no_place_here_ends_the_running_step(header: bytes) -> None:
    async with hosting() as host:
        stream = await host.stream()
        client = MessageStream(stream)
        await ask(client, opening())
        host.engine.seconds = 5.0
        await client.send(stepping(0, 1), values(1))
        await asyncio.sleep(1)
        await stream.send(header)
        assert isinstance(await hear(client, 1.0), Error), "it cannot be read, so nothing after it can"
        assert host.engine.dropped == [(ONE, 0)]
        assert not host.engine.sessions


@in_virtual_time
async def test_an_idle_session_is_freed() -> None:
    async with hosting(idle=600.0) as host:
        client = await host.client()
        await ask(client, opening())
        await asyncio.sleep(590)
        await ask(client, stepping(0, 1), values(1))
        await asyncio.sleep(590)
        assert host.engine.sessions
        await asyncio.sleep(20)
        assert not host.engine.sessions
        with pytest.raises(StreamClosed):
            await client.call(stepping(1, 1), values(1), timeout=5)


@in_virtual_time
async def test_pings_do_not_keep_a_session_but_a_long_step_does() -> None:
    async with hosting(idle=600.0) as host:
        client = await host.client()
        await ask(client, opening())
        host.engine.seconds = 1000.0
        await client.call(stepping(0, 1), values(1), timeout=2000, max_body=100)
        ended_at = asyncio.get_running_loop().time()
        for _ in range(5):
            await asyncio.sleep(100)
            await ping(client)
        assert host.engine.sessions
        with pytest.raises(StreamClosed):
            await stream_ended(client)
        assert asyncio.get_running_loop().time() - ended_at == pytest.approx(600, abs=1)
        assert not host.engine.sessions


async def stream_ended(client: MessageStream) -> None:
    while True:
        await ping(client)
        await asyncio.sleep(0.5)


@in_virtual_time
async def test_a_stream_of_pings_stays() -> None:
    async with hosting(idle=600.0) as host:
        client = await host.client()
        for _ in range(20):
            await asyncio.sleep(500)
            await ping(client)


@in_virtual_time
async def test_a_frame_that_never_arrives_does_not_keep_a_session(monkeypatch: pytest.MonkeyPatch) -> None:
    async with hosting(idle=600.0) as host:
        client = await host.client()
        await ask(client, opening())
        host.network.set_link("client", "server", bandwidth=0.001)
        sending = asyncio.create_task(client.send(stepping(0, 1), values(1)))
        await asyncio.sleep(601)
        assert not host.engine.sessions
        await asyncio.gather(sending, return_exceptions=True)


@in_virtual_time
async def test_a_session_begins_with_what_the_server_has_kept_of_its_pages_for_this_client() -> None:
    async with hosting() as host:
        host.engine.max_step_tokens = 64
        keys = bytes(range(48))
        first = await host.client()
        opened = await ask(first, opening(max_tokens=100, page_keys=keys))
        assert opened.held == 0
        await first.call(stepping(0, 64, page_keys=keys[:32]), values(64), timeout=5, max_body=1000)
        second = await host.client()
        opened = await ask(second, opening(TWO, max_tokens=100, page_keys=keys, priority="bulk"))
        assert opened.held == 64
        assert host.engine.clients[TWO] == (host.clients["client"].peer, "bulk")
        assert (await refusal(second, stepping(65, 1, TWO), values(1))).code == "bad_request"
        assert isinstance(await ask(second, stepping(64, 1, TWO), values(1)), Result)
        stranger = await host.client("stranger")
        assert (await ask(stranger, opening("3" * 32, max_tokens=100, page_keys=keys))).held == 0


@pytest.mark.parametrize(
    ("span", "start", "takes_ids", "expected"),
    [(Span(0, 4), 0, True, True), (Span(0, 4), 1, True, False), (Span(0, 4), 0, False, False)],
)
@in_virtual_time
async def test_token_ids_are_taken_from_the_first_block_on_by_an_engine_that_can(
    span: Span, start: int, takes_ids: bool, expected: bool
) -> None:
    async with hosting(span=span) as host:
        host.engine.takes_token_ids = takes_ids
        client = await host.client()
        opened = await ask(client, opening(start=start))
        assert opened.takes_token_ids == expected
        step = stepping(0, 2, payload_type="token_ids", shape=(2,), dtype="uint32")
        ids = array("I", [7, 9]).tobytes()
        if not expected:
            assert (await refusal(client, step, ids)).code == "bad_request"
            return
        result, body = await client.call(step, ids, timeout=5, max_body=100)
        assert isinstance(result, Result)
        assert result.shape == (2, HIDDEN)
        assert bytes(body) == array("f", [7.0] * HIDDEN + [9.0] * HIDDEN).tobytes()


@in_virtual_time
async def test_a_step_without_room_leaves_the_session_open_where_the_step_began() -> None:
    async with hosting() as host:
        client = await host.client()
        await ask(client, opening())
        await ask(client, stepping(0, 4), values(4))
        host.engine.failure = NoCapacity("full", 3.0)
        error = await refusal(client, stepping(2, 4), values(4))
        assert (error.code, error.message, error.retry_after) == ("no_capacity", "full", 3.0)
        assert (await refusal(client, stepping(3, 1), values(1))).code == "bad_request"
        assert isinstance(await ask(client, stepping(2, 4), values(4)), Result)
        assert host.engine.sessions == {ONE: 20}


@in_virtual_time
async def test_a_peer_that_does_not_read_its_pongs_is_dropped_before_they_take_much(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("swarm.net.wire.WINDOW_BYTES", 500)
    monkeypatch.setattr("swarm.net.outbox.MAX_WAITING_BYTES", 100_000)
    async with hosting(send=60.0) as host:
        stream = await host.stream()
        await stream.send(messages.encode(opening()))
        sent = await send_without_reading(stream, Ping(nonce=1))
        assert asyncio.get_running_loop().time() == pytest.approx(60, abs=1)
        assert not host.engine.sessions
        assert sent < 500, "what is not answered is not read either"


@in_virtual_time
async def test_a_peer_that_does_not_read_its_results_lets_steps_wait_and_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("swarm.net.wire.WINDOW_BYTES", 500)
    monkeypatch.setattr("swarm.net.outbox.MAX_WAITING_BYTES", 2_000)
    async with hosting(send=60.0) as host:
        client = await host.client()
        await ask(client, opening())
        host.engine.seconds = 1.0
        await send_steps(client, 40)
        await asyncio.sleep(50)
        assert host.engine.sessions
        assert len(host.engine.steps) < 12, "a step whose result has no room waits"
        await asyncio.sleep(20)
        assert not host.engine.sessions


async def send_steps(client: MessageStream, count: int) -> None:
    for number in range(1, count + 1):
        await client.send(stepping(0, 16, number=number), values(16))


async def send_without_reading(stream: Stream, message: Ping) -> int:
    """How many of it the other end has taken until it closed the stream."""
    sent = 0
    try:
        while True:
            await stream.send(messages.encode(message))
            sent += 1
    except StreamClosed:
        return sent


@in_virtual_time
async def test_steps_are_answered_in_order_without_waiting_for_each_other() -> None:
    async with hosting() as host:
        client = await host.client()
        await ask(client, opening())
        host.engine.seconds = 1.0
        started = asyncio.get_running_loop().time()
        for number, (seq_pos, tokens) in enumerate([(0, 3), (3, 1), (2, 2), (4, 1)], start=1):
            await client.send(stepping(seq_pos, tokens, number=number), values(tokens, float(number)))
        for number in range(1, 5):
            result, body = await client.receive()
            assert isinstance(result, Result)
            assert result.number == number
            assert bytes(body) == values(result.shape[0], number + 1.0)
        assert asyncio.get_running_loop().time() - started == pytest.approx(4.02)
        assert host.engine.steps == [(ONE, 0, 3), (ONE, 3, 1), (ONE, 2, 2), (ONE, 4, 1)]


@in_virtual_time
async def test_a_step_that_comes_twice_is_ignored_and_so_is_an_older_one() -> None:
    async with hosting() as host:
        client = await host.client()
        await ask(client, opening())
        for number in (5, 5, 4, 6, 5):
            await client.send(stepping(0, 1, number=number), values(1))
        assert [(await hear(client)).number for _ in range(2)] == [5, 6]
        await silence(client)
        assert len(host.engine.steps) == 2


@in_virtual_time
async def test_a_step_after_one_that_failed_is_refused_by_its_own_number() -> None:
    async with hosting() as host:
        client = await host.client()
        await ask(client, opening())
        host.engine.seconds, host.engine.failure = 1.0, NoCapacity("full", 3.0)
        for number, seq_pos in ((1, 0), (2, 2), (3, 0)):
            await client.send(stepping(seq_pos, 2, number=number), values(2))
        full, gap, result = [await hear(client) for _ in range(3)]
        assert (full.code, full.retry_after, full.number) == ("no_capacity", 3.0, 1)
        assert (gap.code, gap.number) == ("bad_request", 2)
        assert "gap" in gap.message
        assert (type(result), result.number) == (Result, 3)
        assert host.refusals() == {("step", "no_capacity"): 1, ("step", "bad_request"): 1}


@in_virtual_time
async def test_who_sends_on_and_on_without_waiting_loses_the_stream_and_nobody_else_does() -> None:
    async with hosting() as host:
        good, bad = await host.client("a"), await host.client("b")
        await ask(good, opening(ONE))
        await ask(bad, opening(TWO))
        host.engine.seconds = 10.0
        for number in range(1, hosted.MAX_WAITING + 2):
            await bad.send(stepping(0, 1, TWO, number=number), values(1))
        error = await hear(bad, 1.0)
        assert isinstance(error, Error)
        assert (error.code, str(hosted.MAX_WAITING) in error.message) == ("bad_request", True)
        with pytest.raises(StreamClosed):
            await bad.receive()
        assert host.engine.sessions == {ONE: 20}
        assert isinstance(await ask(good, stepping(0, 1), values(1)), Result)


@in_virtual_time
async def test_as_many_steps_as_may_wait_are_all_answered() -> None:
    async with hosting() as host:
        client = await host.client()
        await ask(client, opening())
        host.engine.seconds = 0.1
        for number in range(1, hosted.MAX_WAITING + 1):
            await client.send(stepping(0, 1, number=number), values(1))
        answers = [await hear(client) for _ in range(hosted.MAX_WAITING)]
        assert [answer.number for answer in answers] == list(range(1, hosted.MAX_WAITING + 1))
        assert all(isinstance(answer, Result) for answer in answers)


@in_virtual_time
async def test_bodies_that_wait_are_bounded_in_bytes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosted, "MAX_WAITING_BYTES", 500)
    async with hosting() as host:
        client = await host.client()
        await ask(client, opening())
        host.engine.seconds = 1.0
        for number in range(1, 21):
            await client.send(stepping(0, 16, number=number), values(16))
        await client.send(Ping(nonce=1))
        answers = [await hear(client) for _ in range(21)]
        at = next(at for at, answer in enumerate(answers) if isinstance(answer, Pong))
        assert at >= 15, "it is not read before there is room for the steps ahead of it"
        assert sum(isinstance(answer, Result) for answer in answers) == 20


@pytest.mark.parametrize("seconds", [0.5, 1.5, 2.5])
@in_virtual_time
async def test_a_stream_that_ends_while_steps_run_and_wait_leaves_nothing(seconds: float) -> None:
    async with hosting() as host:
        client = await host.client()
        await ask(client, opening())
        host.engine.seconds = 1.0
        for number in range(1, 11):
            await client.send(stepping(0, 1, number=number), values(1))
        await asyncio.sleep(seconds)
        client.close()
        await asyncio.sleep(0.02)
        assert not host.engine.sessions
        steps = len(host.engine.steps)
        await asyncio.sleep(10)
        assert len(host.engine.steps) == steps


@in_virtual_time
async def test_closing_ends_what_runs_and_waits_and_the_stream_can_be_used_again() -> None:
    async with hosting() as host:
        client = await host.client()
        await ask(client, opening())
        host.engine.seconds = 1.0
        for number in (1, 2, 3):
            await client.send(stepping(0, 1, number=number), values(1))
        await asyncio.sleep(0.5)
        assert await ask(client, Close(session_id=ONE)) == Closed(session_id=ONE)
        assert host.engine.dropped == [(ONE, 0)]
        assert isinstance(await ask(client, opening()), Opened)
        assert (await ask(client, stepping(0, 1, number=1), values(1))).number == 1


@in_virtual_time
async def test_a_draining_server_says_so_and_serves_its_sessions_until_they_have_gone() -> None:
    async with hosting() as host:
        busy, quiet = await host.client("a"), await host.client("b")
        await ask(busy, opening(ONE))
        await ask(quiet, opening(TWO))
        host.engine.seconds = 2.0
        await busy.send(stepping(0, 1, number=1), values(1))
        await asyncio.sleep(0.5)
        host.cell.move("draining")
        draining = asyncio.create_task(host.sessions.drain(30.0, 4.0))
        assert await hear(busy) == Leaving(session_id=ONE)
        assert await hear(quiet) == Leaving(session_id=TWO)
        assert (await refusal(await host.client("c"), opening(THREE))).code == "draining"
        assert isinstance(await ask(await host.client("c"), Ping(nonce=1)), Pong)
        assert (await hear(busy)).number == 1
        assert isinstance(await ask(quiet, stepping(0, 1, TWO), values(1)), Result)
        assert await ask(quiet, Close(session_id=TWO)) == Closed(session_id=TWO)
        assert not draining.done()
        assert await ask(busy, Close(session_id=ONE)) == Closed(session_id=ONE), "said before all ends"
        await draining
        with pytest.raises(StreamClosed):
            await ask(quiet, Ping(nonce=1))


@in_virtual_time
async def test_draining_waits_as_long_as_sessions_go_one_after_the_other() -> None:
    async with hosting() as host:
        clients = [await host.client() for _ in range(4)]
        for at, client in enumerate(clients):
            await ask(client, opening(str(at) * 32))
        clock = asyncio.get_running_loop().time
        host.cell.move("draining")
        started = clock()
        draining = asyncio.create_task(host.sessions.drain(30.0, 4.0))
        for client in clients[:3]:
            await asyncio.sleep(3.9)
            client.close()
        await draining
        assert clock() - started == pytest.approx(3 * 3.9 + 4, abs=0.1), "the last one did not go"


@pytest.mark.parametrize(("grace", "patience"), [(30.0, 4.0), (2.0, 4.0)])
@in_virtual_time
async def test_draining_waits_only_so_long(grace: float, patience: float) -> None:
    async with hosting() as host:
        client = await host.client()
        await ask(client, opening())
        host.engine.seconds = 1000.0
        await client.send(stepping(0, 1), values(1))
        await asyncio.sleep(0.5)
        host.cell.move("draining")
        started = asyncio.get_running_loop().time()
        await host.sessions.drain(grace, patience)
        assert asyncio.get_running_loop().time() - started == pytest.approx(min(grace, patience))
        assert isinstance(await hear(client), Leaving)
        with pytest.raises(StreamClosed):
            await hear(client)


@in_virtual_time
async def test_a_failed_step_is_answered_and_the_session_ends_where_it_began() -> None:
    async with hosting() as host:
        client = await host.client()
        await ask(client, opening())
        await ask(client, stepping(0, 4), values(4))
        host.engine.failure = StepError("bad_request", "no")
        assert (await refusal(client, stepping(2, 1), values(1))).message == "no"
        assert (await refusal(client, stepping(3, 1), values(1))).code == "bad_request"
        assert isinstance(await ask(client, stepping(2, 1), values(1)), Result)


@in_virtual_time
async def test_a_bug_of_ours_is_answered_and_logged_with_session_and_peer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with hosting() as host:
        client = await host.client()
        await ask(client, opening())
        host.engine.failure = ZeroDivisionError("oops")
        with caplog.at_level(logging.ERROR):
            error = await refusal(client, stepping(0, 1), values(1))
        assert error.code == "internal"
        assert "oops" not in error.message
        assert ONE in caplog.text
        assert str(host.clients["client"].peer) in caplog.text
        assert isinstance(await ask(client, stepping(0, 1), values(1)), Result)


@pytest.mark.parametrize(
    ("header", "body"),
    [
        (b"\xff", b""),
        (b"\x00" * 100, b""),
        (b"\x81" * 60_000, b""),
        (messages.encode(Pong(nonce=1)), b""),
        (messages.encode(Error(code="internal", message="")), b""),
        (messages.encode(opening()).replace(ONE.encode(), b"z" * 32), b""),
        (messages.encode(Ping(nonce=1)), b"x"),
    ],
)
@in_virtual_time
async def test_a_malformed_frame_ends_that_stream_with_the_reason_and_nothing_else(
    header: bytes, body: bytes
) -> None:
    async with hosting() as host:
        good = await host.client("a")
        await ask(good, opening())
        bad = await host.stream("b")
        await bad.send(messages.encode(opening(TWO)))
        await bad.receive()
        await bad.send(header, body)
        reason, _ = await bad.receive()
        answer = messages.decode(reason)
        assert isinstance(answer, Error)
        assert answer.code == "bad_request"
        with pytest.raises(StreamClosed):
            await bad.receive()
        assert host.engine.sessions == {ONE: 20}
        assert isinstance(await ask(good, stepping(0, 1), values(1)), Result)


@in_virtual_time
async def test_a_body_larger_than_the_session_can_use_is_not_taken() -> None:
    async with hosting() as host:
        stream = await host.stream()
        await stream.send(messages.encode(opening(max_tokens=4)))
        await stream.receive()
        await stream.send(messages.encode(stepping(0, 5)), values(5))
        with pytest.raises((StreamClosed, FrameError)):
            await stream.receive()
        await asyncio.sleep(1)
        assert not host.engine.sessions


@in_virtual_time
async def test_every_message_gets_one_answer_in_order() -> None:
    async with hosting() as host:
        stream = await host.stream()
        for message in (Ping(nonce=1), opening(), Ping(nonce=2), opening(TWO)):
            await stream.send(messages.encode(message))
        answers = [messages.decode((await stream.receive())[0]) for _ in range(4)]
        assert [type(answer) for answer in answers] == [Pong, Opened, Pong, Error]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await stream.receive()


@in_virtual_time
async def test_evicting_ends_sessions_and_all_their_steps_with_a_reason_and_keeps_their_streams() -> None:
    async with hosting(engine=EndingEngine()) as host:
        busy, quiet = await host.client("a"), await host.client("b")
        await ask(busy, opening(ONE))
        await ask(quiet, opening(TWO))
        host.engine.seconds = 1000.0
        for number, seq_pos in ((1, 0), (2, 1), (3, 2)):
            await busy.send(stepping(seq_pos, 1, number=number), values(1))
        await asyncio.sleep(1)
        host.sessions.evict()
        await host.cell.evict()
        assert (host.sessions.count, host.engine.sessions) == (0, {})
        for number in (1, 2, 3):
            error = await hear(busy)
            assert (error.code, error.number) == ("unknown_session", number)
            assert "open it again" in error.message
        assert host.engine.dropped == [(ONE, 0)]
        assert (await refusal(quiet, stepping(0, 16, TWO), values(16))).code == "unknown_session"
        assert isinstance(await ask(quiet, Close(session_id=TWO)), Closed)


@in_virtual_time
async def test_only_an_opening_that_could_be_served_wakes_a_cell_and_then_the_stream_can_be_used() -> None:
    async with hosting() as host:
        client = await host.client()
        await ask(client, opening())
        host.sessions.evict()
        await host.cell.evict()
        for wrong in (opening(model_id="other"), opening(start=1), opening(page_keys=b"x")):
            assert (await refusal(client, wrong)).code != "warming_up"
        await refusal(client, stepping(0, 1), values(1))
        await ask(client, Ping(nonce=1))
        assert host.cell.is_asleep
        error = await refusal(client, opening(max_tokens=40))
        assert (error.code, error.retry_after is not None) == ("warming_up", True)
        assert not host.cell.is_asleep
        await host.cell.fill()
        assert (await refusal(client, stepping(0, 1), values(1))).code == "unknown_session"
        await ask(client, opening(max_tokens=40))
        assert isinstance(await ask(client, stepping(0, 1), values(1)), Result)
        assert host.engine.sessions == {ONE: 40}


@pytest.mark.parametrize("at", [0.005, 0.015, 0.025, 1.0, 2.0, 3.0, 3.015])
@in_virtual_time
async def test_ending_the_server_at_any_time_frees_everything(at: float) -> None:
    async with hosting() as host:
        host.engine.seconds = 1.0

        async def talk() -> None:
            client = await host.client()
            await ask(client, opening())
            for position in range(3):
                await ask(client, stepping(position, 1), values(1))

        talking = asyncio.create_task(talk())
        await asyncio.sleep(at)
    with pytest.raises(Exception):  # noqa: B017, PT011 - the stream, the peer: whatever is lost first
        await talking


@pytest.mark.parametrize(
    ("end", "gives_ids", "rows", "expected"),
    [(4, True, 1, [42]), (4, True, 0, [7, 42]), (3, True, 1, []), (4, False, 1, [])],
)
@in_virtual_time
async def test_tokens_are_given_after_the_last_block_by_an_engine_that_can(
    end: int, gives_ids: bool, rows: int, expected: list[int]
) -> None:
    async with hosting() as host:
        host.engine.gives_token_ids = gives_ids
        client = await host.client()
        opened = await ask(client, opening(end=end))
        assert opened.gives_token_ids == bool(expected)
        step = stepping(0, 2, response_type="token_ids", rows=rows)
        values = array("f", [1.0, 6.0, 2.0, 1.0, 1.0, 41.0]).tobytes()
        if not expected:
            assert (await refusal(client, step, values)).code == "bad_request"
            return
        result, body = await client.call(step, values, timeout=5, max_body=100)
        assert isinstance(result, Result)
        assert (result.response_type, result.dtype, result.shape) == ("token_ids", "uint32", (len(expected),))
        assert array("I", body.tobytes()).tolist() == expected


@in_virtual_time
async def test_the_answer_is_for_the_last_rows_that_were_asked_for() -> None:
    async with hosting() as host:
        client = await host.client()
        await ask(client, opening())
        body = values(3, 1.0) + values(2, 5.0)
        result, given = await client.call(stepping(0, 5, rows=2), body, timeout=5, max_body=100)
        assert isinstance(result, Result)
        assert (result.shape, bytes(given)) == ((2, HIDDEN), values(2, 6.0))
        error = await refusal(client, stepping(5, 1, rows=2), values(1))
        assert (error.code, "no 2 of them" in error.message) == ("bad_request", True)


@pytest.mark.parametrize(
    ("wire", "dtype", "codec"),
    [("exact", "float32", "raw"), ("half", "float16", "scaled"), ("int8", "int8", "blocks")],
)
@in_virtual_time
async def test_activations_travel_as_the_session_wishes(wire: Any, dtype: str, codec: str) -> None:
    async with hosting() as host:
        client = await host.client()
        opened = await ask(client, opening(wire=wire))
        assert (opened.dtype, opened.codec) == (dtype, codec)
        size = tensor_bytes((1, HIDDEN), opened.dtype, opened.codec)
        step = stepping(0, 1, dtype=dtype, codec=codec)
        result = await ask(client, step, bytes(size))
        assert (result.dtype, result.codec) == (dtype, codec)


@in_virtual_time
async def test_a_session_that_was_evicted_and_opened_again_on_its_stream_is_one_session() -> None:
    async with hosting(engine=EndingEngine()) as host:
        client = await host.client()
        for _ in range(3):
            await ask(client, opening())
            host.engine.seconds = 1000.0
            await client.send(stepping(0, 1), values(1))
            await asyncio.sleep(1)
            host.sessions.evict()
            assert (await hear(client)).code == "unknown_session"
            host.engine.seconds = 0.0
        await ask(client, opening())
        assert (await ask(client, stepping(0, 1, number=1), values(1))).number == 1
        names = [task.get_name() for task in asyncio.all_tasks()]
        assert names.count(f"session {ONE}") == 1


@in_virtual_time
async def test_a_step_that_waits_for_long_does_not_let_its_stream_fall_idle() -> None:
    async with hosting(idle=600.0) as host:
        client = await host.client()
        await ask(client, opening())
        host.engine.seconds = 1000.0
        for number in (1, 2):
            await client.send(stepping(0, 1, number=number), values(1))
        for number in (1, 2):
            async with asyncio.timeout(1100):
                result, _ = await client.receive()
            assert isinstance(result, Result)
            assert result.number == number
        await asyncio.sleep(590)
        assert host.engine.sessions
        await asyncio.sleep(20)
        assert not host.engine.sessions


@in_virtual_time
async def test_a_breach_frees_the_session_before_its_reason_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swarm.net.wire.WINDOW_BYTES", 500)
    async with hosting() as host:
        stream = await host.stream()
        client = MessageStream(stream)
        await ask(client, opening())
        for number in range(1, 5):
            await client.send(stepping(0, 16, number=number), values(16))
        await asyncio.sleep(1)
        await stream.send(b"\xff")
        await asyncio.sleep(1)
        assert not host.engine.sessions
        await asyncio.sleep(120)


@in_virtual_time
async def test_each_refusal_is_counted_once() -> None:
    async with hosting(sessions_per_peer=1) as host:
        client = await host.client()
        await refusal(client, opening(model_id="other"))
        await ask(client, opening())
        await refusal(client, opening(TWO))
        await refusal(await host.client(), opening(TWO))
        await refusal(client, stepping(5, 1), values(1))
        await refusal(client, stepping(0, 1, TWO), values(1))
        host.engine.failure = StepError("broken", "no")
        await refusal(client, stepping(0, 1), values(1))
        await refusal(client, Close(session_id=TWO))
        assert host.refusals() == {
            ("open", "model_mismatch"): 1,
            ("open", "bad_request"): 1,
            ("open", "no_capacity"): 1,
            ("step", "bad_request"): 1,
            ("step", "unknown_session"): 1,
            ("step", "internal"): 1,
            ("close", "unknown_session"): 1,
        }
