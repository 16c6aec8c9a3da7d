import asyncio
import random
import tracemalloc

import msgspec
import pytest

from swarm.net import framing, messages
from swarm.net.calls import MessageStream
from swarm.net.memory import MemoryNetwork
from swarm.net.transport import MAX_BODY_BYTES, MAX_HEADER_BYTES, FrameError, StreamClosed
from swarm.net.virtual_time import in_virtual_time

SESSION = "0123456789abcdef" * 2
STEP = messages.Step(
    number=1,
    session_id=SESSION,
    seq_pos=0,
    payload_type="token_ids",
    response_type="logits",
    shape=(3,),
    dtype="uint32",
)
ALL = [
    messages.Ping(nonce=7),
    messages.Pong(nonce=7),
    messages.Open(session_id=SESSION, model_id="m", start=0, end=2, max_tokens=10),
    messages.Opened(session_id=SESSION, dtype="bfloat16", codec="scaled", max_step_tokens=5),
    STEP,
    messages.Result(
        number=1,
        session_id=SESSION,
        seq_pos=0,
        response_type="logits",
        shape=(3, 9),
        dtype="float16",
        codec="scaled",
    ),
    messages.Link(
        session_id=SESSION, peer="p", addresses=("/a",), to_session=SESSION, dtype="int8", codec="blocks"
    ),
    messages.Linked(session_id=SESSION),
    messages.Feed(session_id=SESSION),
    messages.Fed(session_id=SESSION),
    messages.Unfed(session_id=SESSION),
    messages.Leaving(session_id=SESSION),
    messages.HandOver(session_id=SESSION, peer="p", addresses=(), to_session=SESSION),
    messages.HandedOver(session_id=SESSION, tokens=3),
    messages.Adopt(session_id=SESSION, first=0, end=3, size=12),
    messages.Adopted(session_id=SESSION),
    messages.Close(session_id=SESSION),
    messages.Closed(session_id=SESSION),
    messages.Error(code="no_capacity", message="Full.", retry_after=1.5),
]


def reader_of(data: bytes) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    return reader


async def read(data: bytes, max_body: int = MAX_BODY_BYTES) -> tuple[messages.AnyMessage, bytes]:
    """What a peer does with the bytes of one frame."""
    reader = reader_of(data)
    header, body = await framing.read_frame(reader, await framing.read_lengths(reader, max_body))
    return messages.decode(header), bytes(body)


def frame(header: bytes, body: bytes = b"") -> bytes:
    return framing.LENGTHS.pack(len(header), len(body)) + header + body


@pytest.mark.parametrize("message", ALL, ids=lambda message: type(message).__name__)
async def test_every_message_comes_back(message):
    assert await read(frame(messages.encode(message), b"body")) == (message, b"body")


def test_body_lengths():
    assert messages.body_bytes(STEP) == 12
    assert messages.body_bytes(ALL[5]) == 3 * 9 * 2 + 3 * 4


def test_a_later_field_is_ignored():
    fields = msgspec.msgpack.decode(messages.encode(STEP)) | {"sent_at": 1.5}
    assert messages.decode(msgspec.msgpack.encode(fields)) == STEP


@pytest.mark.parametrize(
    "changes",
    [
        {"type": "nonsense"},
        {"type": None},
        {"session_id": "0" * 31},
        {"session_id": "g" * 32},
        {"session_id": "0" * 32 + "\n"},
        {"session_id": 5},
        {"seq_pos": -1},
        {"seq_pos": 2**31 + 1},
        {"seq_pos": 1.5},
        {"shape": []},
        {"shape": [0]},
        {"shape": [-1]},
        {"shape": [1, 2, 3]},
        {"shape": "1"},
        {"shape": [2**62]},
        {"dtype": "float64"},
        {"codec": "pickle"},
        {"payload_type": "text"},
        {"response_type": 1},
    ],
    ids=str,
)
def test_wrong_fields(changes):
    fields = msgspec.msgpack.decode(messages.encode(STEP)) | changes
    with pytest.raises(FrameError):
        messages.decode(msgspec.msgpack.encode(fields))


@pytest.mark.parametrize("missing", ["type", "session_id", "seq_pos", "shape", "dtype"])
def test_missing_fields(missing):
    fields = msgspec.msgpack.decode(messages.encode(STEP))
    del fields[missing]
    with pytest.raises(FrameError):
        messages.decode(msgspec.msgpack.encode(fields))


@pytest.mark.parametrize(
    ("header_bytes", "body_bytes"),
    [(0, 0), (MAX_HEADER_BYTES + 1, 0), (2**32 - 1, 0), (1, 101), (1, MAX_BODY_BYTES + 1), (1, 2**32 - 1)],
)
async def test_lengths_are_checked_before_anything_is_read(header_bytes, body_bytes):
    with pytest.raises(FrameError):
        await framing.read_lengths(reader_of(framing.LENGTHS.pack(header_bytes, body_bytes)), max_body=100)


