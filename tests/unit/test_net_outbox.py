"""What waits to be sent: its order, its bound, and its end."""

import asyncio
from typing import Any

import pytest

from swarm.net import messages, outbox
from swarm.net.messages import Ping
from swarm.net.outbox import FRAME_BYTES, Outbox
from swarm.net.transport import Buffer, PeerId, StreamClosed
from swarm.net.virtual_time import in_virtual_time

HEADER_BYTES = len(messages.encode(Ping(nonce=1)))


class Reader:
    """Implements `Stream`, as far as one sends: each frame is taken `seconds` after the one before."""

    def __init__(self, seconds: float = 0.0):
        self.peer = PeerId("reader")
        self.seconds = seconds
        self.takes_at_once = False
        self.taken: list[tuple[int, bytes]] = []
        self.is_closed = asyncio.Event()

    def offer(self, header: Buffer, body: Buffer = b"") -> bool:
        if not self.takes_at_once:
            return False
        message: Any = messages.decode(bytes(header))
        self.taken.append((message.nonce, bytes(body)))
        return True

    async def send(self, header: Buffer, body: Buffer = b"") -> None:
        try:
            async with asyncio.timeout(self.seconds):
                await self.is_closed.wait()
            raise StreamClosed("The stream has ended.")
        except TimeoutError:
            message: Any = messages.decode(bytes(header))
            self.taken.append((message.nonce, bytes(body)))

    async def receive(self, max_body: int = 0, takes: Any = None) -> tuple[bytes, memoryview]:
        raise AssertionError("nobody listens here")

    def close(self) -> None:
        self.is_closed.set()


def put(box: Outbox, count: int, body: bytes = b"") -> None:
    for nonce in range(count):
        box.put(Ping(nonce=nonce), body)


@in_virtual_time
async def test_frames_go_out_in_order_and_who_puts_them_does_not_wait() -> None:
    reader = Reader(1.0)
    box = Outbox(reader, 60.0)
    put(box, 3, b"x")
    assert (asyncio.get_running_loop().time(), reader.taken) == (0.0, [])
    await box.flush()
    assert asyncio.get_running_loop().time() == pytest.approx(3.0)
    put(box, 1)
    await box.flush()
    assert reader.taken == [(0, b"x"), (1, b"x"), (2, b"x"), (0, b"")]
    await box.close()


@in_virtual_time
async def test_a_frame_goes_at_once_where_it_can_but_never_before_those_that_wait() -> None:
    reader = Reader(1.0)
    box = Outbox(reader, 60.0)
    reader.takes_at_once = True
    put(box, 1, b"a")
    assert reader.taken == [(0, b"a")]
    reader.takes_at_once = False
    put(box, 1, b"b")
    reader.takes_at_once = True
    put(box, 1, b"c")
    assert reader.taken == [(0, b"a")]
    await box.flush()
    assert [body for _, body in reader.taken] == [b"a", b"b", b"c"]
    await box.close()


@in_virtual_time
async def test_an_outbox_that_was_never_used_ends_as_well() -> None:
    reader = Reader()
    box = Outbox(reader, 60.0)
    assert box.has_room
    await box.flush()
    await box.wait_for_room()
    await box.close()
    assert reader.is_closed.is_set()
    assert not box.is_open


@in_virtual_time
async def test_it_says_when_too_much_waits_and_when_there_is_room_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    frame = FRAME_BYTES + HEADER_BYTES + 100
    monkeypatch.setattr(outbox, "MAX_WAITING_BYTES", 3 * frame)
    box = Outbox(Reader(1.0), 60.0)
    put(box, 3, bytes(100))
    assert box.has_room
    put(box, 2, bytes(100))
    assert not box.has_room
    await box.wait_for_room()
    assert asyncio.get_running_loop().time() == pytest.approx(2.0)
    await box.flush()
    assert box.has_room
    await box.close()


@in_virtual_time
async def test_many_frames_without_bodies_take_room_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "MAX_WAITING_BYTES", 10 * FRAME_BYTES)
    box = Outbox(Reader(1.0), 60.0)
    put(box, 10)
    assert not box.has_room
    await box.close()


@in_virtual_time
async def test_a_frame_that_is_not_taken_in_time_ends_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "MAX_WAITING_BYTES", 100)
    reader = Reader(61.0)
    box = Outbox(reader, 60.0)
    put(box, 5)
    waiting = asyncio.create_task(box.wait_for_room())
    await asyncio.sleep(59)
    assert not waiting.done()
    await asyncio.sleep(2)
    assert waiting.done(), "who waits for room need not wait for ever"
    assert (reader.is_closed.is_set(), box.is_open, reader.taken) == (True, False, [])
    put(box, 5)
    await asyncio.sleep(100)
    assert reader.taken == []
    assert box.has_room


@in_virtual_time
async def test_patience_is_for_each_frame() -> None:
    reader = Reader(50.0)
    box = Outbox(reader, 60.0)
    put(box, 5)
    await asyncio.sleep(251)
    assert len(reader.taken) == 5
    assert box.is_open
    await box.close()


@in_virtual_time
async def test_last_words_wait_no_longer_than_patience() -> None:
    reader = Reader(50.0)
    box = Outbox(reader, 60.0)
    put(box, 5)
    await box.flush()
    assert asyncio.get_running_loop().time() == pytest.approx(60.0)
    assert len(reader.taken) == 1
    await box.close()
    assert len(reader.taken) == 1


@in_virtual_time
async def test_a_stream_that_has_ended_is_noticed_by_sending() -> None:
    reader = Reader(10.0)
    box = Outbox(reader, 60.0)
    put(box, 2)
    await asyncio.sleep(5)
    reader.close()
    await box.flush()
    assert asyncio.get_running_loop().time() == pytest.approx(5.0)
    assert not box.is_open


@pytest.mark.parametrize("at", [0.0, 0.5, 1.0, 1.5])
@in_virtual_time
async def test_closing_at_any_time_leaves_no_task(at: float) -> None:
    reader = Reader(1.0)
    box = Outbox(reader, 60.0)
    put(box, 5)
    await asyncio.sleep(at)
    await box.close()
    box.end()
    await box.close()
    assert asyncio.all_tasks() == {asyncio.current_task()}
    taken = len(reader.taken)
    put(box, 1)
    await asyncio.sleep(10)
    assert len(reader.taken) == taken
