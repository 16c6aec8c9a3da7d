import asyncio
from math import inf

import pytest

from swarm.net.identity import Identity
from swarm.net.inbound import MAX_STREAMS_PER_PEER
from swarm.net.memory import MemoryNetwork
from swarm.net.transport import (
    CONNECT_TIMEOUT,
    MAX_BODY_BYTES,
    MAX_HEADER_BYTES,
    FrameError,
    PeerUnreachable,
    StreamClosed,
    TransportError,
)
from swarm.net.virtual_time import in_virtual_time, run
from swarm.net.wire import STALL_TIMEOUT, WINDOW_BYTES, Link


def now() -> float:
    return asyncio.get_running_loop().time()


async def echo(stream):
    while True:
        await stream.send(*await stream.receive())


async def two_peers(network, on_stream=echo):
    """Transports of peers "a" and "b", and a's stream to b, which serves `on_stream`."""
    a, b = network.transport("a"), network.transport("b")
    await b.listen(on_stream)
    return a, b, await a.open_stream(b.peer)


async def round_trip(stream, body=b"") -> float:
    began = now()
    await stream.send(b"header", body)
    assert await stream.receive() == (b"header", body)
    return now() - began


@in_virtual_time
async def test_frames_arrive_in_order_with_their_peer():
    seen = []

    async def on_stream(stream):
        seen.append(stream.peer)
        await echo(stream)

    a, b, stream = await two_peers(MemoryNetwork(), on_stream)
    assert stream.peer == b.peer
    for n in range(100):
        await stream.send(b"%d" % n, bytes(n))
    assert [await stream.receive() for _ in range(100)] == [(b"%d" % n, bytes(n)) for n in range(100)]
    assert seen == [a.peer]
    assert now() == 0


@in_virtual_time
async def test_latency_and_bandwidth():
    network = MemoryNetwork(default_link=Link(latency=0.05))
    _, _, stream = await two_peers(network)
    assert now() == pytest.approx(0.1)
    assert await round_trip(stream) == pytest.approx(0.1)
    network.set_link("a", "b", bandwidth=1000)
    size = 8 + len(b"header") + 986
    assert await round_trip(stream, bytes(986)) == pytest.approx(0.1 + 2 * size / 1000)


@in_virtual_time
async def test_wires_may_differ_by_their_ends():
    lengths = {}
    network = MemoryNetwork(link_of=lambda one, other: Link(latency=lengths[one, other]))
    a, b = network.peer("a"), network.peer("b")
    lengths.update({(a, b): 0.05, (b, a): 0.2})
    _, _, stream = await two_peers(network)
    assert await round_trip(stream) == pytest.approx(0.25)


@in_virtual_time
async def test_streams_share_their_link():
    network = MemoryNetwork()
    a, b, first = await two_peers(network)
    second = await a.open_stream(b.peer)
    network.set_link("a", "b", bandwidth=1000)
    times = await asyncio.gather(round_trip(first, bytes(986)), round_trip(second, bytes(986)))
    assert times == [pytest.approx(2), pytest.approx(3)]


async def lossy_times(seed):
    network = MemoryNetwork(seed, Link(latency=0.01, loss=0.3))
    _, _, stream = await two_peers(network)
    return [await round_trip(stream) for _ in range(50)]


def test_loss_delays_and_repeats_itself_with_its_seed():
    times = run(lossy_times(1))
    assert min(times) == pytest.approx(0.02)
    assert max(times) >= 0.2
    assert times == run(lossy_times(1)) != run(lossy_times(2))


@in_virtual_time
async def test_a_frame_that_is_always_lost_breaks_its_stream():
    network = MemoryNetwork()
    _, _, stream = await two_peers(network)
    network.set_link("a", "b", loss=1)
    with pytest.raises(StreamClosed):
        await stream.send(b"header")
    with pytest.raises(StreamClosed):
        await stream.receive()


