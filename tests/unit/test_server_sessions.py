"""Streams and their sessions, over the in-process network on a virtual clock, with a fake engine."""

import asyncio
import logging
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from swarm.blocks.errors import NoCapacity, StepError
from swarm.net import messages
from swarm.net.calls import MessageStream, Refused, ping
from swarm.net.memory import MemoryNetwork
from swarm.net.messages import Close, Closed, Open, Opened, Pong, Result, Step
from swarm.net.transport import FrameError, Stream, StreamClosed
from swarm.net.virtual_time import in_virtual_time
from swarm.net.wire import Link
from swarm.server.admission import Limits
from swarm.server.cell import OnProgress, ShardCell
from swarm.server.sessions import Sessions
from swarm.spans import Span
from tests.fake_engine import FakeEngine

SPAN = Span(2, 4)
HIDDEN = 3
ONE, TWO = "1" * 32, "2" * 32


@dataclass
class Host:
    """A server's sessions in a network, and clients that ask them."""

    network: MemoryNetwork
    engine: FakeEngine
    cell: ShardCell
    sessions: Sessions
    peer: Any

    async def stream(self, client: str = "client") -> Stream:
        if client not in self.clients:
            self.clients[client] = self.network.transport(client)
        return await self.clients[client].open_stream(self.peer)

    async def client(self, client: str = "client") -> MessageStream:
        return MessageStream(await self.stream(client))

    def __post_init__(self) -> None:
        self.clients: dict[str, Any] = {}


@asynccontextmanager
async def hosting(*, span: Span = SPAN, is_filled: bool = True, **limits: Any) -> AsyncIterator[Host]:
    network = MemoryNetwork(default_link=Link(latency=0.01))
    engine = FakeEngine()

    async def load(on_progress: OnProgress) -> FakeEngine:
        return engine

    cell = ShardCell(span, load)
    sessions = Sessions("m", HIDDEN, cell, Limits(**limits))
    async with network.transport("server") as transport:
        await transport.listen(sessions.on_stream)
        if is_filled:
            await cell.fill()
        host = Host(network, engine, cell, sessions, transport.peer)
        yield host
        for client in host.clients.values():
            await client.close()
    assert not sessions.count
    assert not engine.sessions, "a session outlived its stream"


def opening(session_id: str = ONE, **changes: Any) -> Open:
    asked: dict[str, Any] = {"model_id": "m", "start": 2, "end": 4, "max_tokens": 20} | changes
    return Open(session_id=session_id, **asked)


def stepping(seq_pos: int, tokens: int, session_id: str = ONE, **changes: Any) -> Step:
    asked: dict[str, Any] = {
        "payload_type": "hidden_states",
        "response_type": "hidden_states",
        "shape": (tokens, HIDDEN),
        "dtype": "float32",
    } | changes
    return Step(session_id=session_id, seq_pos=seq_pos, **asked)


def values(tokens: int, value: float = 0.0) -> bytes:
    return array("f", [value] * tokens * HIDDEN).tobytes()


async def ask(client: MessageStream, message: Any, body: bytes = b"") -> Any:
    answer, _ = await client.call(message, body, timeout=30, max_body=10_000)
    return answer


async def refusal(client: MessageStream, message: Any, body: bytes = b"") -> messages.Error:
    with pytest.raises(Refused) as refused:
        await client.call(message, body, timeout=30, max_body=10_000)
    return refused.value.error