async def test_a_body_that_is_announced_but_never_sent_costs_no_memory():
    tracemalloc.start()
    try:
        readers = [asyncio.StreamReader() for _ in range(20)]
        for reader in readers:
            reader.feed_data(framing.LENGTHS.pack(1, MAX_BODY_BYTES) + b"hello")
        reading = [asyncio.create_task(read_from(reader)) for reader in readers]
        await asyncio.sleep(0.01)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    for reader in readers:
        reader.feed_eof()
    assert all(
        isinstance(end, StreamClosed) for end in await asyncio.gather(*reading, return_exceptions=True)
    )
    assert peak < 1024 * 1024


async def read_from(reader: asyncio.StreamReader):
    return await framing.read_frame(reader, await framing.read_lengths(reader))


async def test_a_frame_cut_anywhere_ends_the_stream():
    whole = frame(messages.encode(STEP), bytes(12))
    for length in range(len(whole)):
        with pytest.raises(StreamClosed):
            await read(whole[:length])


def malformed(luck: random.Random) -> bytes:
    """Bytes such as a broken, foreign or hostile peer may send."""
    good = frame(messages.encode(luck.choice(ALL)), luck.randbytes(luck.randrange(40)))
    kind = luck.randrange(6)
    if kind == 0:
        return luck.randbytes(luck.randrange(200))
    if kind == 1:
        return frame(luck.randbytes(luck.randrange(1, 200)))
    if kind == 2:  # some bytes changed
        data = bytearray(good)
        for _ in range(luck.randrange(1, 5)):
            data[luck.randrange(len(data))] = luck.randrange(256)
        return bytes(data)
    if kind == 3:  # msgpack that announces a huge map, array, string or extension
        start = luck.choice([b"\xdf", b"\xdd", b"\xdb", b"\xc6", b"\xc9"])
        return frame(start + luck.choice([b"\xff\xff\xff\xff", b"\x00\xff\xff\xff"]) + luck.randbytes(20))
    if kind == 4:  # deep nesting
        return frame(luck.choice([b"\x91", b"\x81\xa1x", b"\x82\xa4type\xa4ping\xa1x"]) * 10_000)
    return luck.choice([b"GET / HTTP/1.1\r\n\r\n", b"\x13/multistream/1.0.0\n", b"\x80\x04\x95"]) + good


async def test_malformed_frames_give_one_of_two_errors_and_take_no_memory():
    luck = random.Random(2)
    sentences: list[str] = []
    outcomes = {FrameError: 0, StreamClosed: 0, None: 0}
    tracemalloc.start()
    try:
        for _ in range(2000):
            try:
                message, _ = await read(malformed(luck))
            except (FrameError, StreamClosed) as error:
                outcomes[type(error)] += 1
                sentences.append(error.message)
            else:
                outcomes[None] += 1
                assert type(message) in map(type, ALL)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert all(len(sentence) < 500 and sentence.isprintable() for sentence in sentences)
    assert outcomes[FrameError] > 500
    assert outcomes[StreamClosed] > 20
    assert peak < 4 * 1024 * 1024


@in_virtual_time
async def test_a_peer_that_gets_malformed_messages_goes_on_serving():
    luck = random.Random(3)
    ends = []

    async def on_stream(stream):
        messages_of_peer = MessageStream(stream)
        try:
            while True:
                message, _ = await messages_of_peer.receive(max_body=100)
                await messages_of_peer.send(messages.Pong(nonce=message.nonce))
        except (FrameError, StreamClosed) as error:
            ends.append(type(error))

    network = MemoryNetwork()
    a, b = network.transport("a"), network.transport("b")
    await b.listen(on_stream)
    for _ in range(300):
        stream = await a.open_stream(b.peer)
        await stream.send(luck.randbytes(luck.randrange(1, 100)), luck.randbytes(luck.randrange(200)))
        with pytest.raises(StreamClosed):
            await stream.receive()
    assert ends == [FrameError] * 300
    stream = MessageStream(await a.open_stream(b.peer))
    assert (await stream.call(messages.Ping(nonce=7), timeout=1))[0] == messages.Pong(nonce=7)


class FakeWriter:
    """Stands in for a stream's writer and remembers each write."""

    def __init__(self):
        self.writes = []

    def write(self, data):
        self.writes.append(bytes(data))

    async def drain(self):
        pass

    def is_closing(self):
        return False


@pytest.mark.parametrize("size", [0, 1, 64 * 1024, 64 * 1024 + 1, 1024 * 1024])
async def test_written_frames_are_read_again(size):
    body = random.Random(size).randbytes(size)
    for buffer in (body, bytearray(body), memoryview(body)):
        writer = FakeWriter()
        await framing.write_frame(writer, b"header", buffer)
        reader = reader_of(b"".join(writer.writes))
        lengths = await framing.read_lengths(reader)
        assert await framing.read_frame(reader, lengths) == (b"header", body)
        assert len(writer.writes) == (1 if size <= 64 * 1024 else 2)


async def test_a_body_of_wider_items_counts_in_bytes():
    writer = FakeWriter()
    await framing.write_frame(writer, b"h", memoryview(bytes(12)).cast("I"))
    assert framing.LENGTHS.unpack(writer.writes[0][:8]) == (1, 12)
