import asyncio

import pytest
from msgspec.structs import replace

from swarm.net import messages
from swarm.net.calls import CallTimeout, MessageStream, Refused, ping
from swarm.net.memory import MemoryNetwork
from swarm.net.transport import FrameError, StreamClosed
from swarm.net.virtual_time import in_virtual_time
from swarm.net.wire import Link

SESSION = "0123456789abcdef" * 2
OTHER_SESSION = "f" * 32
OPEN = messages.Open(session_id=SESSION, model_id="m", start=0, end=2, max_tokens=10)
OPENED = messages.Opened(session_id=SESSION, dtype="float32", codec="raw", max_step_tokens=5)
STEP = messages.Step(
    session_id=SESSION,
    number=7,
    seq_pos=3,
    payload_type="hidden_states",
    response_type="hidden_states",
    shape=(2, 4),
    dtype="float32",
)
RESULT = messages.Result(
    session_id=SESSION, number=7, seq_pos=3, response_type="hidden_states", shape=(2, 4), dtype="float32"
)
LINK = messages.Link(
    session_id=SESSION, peer="p", addresses=(), to_session=OTHER_SESSION, dtype="float32", codec="raw"
)
HAND_OVER = messages.HandOver(session_id=SESSION, peer="p", addresses=(), to_session=OTHER_SESSION)
ADOPT = messages.Adopt(session_id=SESSION, first=0, end=2, size=8)


async def talk_to(answer, latency=0.0):
    """A message stream to a peer that calls `answer(MessageStream)` over and over."""

    async def on_stream(stream):
        while True:
            await answer(MessageStream(stream))

    network = MemoryNetwork(default_link=Link(latency=latency))
    a, b = network.transport("a"), network.transport("b")
    await b.listen(on_stream)
    return MessageStream(await a.open_stream(b.peer))


def always(message, body=b""):
    """Answers every question with the same message."""

    async def answer(stream):
        await stream.receive()
        await stream.send(message, body)

    return answer


async def pong(stream):
    question, _ = await stream.receive()
    await stream.send(messages.Pong(nonce=question.nonce))


@in_virtual_time
async def test_ping_measures_the_round_trip():
    stream = await talk_to(pong, latency=0.035)
    clock = asyncio.get_running_loop().time
    assert await ping(stream, clock=clock) == pytest.approx(0.07)
    assert await ping(stream, nonce=99, clock=clock) == pytest.approx(0.07)


@in_virtual_time
async def test_a_step_and_its_result():
    stream = await talk_to(always(RESULT, bytes(range(32))))
    answer, body = await stream.call(STEP, bytes(32), timeout=1, max_body=32)
    assert (answer, body) == (RESULT, bytes(range(32)))


@pytest.mark.parametrize("change", [{"number": 8}, {"seq_pos": 4}, {"session_id": OTHER_SESSION}])
@in_virtual_time
async def test_the_result_of_another_step_closes_the_stream(change):
    stream = await talk_to(always(replace(RESULT, **change), bytes(32)))
    with pytest.raises(FrameError):
        await stream.call(STEP, bytes(32), timeout=1, max_body=32)
    with pytest.raises(StreamClosed):
        await stream.receive()


@pytest.mark.parametrize(
    ("question", "body", "answer"),
    [
        (LINK, b"", messages.Linked(session_id=SESSION)),
        (messages.Feed(session_id=SESSION), b"", messages.Fed(session_id=SESSION)),
        (HAND_OVER, b"", messages.HandedOver(session_id=SESSION, tokens=5)),
        (ADOPT, bytes(8), messages.Adopted(session_id=SESSION)),
    ],
)
@in_virtual_time
async def test_what_hops_are_asked_besides_steps(question, body, answer):
    stream = await talk_to(always(answer))
    assert (await stream.call(question, body, timeout=1))[0] == answer


@in_virtual_time
async def test_kv_that_is_not_as_long_as_it_says_is_not_taken():
    stream = await talk_to(always(ADOPT, bytes(7)))
    await stream.send(messages.Ping(nonce=1))
    with pytest.raises(FrameError, match="7 bytes instead of 8"):
        await stream.receive()


