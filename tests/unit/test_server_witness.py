"""A witness tells peers how it sees them, and dials nobody but who asks."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from swarm.net.calls import Refused
from swarm.net.dialling import Dialled
from swarm.net.memory import MemoryNetwork, MemoryTransport
from swarm.net.messages import DialBack, DialledBack, Error, Observe, Observed, decode, encode
from swarm.net.transport import FrameError
from swarm.net.virtual_time import in_virtual_time
from swarm.server.witness import DIAL_TIMEOUT, Witness
from swarm.version import VERSION
from tests.hosting import hosting

SEEN_AT = "/ip4/203.0.113.5/tcp/4444"
NOW = 1_700_000_000.0


@dataclass
class Dials:
    """Stands in for the world's sockets: remembers who was dialled, and says what is found there."""

    found: Dialled = "greeted"
    seconds: float = 0.0
    asked: list[tuple[str, int]] = field(default_factory=list)

    async def __call__(self, host: str, port: int, timeout: float) -> Dialled:
        self.asked.append((host, port))
        await asyncio.sleep(min(self.seconds, timeout))
        return self.found


@dataclass
class Scene:
    network: MemoryNetwork
    server: MemoryTransport
    dials: Dials
    witness: Witness

    def place(self, name: str, address: str) -> str:
        peer = self.network.peer(name)
        self.network.places[peer] = address
        return peer

    async def ask(self, name: str, port: int = 31337) -> DialledBack | Error:
        return await self.witness.dial_back(self.network.peer(name), DialBack(nonce=1, port=port))


@asynccontextmanager
async def scene(found: Dialled = "greeted", seconds: float = 0.0) -> AsyncIterator[Scene]:
    network, dials = MemoryNetwork(), Dials(found, seconds)
    loop = asyncio.get_running_loop()
    async with network.transport("server") as server:
        yield Scene(network, server, dials, Witness(server, dials, lambda: NOW + loop.time()))


@in_virtual_time
async def test_it_tells_where_a_peer_comes_from_and_the_time() -> None:
    async with scene() as one:
        peer = one.network.peer(one.place("asker", SEEN_AT))
        told = await one.witness.observe(peer, Observe(nonce=7))
        assert told == Observed(nonce=7, address=SEEN_AT, clock=NOW, version=VERSION)
        unknown = await one.witness.observe(one.network.peer("unseen"), Observe(nonce=8))
        assert isinstance(unknown, Observed)
        assert unknown.address == ""


@in_virtual_time
async def test_only_the_machine_that_asks_is_dialled() -> None:
    async with scene() as one:
        one.place("asker", SEEN_AT)
        one.place("other", "/ip6/2001:db8::1/udp/5/quic-v1")
        assert await one.ask("asker", 80) == DialledBack(
            nonce=1, address="/ip4/203.0.113.5/tcp/80", is_reached=True
        )
        reached = await one.ask("other", 81)
        assert isinstance(reached, DialledBack)
        assert reached.address == "/ip6/2001:db8::1/tcp/81"
        assert one.dials.asked == [("203.0.113.5", 80), ("2001:db8::1", 81)]


@in_virtual_time
@pytest.mark.parametrize(
    "address", ["", "/ip4/203.0.113.9/tcp/1/p2p-circuit", "/dns4/victim.example/tcp/1", "nonsense"]
)
async def test_who_comes_another_way_is_not_dialled(address: str) -> None:
    async with scene() as one:
        one.place("asker", address)
        refused = await one.ask("asker")
        assert isinstance(refused, Error)
        assert refused.code == "bad_request"
        assert one.dials.asked == []


@in_virtual_time
@pytest.mark.parametrize("found", ["refused", "silent", "not_a_peer", "no_way"])
@pytest.mark.parametrize("seconds", [0.0, 1.0, DIAL_TIMEOUT])
async def test_every_no_looks_the_same(found: Dialled, seconds: float) -> None:
    async with scene(found, seconds) as one:
        one.place("asker", SEEN_AT)
        began = asyncio.get_running_loop().time()
        answer = await one.ask("asker")
        assert isinstance(answer, DialledBack)
        assert not answer.is_reached
        assert asyncio.get_running_loop().time() - began == pytest.approx(DIAL_TIMEOUT)


@in_virtual_time
async def test_a_machine_is_dialled_only_so_often_whoever_asks() -> None:
    async with scene() as one:
        for number in range(5):
            one.place(f"asker {number}", SEEN_AT)
        answers = [await one.ask(f"asker {number}") for number in range(5)]
        assert [type(answer) for answer in answers] == [DialledBack] * 3 + [Error] * 2
        assert isinstance(answers[3], Error)
        assert answers[3].code == "no_capacity"
        assert answers[3].retry_after == pytest.approx(10)
        await asyncio.sleep(10)
        assert isinstance(await one.ask("asker 0"), DialledBack)
        assert len(one.dials.asked) == 4


@in_virtual_time
async def test_all_together_are_dialled_only_so_often() -> None:
    async with scene() as one:
        for number in range(20):
            one.place(f"asker {number}", f"/ip6/2001:db8:0:{number:x}::1/tcp/1")
        answers = [await one.ask(f"asker {number}") for number in range(20)]
        assert sum(isinstance(answer, DialledBack) for answer in answers) == 10


@in_virtual_time
async def test_one_network_counts_as_one_machine() -> None:
    async with scene() as one:
        for number in range(4):
            one.place(f"asker {number}", f"/ip6/2001:db8::{number + 1:x}/tcp/1")
        answers = [await one.ask(f"asker {number}") for number in range(4)]
        assert [type(answer) for answer in answers] == [DialledBack] * 3 + [Error]


@in_virtual_time
async def test_a_peer_that_asks_without_end_is_slowed() -> None:
    async with scene() as one:
        peer = one.network.peer("asker")
        answers = [await one.witness.observe(peer, Observe(nonce=1)) for _ in range(12)]
        assert [type(answer) for answer in answers] == [Observed] * 10 + [Error] * 2


@in_virtual_time
async def test_servers_are_witnesses() -> None:
    async with hosting() as host:
        client = await host.client()
        host.network.places[client_peer(host)] = "/ip4/127.0.0.1/tcp/1/p2p-circuit"
        told, _ = await client.call(Observe(nonce=3), timeout=5)
        assert isinstance(told, Observed)
        assert told.version == VERSION
        with pytest.raises(Refused):
            await client.call(DialBack(nonce=4, port=1), timeout=10)
        await client.call(Observe(nonce=5), timeout=5)  # the stream goes on


def client_peer(host: object) -> object:
    return host.clients["client"].peer  # type: ignore[attr-defined]


@pytest.mark.parametrize("clock", [float("nan"), float("inf"), -1.0, 1e300])
def test_a_clock_that_is_none_is_a_broken_rule(clock: float) -> None:
    told = Observed(nonce=1, address="", clock=clock, version="")
    with pytest.raises(FrameError):
        decode(encode(told))


@pytest.mark.parametrize("port", [0, 65536, -1])
def test_a_port_that_is_none_is_a_broken_rule(port: int) -> None:
    with pytest.raises(FrameError):
        decode(encode(DialBack(nonce=1, port=port)))