@in_virtual_time
async def test_a_partition_stalls_and_heals():
    network = MemoryNetwork(default_link=Link(latency=0.1))
    a, b, stream = await two_peers(network)
    await stream.send(b"in flight")
    network.partition({"a"}, {b.peer})
    answer = asyncio.create_task(stream.receive())
    await asyncio.sleep(5)
    assert not answer.done()
    network.heal()
    healed = now()
    assert await answer == (b"in flight", b"")
    assert now() - healed == pytest.approx(0.2)
    assert await round_trip(stream) == pytest.approx(0.2)
    assert (await a.open_stream(b.peer)).peer == b.peer


@in_virtual_time
async def test_a_long_partition_breaks_streams_and_refuses_new_ones():
    network = MemoryNetwork()
    a, b, stream = await two_peers(network)
    c = network.transport("c")
    await c.listen(echo)
    network.partition({"a"}, {"b"})
    with pytest.raises(StreamClosed):
        await round_trip(stream)
    assert now() == pytest.approx(STALL_TIMEOUT)
    with pytest.raises(PeerUnreachable):
        await a.open_stream(b.peer)
    assert now() == pytest.approx(STALL_TIMEOUT + CONNECT_TIMEOUT)
    assert await round_trip(await a.open_stream(c.peer)) == 0


@in_virtual_time
async def test_closing_during_a_partition_is_learnt_when_it_heals():
    network = MemoryNetwork()
    remote = asyncio.get_running_loop().create_future()

    async def on_stream(stream):
        with pytest.raises(StreamClosed):
            await stream.receive()
        remote.set_result(now())

    _, _, stream = await two_peers(network, on_stream)
    await asyncio.sleep(0)
    network.partition({"a"}, {"b"})
    stream.close()
    await asyncio.sleep(7)
    assert not remote.done()
    network.heal()
    assert await remote == 7


@in_virtual_time
async def test_what_was_sent_before_a_close_arrives():
    got = []

    async def on_stream(stream):
        got.append(await stream.receive())
        with pytest.raises(StreamClosed):
            await stream.receive()
        with pytest.raises(StreamClosed):
            await stream.send(b"too late")
        got.append(now())

    network = MemoryNetwork(default_link=Link(latency=1))
    _, _, stream = await two_peers(network, on_stream)
    await stream.send(b"last words")
    stream.close()
    stream.close()
    for use in (stream.receive, lambda: stream.send(b"x")):
        with pytest.raises(StreamClosed):
            await use()
    await asyncio.sleep(10)
    assert got == [(b"last words", b""), 3]


@in_virtual_time
async def test_a_close_ends_a_waiting_receive_and_a_waiting_send():
    _, _, stream = await two_peers(MemoryNetwork(), lambda stream: asyncio.sleep(inf))
    receiving = asyncio.create_task(stream.receive())

    async def send_forever():
        while True:
            await stream.send(b"x", bytes(WINDOW_BYTES))

    sending = asyncio.create_task(send_forever())
    await asyncio.sleep(1)
    stream.close()
    for task in (receiving, sending):
        with pytest.raises(StreamClosed):
            await task


