"""Shortcuts over real sockets on loopback; a pair of connected ones stands for the libp2p daemons."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from swarm.net import libp2p_stream, sealed_connection, shortcut_port, shortcuts
from swarm.net.framing import LENGTHS, SMALL_BODY
from swarm.net.libp2p_stream import Libp2pStream
from swarm.net.sealed_connection import LENGTH, MAX_PIECE_BYTES, Pieces, PieceSeal
from swarm.net.shortcut_port import GREETING_BYTES, ShortcutPort, greeting
from swarm.net.shortcut_turns import LIVELY_FRAMES, LIVELY_PAUSE, AcceptorsTurn, OpenersTurn
from swarm.net.shortcut_words import ASK, OVER, Offer
from swarm.net.shortcuts import Shortcuts
from swarm.net.transport import FrameError, PeerId, StreamClosed

HOST = "127.0.0.1"
SIZES = (0, 1, 1152, SMALL_BODY, SMALL_BODY + 1, 3 * MAX_PIECE_BYTES)
PATIENCE = 20.0


@dataclass
class Ends:
    """Both ends of one stream, and what each has of shortcuts."""

    opener: Libp2pStream
    acceptor: Libp2pStream
    openers: Shortcuts
    acceptors: Shortcuts

    @property
    def port(self) -> ShortcutPort:
        assert self.acceptors._port is not None
        return self.acceptors._port

    @property
    def both(self) -> tuple[Libp2pStream, Libp2pStream]:
        return self.opener, self.acceptor

    async def turn(self) -> None:
        """Say things to and fro until all goes by a shortcut."""
        async with asyncio.timeout(PATIENCE):
            while not self.are_short:
                await self.echo(b"to and fro")

    @property
    def are_short(self) -> bool:
        return all(end.is_short and end._connection is not None for end in self.both)

    async def echo(self, body: bytes) -> None:
        for one, other in (self.both, self.both[::-1]):
            _, heard = await asyncio.gather(one.send(b"header", body), other.receive())
            assert heard == (b"header", body)


@asynccontextmanager
async def ends(hosts: tuple[str, ...] = (HOST,), *, offers: bool = True) -> AsyncIterator[Ends]:
    async def hosts_of(peer: PeerId) -> tuple[str, ...]:
        return hosts

    async with AsyncExitStack() as stack:
        openers, acceptors = Shortcuts((), 0, hosts_of), Shortcuts((HOST,) if offers else (), 0, hosts_of)
        for one in (openers, acceptors):
            one.listen()
            stack.push_async_callback(one.close)
        made = []
        for name, one in zip(("acceptor", "opener"), socket.socketpair(), strict=True):
            reader, writer = await asyncio.open_unix_connection(sock=one)
            made.append(Libp2pStream(PeerId(name), "/some/shortcuts", reader, writer, set()))
            stack.callback(made[-1].close)
        opener, acceptor = made
        opener.turn, acceptor.turn = OpenersTurn(opener, openers), AcceptorsTurn(acceptor, acceptors)
        yield Ends(opener, acceptor, openers, acceptors)


@dataclass
class Stranger:
    """Who sits on the way of a shortcut: sees all that passes, and may pass on something else.

    `meddle` gets the pieces of the opener's direction that have come, and returns those to pass on.
    """

    meddle: Callable[[list[bytes]], list[bytes]] = lambda pieces: pieces
    seen: bytearray = field(default_factory=bytearray)

    @asynccontextmanager
    async def before(self, port: ShortcutPort) -> AsyncIterator[None]:
        real = port.port

        async def between(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            inner_reader, inner_writer = await asyncio.open_connection(HOST, real)
            writers.update({writer, inner_writer})
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._pass_back(inner_reader, writer))
                tasks.create_task(self._pass_on(reader, inner_writer))

        writers: set[asyncio.StreamWriter] = set()

        server = await asyncio.start_server(between, HOST, 0)
        port.port = server.sockets[0].getsockname()[1]
        try:
            yield
        finally:
            server.close()
            for writer in writers:
                writer.transport.abort()
            await asyncio.gather(*(one.wait_closed() for one in writers), return_exceptions=True)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            first = await reader.readexactly(GREETING_BYTES)
            self.seen += first
            writer.write(first)
            pieces: list[bytes] = []
            while True:
                length = await reader.readexactly(LENGTH.size)
                pieces.append(length + await reader.readexactly(*LENGTH.unpack(length)))
                self.seen += pieces[-1]
                if through := self.meddle(pieces):
                    writer.write(b"".join(through))
                    pieces = []
        except (EOFError, OSError):
            pass
        finally:
            writer.close()

    async def _pass_back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(2**16):
                self.seen += data
                writer.write(data)
        except OSError:
            pass
        finally:
            writer.close()


async def test_frames_of_both_directions_stay_in_order_while_it_turns():
    async with ends() as stream:
        enough = asyncio.Event()

        async def speak(end: Libp2pStream) -> int:
            number = 0
            while not enough.is_set():
                body = number.to_bytes(4) * (SIZES[number % len(SIZES)] // 4)
                if number % 2 or not end.offer(b"%d" % number, body):
                    await end.send(b"%d" % number, body)
                number += 1
                await asyncio.sleep(0)
            await end.send(b"end")
            return number

        async def hear(end: Libp2pStream) -> int:
            number = after = 0
            while (frame := await end.receive())[0] != b"end":
                body = number.to_bytes(4) * (SIZES[number % len(SIZES)] // 4)
                assert frame == (b"%d" % number, body)
                number += 1
                after += stream.are_short
                if after > 100:
                    enough.set()
            return number

        async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as tasks:
            speaking = [tasks.create_task(speak(end)) for end in stream.both]
            hearing = [tasks.create_task(hear(end)) for end in stream.both[::-1]]
        assert [one.result() for one in speaking] == [one.result() for one in hearing]


async def test_bodies_of_all_sizes_and_frames_offered():
    async with ends() as stream:
        await stream.turn()
        for size in (*SIZES, 5_000_001):
            await stream.echo(os.urandom(size))
        assert stream.opener.offer(b"at once", bytes(SMALL_BODY))
        assert await stream.acceptor.receive() == (b"at once", bytes(SMALL_BODY))
        assert not stream.opener.offer(b"too large", bytes(SMALL_BODY + 1))
        for end in stream.both:
            made = end._writer.transport.get_extra_info("socket")
            assert made.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert made.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


async def test_a_slow_reader_holds_its_sender_up():
    async with ends() as stream:
        await stream.turn()
        sent = 0

        async def send_forever() -> None:
            nonlocal sent
            while True:
                await stream.opener.send(b"x", bytes(2**20))
                sent += 1

        sending = asyncio.create_task(send_forever())
        before = -1
        while sent > before:
            before = sent
            await asyncio.sleep(0.1)
        assert not sending.done()
        for _ in range(sent + 5):
            await stream.acceptor.receive()
        assert sent > before
        sending.cancel()


async def test_a_receive_cancelled_between_frames_loses_nothing():
    async with ends() as stream:
        await stream.turn()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await stream.opener.receive()
        await stream.echo(b"all the same")


@pytest.mark.parametrize("is_short", [True, False])
async def test_frames_are_shown_as_they_come_until_one_is_not_taken(is_short):
    async with ends() as stream:
        if is_short:
            await stream.turn()
        shown: list[bytes] = []

        def takes(header: bytes, body: memoryview) -> bool:
            assert body == header * 1000
            shown.append(header)
            return header != b"c"

        receiving = asyncio.create_task(stream.acceptor.receive(takes=takes))
        for header in (b"a", b"b", b"c", b"d"):
            await stream.opener.send(header, header * 1000)
        async with asyncio.timeout(PATIENCE):
            assert await receiving == (b"c", b"c" * 1000)
            assert shown == [b"a", b"b", b"c"]
            assert await stream.acceptor.receive() == (b"d", b"d" * 1000)
        await stream.echo(b"goes on")


@pytest.mark.parametrize("is_short", [True, False])
async def test_what_taking_a_frame_raises_is_raised_where_one_receives(is_short):
    def takes(header: bytes, body: memoryview) -> bool:
        raise ZeroDivisionError

    async with ends() as stream:
        if is_short:
            await stream.turn()
        await stream.opener.send(b"x")
        with pytest.raises(ZeroDivisionError):
            async with asyncio.timeout(PATIENCE):
                await stream.acceptor.receive(takes=takes)
        await stream.echo(b"goes on")


async def test_who_stops_listening_while_taking_a_frame_is_shown_no_more():
    async with ends() as stream:
        await stream.turn()
        shown: list[bytes] = []

        def takes(header: bytes, body: memoryview) -> bool:
            shown.append(header)
            receiving.cancel()
            return True

        receiving = asyncio.create_task(stream.acceptor.receive(takes=takes))
        await asyncio.sleep(0)
        stream.opener._writer.write(b"".join(LENGTHS.pack(1, 0) + header for header in (b"a", b"b")))
        async with asyncio.timeout(PATIENCE):
            with pytest.raises(asyncio.CancelledError):
                await receiving
            assert shown == [b"a"]
            assert await stream.acceptor.receive() == (b"b", b"")


async def test_who_closes_the_stream_while_taking_a_frame_is_shown_no_more():
    async with ends() as stream:
        await stream.turn()
        shown: list[bytes] = []

        def takes(header: bytes, body: memoryview) -> bool:
            shown.append(header)
            stream.acceptor.close()
            return True

        stream.opener._writer.write(b"".join(LENGTHS.pack(1, 0) + header for header in (b"a", b"b")))
        with pytest.raises(StreamClosed):
            async with asyncio.timeout(PATIENCE):
                await stream.acceptor.receive(takes=takes)
        assert shown == [b"a"]


async def test_a_receive_cancelled_within_a_frame_closes_the_stream():
    async with ends() as stream:
        await stream.turn()
        stream.opener._writer.write(LENGTHS.pack(1, 10) + b"xhalf")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await stream.acceptor.receive()
        with pytest.raises(StreamClosed):
            async with asyncio.timeout(PATIENCE):
                await stream.opener.receive()


async def test_what_is_too_large_closes_the_stream():
    async with ends() as stream:
        await stream.turn()
        await stream.opener.send(b"x", bytes(11))
        with pytest.raises(FrameError):
            await stream.acceptor.receive(max_body=10)
        with pytest.raises(StreamClosed):
            await stream.opener.receive()


@pytest.mark.parametrize("closes", ["opener", "acceptor"])
async def test_a_close_is_noticed_and_nothing_sent_before_is_lost(closes):
    async with ends() as stream:
        await stream.turn()
        one, other = stream.both if closes == "opener" else stream.both[::-1]
        await other.send(b"never read", bytes(100_000))  # TCP would forget the rest because of it
        sending = asyncio.create_task(one.send(b"large", bytes(8_000_000)))
        await asyncio.sleep(0)
        one.close()
        async with asyncio.timeout(PATIENCE):
            assert await other.receive() == (b"large", bytes(8_000_000))
            with pytest.raises(StreamClosed):
                await other.receive()
        await asyncio.gather(sending, return_exceptions=True)
        for end in stream.both:
            for use in (end.receive, lambda end=end: end.send(b"x")):
                with pytest.raises(StreamClosed):
                    await use()
            assert not end.offer(b"x")
        async with asyncio.timeout(PATIENCE):
            while stream.port._open or stream.openers._dialled:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


async def test_a_receive_that_waits_hears_of_its_own_end():
    async with ends() as stream:
        await stream.turn()
        receiving = asyncio.create_task(stream.opener.receive())
        await asyncio.sleep(0)
        stream.opener.close()
        with pytest.raises(StreamClosed):
            await receiving


@pytest.mark.parametrize("dies", ["opener", "acceptor"])
async def test_a_shortcut_that_breaks_ends_its_stream(dies):
    async with ends() as stream:
        await stream.turn()
        one, other = stream.both if dies == "opener" else stream.both[::-1]
        one._writer.transport.abort()
        async with asyncio.timeout(PATIENCE):
            with pytest.raises(StreamClosed):
                await other.receive()


async def test_where_the_daemons_part_ends_the_stream_does(monkeypatch):
    monkeypatch.setattr(libp2p_stream, "LINGER", 0.05)
    async with ends() as stream:
        await stream.turn()
        stream.acceptor._daemon[1].transport.abort()
        async with asyncio.timeout(PATIENCE):
            with pytest.raises(StreamClosed):
                await stream.opener.receive()


async def test_what_came_before_the_daemons_end_is_read_in_ones_own_time(monkeypatch):
    monkeypatch.setattr(libp2p_stream, "LINGER", 0.25)
    async with ends() as stream:
        await stream.turn()
        bodies = [os.urandom(100_000) for _ in range(20)]
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(*(stream.acceptor.send(b"x", body) for body in bodies))
        stream.acceptor.close()
        for body in bodies:
            assert await stream.opener.receive() == (b"x", body)
            await asyncio.sleep(0.04)


async def test_who_says_little_asks_for_none():
    async with ends() as stream:
        turn = stream.opener.turn
        assert isinstance(turn, OpenersTurn)
        now = 1000.0
        turn._clock = lambda: now
        for _ in range(3 * LIVELY_FRAMES):
            await stream.echo(b"ping")
            now += LIVELY_PAUSE + 1
        assert not turn._has_asked
        for _ in range(LIVELY_FRAMES):
            await stream.echo(b"step")
        assert turn._has_asked


async def test_who_only_listens_asks_too():
    async with ends() as stream:
        for _ in range(LIVELY_FRAMES):
            await stream.acceptor.send(b"result")
            await stream.opener.receive()
        turn = stream.opener.turn
        assert isinstance(turn, OpenersTurn)
        assert turn._has_asked


async def test_who_offers_none_is_spoken_to_all_the_same():
    async with ends(offers=False) as stream:
        for _ in range(3 * LIVELY_FRAMES):
            await stream.echo(b"as ever")
        assert not any(end.is_short for end in stream.both)
        assert stream.openers.is_worth_asking(stream.opener.peer)


async def nobody(port: ShortcutPort) -> socket.socket:
    """A port where nobody listens, in place of that one."""
    taken = socket.socket()
    taken.bind((HOST, 0))
    port.port = taken.getsockname()[1]
    return taken


async def somebody_silent(port: ShortcutPort) -> socket.socket:
    taken = await nobody(port)
    taken.listen()
    return taken


async def until_dialled(stream: Ends) -> None:
    """Talk on until the opener has tried to connect."""
    turn = stream.opener.turn
    assert isinstance(turn, OpenersTurn)
    async with asyncio.timeout(PATIENCE):
        while turn._dialling is None or not turn._dialling.done():
            await stream.echo(b"meanwhile")


@pytest.mark.parametrize("what", [nobody, somebody_silent])
async def test_what_cannot_be_reached_delays_nothing_and_is_remembered(what, monkeypatch):
    monkeypatch.setattr(shortcuts, "DIAL_TIME", 0.1)
    async with ends() as stream:
        with await what(stream.port):
            for _ in range(LIVELY_FRAMES):
                await stream.echo(b"as ever")
            await until_dialled(stream)
        await stream.echo(b"afterwards")
        assert not any(end.is_short for end in stream.both)
        assert not stream.openers.is_worth_asking(stream.opener.peer)
        assert not stream.openers._dialled


async def test_who_is_at_no_host_is_not_dialled():
    async with ends(hosts=()) as stream:
        for _ in range(3 * LIVELY_FRAMES):
            await stream.echo(b"as ever")
        assert not stream.openers.is_worth_asking(stream.opener.peer)


async def test_another_host_is_tried_where_one_is_wrong():
    async with ends(hosts=("127.0.0.9", HOST)) as stream:
        await stream.turn()


async def until_the_end(end: Libp2pStream) -> AsyncIterator[tuple[bytes, memoryview]]:
    """All frames that come before the stream ends."""
    with suppress(StreamClosed):
        while True:
            yield await end.receive()


async def answer_to(port: int, said: bytes) -> bytes:
    """What somebody hears until the end who says this to the port."""
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(said)
    try:
        async with asyncio.timeout(PATIENCE):
            return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


async def test_nobody_gets_in_but_who_was_offered(monkeypatch):
    monkeypatch.setattr(shortcut_port, "GREETING_TIME", 0.1)
    async with ends() as stream:
        connected: list[object] = []
        offer = stream.port.offer(connected.append)
        assert offer is not None
        wrong_key = PieceSeal(offer.to_opener)
        wrong_id = Offer(offer.port, os.urandom(16), offer.to_acceptor, offer.to_opener)
        wrong_content = offer.id + PieceSeal(offer.to_acceptor).close(bytes(16))
        for said in (
            b"",
            b"GET / HTTP/1.1\r\n\r\n",
            os.urandom(1000),
            offer.id,
            offer.id + bytes(GREETING_BYTES),
            greeting(offer, wrong_key),
            greeting(wrong_id, PieceSeal(offer.to_acceptor)),
            wrong_content,
        ):
            assert await answer_to(stream.port.port, said) == b""
        assert not connected
        assert not stream.port._greeting
        right = greeting(offer, PieceSeal(offer.to_acceptor))
        assert await answer_to(stream.port.port, right[:-1]) == b""
        reader, writer = await asyncio.open_connection(HOST, stream.port.port)
        writer.write(right)
        length = await reader.readexactly(LENGTH.size)
        sealed = await reader.readexactly(*LENGTH.unpack(length))
        assert PieceSeal(offer.to_opener).open(sealed) == offer.id
        assert len(connected) == 1
        assert await answer_to(stream.port.port, right) == b"", "an offer is good once"
        assert len(connected) == 1
        writer.close()


async def test_few_may_be_without_a_greeting(monkeypatch):
    monkeypatch.setattr(shortcut_port, "MAX_GREETING", 2)
    async with ends() as stream:
        waiting = [await asyncio.open_connection(HOST, stream.port.port) for _ in range(2)]
        async with asyncio.timeout(PATIENCE):
            while len(stream.port._greeting) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert await answer_to(stream.port.port, b"") == b""
        for _, writer in waiting:
            assert not writer.is_closing()
            writer.close()
        await stream.turn()


async def test_offers_are_few_and_hold_a_moment(monkeypatch):
    monkeypatch.setattr(shortcut_port, "MAX_SHORTCUTS", 2)
    monkeypatch.setattr(shortcut_port, "OFFER_TIME", 0.05)
    async with ends() as stream:
        first, second = (stream.port.offer(lambda connection: None) for _ in range(2))
        assert first is not None
        assert second is not None
        assert stream.port.offer(lambda connection: None) is None
        stream.port.withdraw(first)
        assert stream.port.offer(lambda connection: None) is not None
        async with asyncio.timeout(PATIENCE):
            while stream.port._waiting:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


async def test_a_stranger_on_the_way_reads_nothing():
    stranger = Stranger()
    async with ends() as stream, stranger.before(stream.port):
        await stream.turn()
        await stream.echo(b"something that nobody else may read")
        assert len(stranger.seen) > 2 * GREETING_BYTES
        assert b"nobody else" not in stranger.seen
        assert b"header" not in stranger.seen


def flipped(pieces: list[bytes]) -> list[bytes]:
    return [pieces[0][:-1] + bytes([pieces[0][-1] ^ 1]), *pieces[1:]]


def lengthened(pieces: list[bytes]) -> list[bytes]:
    return [LENGTH.pack(len(pieces[0]) - LENGTH.size + 1) + pieces[0][LENGTH.size :], *pieces[1:]]


def huge(pieces: list[bytes]) -> list[bytes]:
    return [LENGTH.pack(2**32 - 1) + pieces[0]]


def empty(pieces: list[bytes]) -> list[bytes]:
    return [LENGTH.pack(0), *pieces]


def repeated(pieces: list[bytes]) -> list[bytes]:
    return [pieces[0], pieces[0]]


def swapped(pieces: list[bytes]) -> list[bytes]:
    return pieces[::-1] if len(pieces) == 2 else []


def left_out(pieces: list[bytes]) -> list[bytes]:
    return pieces[1:]


def added(pieces: list[bytes]) -> list[bytes]:
    return [PieceSeal(bytes(32)).close(b"\x01\0\0\0\0\0\0\0x"), *pieces]


@pytest.mark.parametrize(
    "how",
    [flipped, lengthened, huge, empty, repeated, swapped, left_out, added],
    ids=lambda how: how.__name__,
)
async def test_a_stranger_on_the_way_can_only_end_it(how):
    stranger = Stranger()
    async with ends() as stream, stranger.before(stream.port):
        await stream.turn()
        stranger.meddle = how
        for number in range(3):
            await stream.opener.send(b"%d" % number)
        async with asyncio.timeout(PATIENCE):
            assert [one[0] async for one in until_the_end(stream.acceptor)] in ([], [b"0"])
            assert not [one async for one in until_the_end(stream.opener)]


async def test_a_stranger_who_answers_in_the_peers_place_is_not_taken_for_it(monkeypatch):
    monkeypatch.setattr(shortcuts, "DIAL_TIME", 0.2)

    async def repeat(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard = await reader.readexactly(GREETING_BYTES)
        writer.write(heard[16:])
        await reader.read()
        writer.close()

    server = await asyncio.start_server(repeat, HOST, 0)
    async with server, ends() as stream:
        stream.port.port = server.sockets[0].getsockname()[1]
        for _ in range(LIVELY_FRAMES):
            await stream.echo(b"as ever")
        await until_dialled(stream)
        assert not any(end.is_short for end in stream.both)


@pytest.mark.parametrize(
    ("speaks", "words"),
    [
        ("opener", [OVER]),
        ("opener", [ASK, ASK]),
        ("opener", [Offer.new(1).word()]),
        ("opener", [b"?"]),
        ("opener", [b"\x01" * 200]),
        ("opener", [ASK, OVER]),
        ("acceptor", [OVER]),
        ("acceptor", [Offer.new(1).word()]),
        ("acceptor", [ASK]),
    ],
)
async def test_words_out_of_place_close_the_stream(speaks, words):
    async with ends() as stream:
        one, other = stream.both if speaks == "opener" else stream.both[::-1]
        for word in words:
            one.say(word)
        with pytest.raises(FrameError):
            await other.receive()
        with suppress(FrameError):  # the answer to what it asked in its other's place
            assert not [heard async for heard in until_the_end(one)]


async def test_who_does_not_turn_takes_no_words():
    async with ends() as stream:
        stream.acceptor.turn = None
        stream.opener.say(ASK)
        with pytest.raises(FrameError, match="header of 0 bytes"):
            await stream.acceptor.receive()


async def test_a_stream_that_ends_while_it_is_to_turn_leaves_nothing_behind(monkeypatch):
    monkeypatch.setattr(sealed_connection, "LINGER", 0.1)
    for turns in range(12):
        async with ends() as stream:
            for _ in range(LIVELY_FRAMES):
                await stream.echo(b"x")
            hearing = [asyncio.create_task(end.receive()) for end in stream.both]
            for _ in range(turns):
                await asyncio.sleep(0)
            stream.both[turns % 2].close()
            stream.both[1 - turns % 2].close()
            await asyncio.gather(*hearing, return_exceptions=True)
            async with asyncio.timeout(PATIENCE):
                while stream.openers._dialled or stream.port._open:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            assert not stream.port._waiting


def test_no_two_pieces_are_sealed_alike():
    one, other = PieceSeal(bytes(32)), PieceSeal(bytes(32))
    pieces = [one.close(b"the same") for _ in range(3)]
    assert len(set(pieces)) == 3
    assert [other.open(piece[LENGTH.size :]) for piece in pieces] == [b"the same"] * 3


@pytest.mark.parametrize(
    "scenario",
    [
        test_frames_of_both_directions_stay_in_order_while_it_turns,
        test_bodies_of_all_sizes_and_frames_offered,
        test_a_slow_reader_holds_its_sender_up,
        partial(test_a_close_is_noticed_and_nothing_sent_before_is_lost, "opener"),
        partial(test_a_close_is_noticed_and_nothing_sent_before_is_lost, "acceptor"),
        partial(test_a_shortcut_that_breaks_ends_its_stream, "opener"),
        partial(test_a_stranger_on_the_way_can_only_end_it, flipped),
    ],
    ids=lambda scenario: getattr(scenario, "func", scenario).__name__.removeprefix("test_"),
)
def test_it_is_so_on_uvloop_too(scenario):
    uvloop.run(scenario())


def test_ends_come_at_any_moment_on_uvloop_too(monkeypatch):
    uvloop.run(test_a_stream_that_ends_while_it_is_to_turn_leaves_nothing_behind(monkeypatch))


@given(st.lists(st.binary(min_size=1, max_size=50)), st.data())
def test_pieces_are_read_as_what_they_were_cut_from(pieces, data):
    come, whole, read = Pieces(), b"".join(pieces), b""
    for piece in pieces:
        come.add(piece)
    while come.bytes:
        read += come.take(data.draw(st.integers(1, come.bytes)))
        assert whole.startswith(read)
        assert come.bytes == len(whole) - len(read)
    assert read == whole
