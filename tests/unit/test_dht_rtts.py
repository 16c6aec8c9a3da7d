"""Round trips over the in-process network, whose latencies are known."""

import asyncio

import pytest

from swarm.dht import rtts
from swarm.dht.rtts import MAX_PEERS, OPEN_TIMEOUT, PING_TIMEOUT, RoundTrips
from swarm.net.calls import MessageStream
from swarm.net.memory import MemoryNetwork, MemoryTransport
from swarm.net.messages import Ping, Pong
from swarm.net.transport import PeerId, Stream, StreamClosed
from swarm.net.virtual_time import in_virtual_time


class Answering:
    """Peers that answer pings, and count the streams that were opened to them."""

    def __init__(self, network: MemoryNetwork):
        self.network = network
        self.streams = 0

    async def start(self, *names: str) -> list[PeerId]:
        return [(await self._start(name)).peer for name in names]

    async def _start(self, name: str) -> MemoryTransport:
        transport = self.network.transport(name)
        await transport.listen(self.on_stream)
        return transport

    async def on_stream(self, stream: Stream) -> None:
        self.streams += 1
        messages = MessageStream(stream)
        try:
            while True:
                asked, _ = await messages.receive()
                assert isinstance(asked, Ping)
                await messages.send(Pong(nonce=asked.nonce))
        except StreamClosed:
            return


@pytest.fixture
def network() -> MemoryNetwork:
    return MemoryNetwork()


@pytest.fixture
def others(network: MemoryNetwork) -> Answering:
    return Answering(network)


@pytest.fixture
def trips(network: MemoryNetwork) -> RoundTrips:
    return RoundTrips(network.transport("me"))


@in_virtual_time
async def test_measures_there_and_back(network: MemoryNetwork, others: Answering, trips: RoundTrips) -> None:
    near, far = await others.start("near", "far")
    network.set_link("me", "near", latency=0.010, bandwidth=1e12)
    network.set_link("me", "far", latency=0.200, bandwidth=1e12)
    await trips.measure({near: (), far: ()})
    assert trips.rtt(near) == pytest.approx(0.020, rel=0.01)
    assert trips.rtt(far) == pytest.approx(0.400, rel=0.01)


@in_virtual_time
async def test_keeps_one_stream_and_the_least_of_a_few(
    network: MemoryNetwork, others: Answering, trips: RoundTrips
) -> None:
    [peer] = await others.start("peer")
    for latency in (0.05, 0.01, 0.03):
        network.set_link("me", "peer", latency=latency, bandwidth=1e12)
        await trips.measure({peer: ()})
    assert trips.rtt(peer) == pytest.approx(0.02, rel=0.01)
    for _ in range(rtts.SAMPLES):
        await trips.measure({peer: ()})
    assert trips.rtt(peer) == pytest.approx(0.06, rel=0.01), "a way that became longer is believed in the end"
    assert others.streams == 1


@in_virtual_time
async def test_an_unreachable_peer_has_no_round_trip_and_spares_others(
    network: MemoryNetwork, others: Answering, trips: RoundTrips
) -> None:
    [peer] = await others.start("peer")
    nobody = network.peer("nobody")
    await trips.measure({peer: (), nobody: ()})
    await trips.measure({peer: (), nobody: ()})
    assert trips.rtt(nobody) is None
    assert trips.failures(nobody) == 2
    assert trips.rtt(peer) is not None
    assert trips.failures(peer) == 0


@in_virtual_time
async def test_silence_has_a_deadline_and_recovery(
    network: MemoryNetwork, others: Answering, trips: RoundTrips
) -> None:
    [peer] = await others.start("peer")
    await trips.measure({peer: ()})
    network.partition(["me"], ["peer"])
    clock = asyncio.get_running_loop()
    for deadline in (PING_TIMEOUT, OPEN_TIMEOUT):
        started = clock.time()
        await trips.measure({peer: ()})
        assert clock.time() - started <= deadline + 0.001
        assert trips.rtt(peer) is None
    assert trips.failures(peer) == 2
    network.heal()
    await trips.measure({peer: ()})
    assert trips.rtt(peer) is not None
    assert trips.failures(peer) == 0


@in_virtual_time
async def test_forgets_who_is_no_longer_asked_for(others: Answering, trips: RoundTrips) -> None:
    one, two = await others.start("one", "two")
    await trips.measure({one: (), two: ()})
    await trips.measure({two: ()})
    assert trips.rtt(one) is None
    assert trips.rtt(two) is not None
    trips.close()
    assert trips.rtt(two) is None


@in_virtual_time
async def test_never_measures_itself_nor_too_many(
    network: MemoryNetwork, others: Answering, trips: RoundTrips
) -> None:
    [known] = await others.start("known")
    await trips.measure({known: ()})
    crowd = {network.peer(f"peer {number}"): () for number in range(MAX_PEERS + 5)}
    await trips.measure({network.peer("me"): (), **crowd, known: ()})
    assert trips.rtt(known) is not None, "who is known goes first"
    assert sum(trips.failures(peer) for peer in crowd) == MAX_PEERS - 1
    assert trips.failures(network.peer("me")) == 0


@in_virtual_time
async def test_a_cancelled_measurement_leaves_nothing_broken(
    network: MemoryNetwork, others: Answering, trips: RoundTrips
) -> None:
    [peer] = await others.start("peer")
    network.set_link("me", "peer", latency=1.0)
    for moment in (0.5, 2.5, 3.5):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(moment):
                await trips.measure({peer: ()})
    network.set_link("me", "peer", latency=0.01)
    await trips.measure({peer: ()})
    await trips.measure({peer: ()})
    assert trips.rtt(peer) == pytest.approx(0.02, rel=0.05)


@in_virtual_time
async def test_no_stream_is_kept_through_a_relay(
    network: MemoryNetwork, others: Answering, trips: RoundTrips
) -> None:
    """So that the network may take a straight way instead once there is one."""
    (peer,) = await others.start("hidden")
    relayed = "/ip4/1.1.1.1/tcp/1/p2p/12D3KooWRelay/p2p-circuit"
    network.places[peer] = relayed
    for _ in range(3):
        await trips.measure({peer: [relayed]})
    assert (trips.failures(peer), others.streams) == (0, 3)
    network.places[peer] = "/ip4/1.1.1.2/tcp/1"
    for _ in range(3):
        await trips.measure({peer: [relayed]})
    assert others.streams == 4