@in_virtual_time
async def test_a_peer_that_does_not_read_stops_its_sender():
    sent = 0
    reading = asyncio.Event()

    async def on_stream(stream):
        await reading.wait()
        await echo(stream)

    _, _, stream = await two_peers(MemoryNetwork(), on_stream)

    async def send_all():
        nonlocal sent
        for _ in range(20):
            await stream.send(b"x", bytes(WINDOW_BYTES // 2))
            sent += 1

    sending = asyncio.create_task(send_all())
    await asyncio.sleep(1)
    assert sent == 2
    reading.set()
    for _ in range(20):
        await stream.receive()
    await sending


@in_virtual_time
async def test_a_killed_peer():
    network = MemoryNetwork(default_link=Link(latency=0.5))
    cancelled = asyncio.Event()

    async def on_stream(stream):
        try:
            await echo(stream)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    a, b, stream = await two_peers(network, on_stream)
    await round_trip(stream)
    killed = now()
    network.kill("b")
    with pytest.raises(StreamClosed):
        await stream.receive()
    assert now() - killed == pytest.approx(0.5)
    assert cancelled.is_set()
    with pytest.raises(PeerUnreachable):
        await a.open_stream(b.peer)
    assert now() - killed == pytest.approx(1.5)
    assert isinstance(await b.wait_failed(), TransportError)
    with pytest.raises(TransportError):
        await b.open_stream(a.peer)
    again = network.transport("b")
    await again.listen(echo)
    assert again.peer == b.peer
    assert await round_trip(await a.open_stream(b.peer)) == pytest.approx(1)


@in_virtual_time
async def test_who_cannot_be_reached():
    network = MemoryNetwork()
    async with network.transport("a") as a, network.transport("b") as b:
        for peer in (b.peer, a.peer, network.peer("nobody"), "nonsense"):
            with pytest.raises(PeerUnreachable):
                await a.open_stream(peer)
    with pytest.raises(TransportError):
        await a.open_stream(b.peer)


@in_virtual_time
async def test_closing_a_transport_ends_everything():
    network = MemoryNetwork()
    a, b, stream = await two_peers(network)
    await round_trip(stream)
    await b.close()
    await b.close()
    with pytest.raises(StreamClosed):
        await stream.receive()
    await a.close()
    assert asyncio.all_tasks() == {asyncio.current_task()}


@in_virtual_time
async def test_one_failing_stream_spares_the_others(caplog):
    async def on_stream(stream):
        header, _ = await stream.receive()
        if header == b"fail":
            raise RuntimeError("a bug")
        await stream.send(header)
        await echo(stream)

    a, b, good = await two_peers(MemoryNetwork(), on_stream)
    bad = await a.open_stream(b.peer)
    await bad.send(b"fail")
    with pytest.raises(StreamClosed):
        await bad.receive()
    assert a.peer in caplog.text
    assert "a bug" in caplog.text
    await round_trip(good)
    await round_trip(good)


@in_virtual_time
async def test_too_many_streams_of_one_peer_are_refused_until_some_end():
    network = MemoryNetwork()
    a, b, first = await two_peers(network)
    streams = [first] + [await a.open_stream(b.peer) for _ in range(MAX_STREAMS_PER_PEER - 1)]
    for stream in streams:
        await round_trip(stream)
    refused = await a.open_stream(b.peer)
    with pytest.raises(StreamClosed):
        await refused.receive()
    c = network.transport("c")
    await round_trip(await c.open_stream(b.peer))
    first.close()
    await asyncio.sleep(0.1)
    await round_trip(await a.open_stream(b.peer))


@in_virtual_time
async def test_the_limits_of_frames():
    a, b, stream = await two_peers(MemoryNetwork())
    for header in (b"", bytes(MAX_HEADER_BYTES + 1)):
        with pytest.raises(ValueError, match="larger than allowed"):
            await stream.send(header)
    with pytest.raises(ValueError, match="larger than allowed"):
        await stream.send(b"x", bytes(MAX_BODY_BYTES + 1))
    await stream.send(bytes(MAX_HEADER_BYTES), bytes(101))
    with pytest.raises(FrameError):
        await stream.receive(max_body=100)
    with pytest.raises(StreamClosed):
        await stream.receive()
    await round_trip(await a.open_stream(b.peer))


def test_names_identities_and_peer_ids():
    network = MemoryNetwork()
    identity = Identity.generate()
    transport = network.transport(identity)
    assert transport.peer == identity.peer == network.peer(identity) == network.peer(identity.peer)
    assert network.transport("a").peer == network.peer("a") == MemoryNetwork(5).peer("a")
    for who in ("a", identity, Identity.generate().peer):
        with pytest.raises(ValueError, match="peer"):
            network.transport(who)


@pytest.mark.parametrize(
    "wrong", [{"latency": -1}, {"latency": inf}, {"bandwidth": 0}, {"loss": 1.1}, {"loss": -1}]
)
def test_impossible_links(wrong):
    with pytest.raises(ValueError, match="not a possible link"):
        MemoryNetwork().set_link("a", "b", **wrong)