@in_virtual_time
async def test_a_refusal_is_raised_and_the_stream_goes_on():
    error = messages.Error(code="warming_up", message="Loading.\x1b[2J", retry_after=2.5)
    stream = await talk_to(always(error))
    for _ in range(2):
        with pytest.raises(Refused) as raised:
            await stream.call(OPEN, timeout=1)
        assert raised.value.error == error
        assert raised.value.peer == stream.peer
        assert "Loading." in raised.value.message
        assert raised.value.message.isprintable()


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        (OPEN, messages.Closed(session_id=SESSION)),
        (OPEN, OPEN),
        (messages.Close(session_id=SESSION), messages.Closed(session_id=OTHER_SESSION)),
        (messages.Ping(nonce=1), messages.Pong(nonce=2)),
        (messages.Pong(nonce=1), messages.Pong(nonce=1)),
        (LINK, messages.Fed(session_id=SESSION)),
        (LINK, messages.Linked(session_id=OTHER_SESSION)),
        (HAND_OVER, messages.HandedOver(session_id=OTHER_SESSION, tokens=1)),
        (HAND_OVER, messages.Adopted(session_id=SESSION)),
        (messages.Feed(session_id=SESSION), messages.Unfed(session_id=SESSION)),
    ],
)
@in_virtual_time
async def test_an_answer_that_does_not_belong_closes_the_stream(question, answer):
    stream = await talk_to(always(answer))
    with pytest.raises(FrameError):
        await stream.call(question, timeout=1)
    with pytest.raises(StreamClosed):
        await stream.receive()


@pytest.mark.parametrize("size", [0, 31, 33])
@in_virtual_time
async def test_a_body_must_have_the_announced_length(size):
    stream = await talk_to(always(RESULT, bytes(size)))
    with pytest.raises(FrameError, match="32"):
        await stream.call(STEP, bytes(32), timeout=1, max_body=1000)
    with pytest.raises(StreamClosed):
        await stream.send(STEP, bytes(32))


@in_virtual_time
async def test_a_body_larger_than_asked_for_is_refused():
    stream = await talk_to(always(RESULT, bytes(32)))
    with pytest.raises(FrameError, match="31"):
        await stream.call(STEP, bytes(32), timeout=1, max_body=31)


@in_virtual_time
async def test_a_body_after_a_message_that_has_none():
    stream = await talk_to(always(OPENED, b"x"))
    with pytest.raises(FrameError):
        await stream.call(OPEN, timeout=1, max_body=100)


@in_virtual_time
async def test_a_timeout_closes_the_stream():
    async def answer_late(stream):
        await asyncio.sleep(10)
        await pong(stream)

    stream = await talk_to(answer_late)
    clock = asyncio.get_running_loop()
    with pytest.raises(CallTimeout, match="3 seconds"):
        await ping(stream, timeout=3)
    assert clock.time() == pytest.approx(3)
    with pytest.raises(StreamClosed):
        await ping(stream)


@in_virtual_time
async def test_a_cancelled_call_closes_the_stream():
    stream = await talk_to(lambda stream: asyncio.sleep(10))
    call = asyncio.create_task(ping(stream))
    await asyncio.sleep(1)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    with pytest.raises(StreamClosed):
        await ping(stream)


@in_virtual_time
async def test_calls_take_turns_and_who_waits_in_vain_harms_nobody():
    async def answer_slowly(stream):
        question, _ = await stream.receive()
        await asyncio.sleep(2)
        await stream.send(messages.Pong(nonce=question.nonce))

    stream = await talk_to(answer_slowly)
    clock = asyncio.get_running_loop().time
    first = asyncio.create_task(ping(stream, nonce=1, clock=clock))
    await asyncio.sleep(0)
    second = asyncio.create_task(ping(stream, nonce=2, clock=clock))
    with pytest.raises(CallTimeout):
        await ping(stream, timeout=1)
    assert await asyncio.gather(first, second) == [pytest.approx(2), pytest.approx(4)]


@in_virtual_time
async def test_a_lost_peer_ends_the_call():
    async def leave(stream):
        await stream.receive()
        stream.close()

    stream = await talk_to(leave)
    with pytest.raises(StreamClosed):
        await ping(stream, timeout=100)
    assert asyncio.get_running_loop().time() == 0