@in_virtual_time
async def test_a_session_from_open_to_close() -> None:
    async with hosting() as host:
        client = await host.client()
        opened = await ask(client, opening())
        assert opened == Opened(session_id=ONE, dtype="float32", codec="raw", max_step_tokens=16)
        assert host.engine.kv_tokens_left == 980
        result, body = await client.call(stepping(0, 5), values(5, 1.0), timeout=5, max_body=100)
        assert result == Result(
            session_id=ONE,
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


@pytest.mark.parametrize("header", [b"\xff", messages.encode(Pong(nonce=1))])
@in_virtual_time
async def test_a_message_sent_during_a_step_waits_its_turn_and_a_malformed_one_ends_the_step(
    header: bytes,
) -> None:
    async with hosting() as host:
        host.engine.seconds = 5.0
        stream = await host.stream()
        await stream.send(messages.encode(opening()))
        await stream.send(messages.encode(stepping(0, 1)), values(1))
        await stream.send(messages.encode(messages.Ping(nonce=1)))
        answers = [messages.decode((await stream.receive())[0]) for _ in range(3)]
        assert [type(answer) for answer in answers] == [Opened, Result, Pong]
        await stream.send(messages.encode(stepping(1, 1)), values(1))
        await stream.send(header)
        answer = messages.decode((await stream.receive())[0])
        if header == b"\xff":
            assert isinstance(answer, messages.Error), "it cannot be read, so nothing after it can"
            assert host.engine.dropped == [(ONE, 1)]
        else:
            assert isinstance(answer, Result)


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
async def test_a_peer_that_does_not_read_its_answers_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swarm.net.wire.WINDOW_BYTES", 500)
    async with hosting(send=60.0) as host:
        stream = await host.stream()
        await stream.send(messages.encode(opening()))
        asking = asyncio.create_task(ask_without_reading(stream))
        with pytest.raises(StreamClosed):
            await asking
        assert asyncio.get_running_loop().time() == pytest.approx(60, abs=1)
        assert not host.engine.sessions


async def ask_without_reading(stream: Stream) -> None:
    while True:
        await stream.send(messages.encode(messages.Ping(nonce=1)))


@in_virtual_time
async def test_draining_lets_the_running_step_end_and_takes_no_new_one() -> None:
    async with hosting() as host:
        busy, idle = await host.client("a"), await host.client("b")
        await ask(busy, opening(ONE))
        await ask(idle, opening(TWO))
        host.engine.seconds = 2.0
        running = asyncio.create_task(ask(busy, stepping(0, 1), values(1)))
        await asyncio.sleep(0.5)
        host.cell.move("draining")
        draining = asyncio.create_task(host.sessions.drain(4.0))
        assert (await refusal(idle, stepping(0, 1, TWO), values(1))).code == "draining"
        assert (await refusal(await host.client("c"), opening("3" * 32))).code == "draining"
        assert isinstance(await ask(await host.client("c"), messages.Ping(nonce=1)), Pong)
        assert isinstance(await running, Result)
        await draining
        assert asyncio.get_running_loop().time() < 4
        with pytest.raises(StreamClosed):
            await ask(idle, messages.Ping(nonce=1))


@in_virtual_time
async def test_draining_waits_only_so_long() -> None:
    async with hosting() as host:
        client = await host.client()
        await ask(client, opening())
        host.engine.seconds = 1000.0
        running = asyncio.create_task(client.call(stepping(0, 1), values(1), timeout=1e5))
        await asyncio.sleep(0.5)
        host.cell.move("draining")
        started = asyncio.get_running_loop().time()
        await host.sessions.drain(4.0)
        assert asyncio.get_running_loop().time() - started == pytest.approx(4.0)
        with pytest.raises(StreamClosed):
            await running


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
        (messages.encode(messages.Error(code="internal", message="")), b""),
        (messages.encode(opening()).replace(ONE.encode(), b"z" * 32), b""),
        (messages.encode(messages.Ping(nonce=1)), b"x"),
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
        assert isinstance(answer, messages.Error)
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
        for message in (messages.Ping(nonce=1), opening(), messages.Ping(nonce=2), opening(TWO)):
            await stream.send(messages.encode(message))
        answers = [messages.decode((await stream.receive())[0]) for _ in range(4)]
        assert [type(answer) for answer in answers] == [Pong, Opened, Pong, messages.Error]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await stream.receive()


@in_virtual_time
async def test_evicting_ends_sessions_and_running_steps_with_a_reason_and_keeps_their_streams() -> None:
    async with hosting() as host:
        busy, quiet = await host.client("a"), await host.client("b")
        await ask(busy, opening(ONE))
        await ask(quiet, opening(TWO))
        host.engine.seconds = 1000.0
        running = asyncio.create_task(refusal(busy, stepping(0, 1), values(1)))
        await asyncio.sleep(1)
        host.sessions.evict()
        await host.cell.evict()
        assert (host.sessions.count, host.engine.sessions) == (0, {})
        error = await running
        assert (error.code, "open it again" in error.message) == ("unknown_session", True)
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
        await ask(client, messages.Ping(nonce=1))
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
    ("end", "gives_ids", "expected"), [(4, True, True), (3, True, False), (4, False, False)]
)
@in_virtual_time
async def test_a_token_is_given_after_the_last_block_by_an_engine_that_can(
    end: int, gives_ids: bool, expected: bool
) -> None:
    async with hosting() as host:
        host.engine.gives_token_ids = gives_ids
        client = await host.client()
        opened = await ask(client, opening(end=end))
        assert opened.gives_token_ids == expected
        step = stepping(0, 2, response_type="token_ids")
        values = array("f", [1.0] * 5 + [41.0]).tobytes()
        if not expected:
            assert (await refusal(client, step, values)).code == "bad_request"
            return
        result, body = await client.call(step, values, timeout=5, max_body=100)
        assert isinstance(result, Result)
        assert (result.response_type, result.dtype, result.shape) == ("token_ids", "uint32", (1,))
        assert array("I", body.tobytes()).tolist() == [42]
