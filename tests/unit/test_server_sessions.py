"""Streams and their sessions, over the in-process network on a virtual clock, with a fake engine."""

import asyncio
import logging
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from swarm.blocks.errors import StepError
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
async def hosting(*, is_filled: bool = True, **limits: Any) -> AsyncIterator[Host]:
    network = MemoryNetwork(default_link=Link(latency=0.01))
    engine = FakeEngine()

    async def load(on_progress: OnProgress) -> FakeEngine:
        return engine

    cell = ShardCell(SPAN, load)
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
async def test_a_disconnect_during_a_step_frees_the_session_when_the_step_is_done() -> None:
    async with hosting() as host:
        client = await host.client()
        await ask(client, opening())
        host.engine.seconds = 5.0
        await client.send(stepping(0, 1), values(1))
        await asyncio.sleep(1)
        client.close()
        await asyncio.sleep(5)
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
