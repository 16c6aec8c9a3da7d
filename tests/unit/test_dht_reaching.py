"""Whether others reach a server: who is asked, which relays are found, and what the operator is told."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from swarm.dht.memory import MemoryStore
from swarm.dht.reaching import (
    Listening,
    listening_of_client,
    look_back,
    outer_address,
    relaying_of,
    relays_among,
    say_hidden,
)
from swarm.net.addresses import is_loopback
from swarm.net.calls import MessageStream
from swarm.net.identity import Identity
from swarm.net.memory import MemoryNetwork, MemoryTransport
from swarm.net.messages import DialBack, DialledBack, Error
from swarm.net.reachability import dialled_back, listening_port
from swarm.net.relaying import ENOUGH_BYTES, Relaying
from swarm.net.transport import Stream
from swarm.net.virtual_time import in_virtual_time

HERE = "/ip4/0.0.0.0/tcp/0"
PUBLIC, PRIVATE = "8.8.4.4", "192.168.1.7"


@pytest.mark.parametrize(
    ("addresses", "relaying"),
    [
        (["/ip4/127.0.0.1/tcp/1/p2p/x"], Relaying()),
        (["/ip4/127.0.0.1/tcp/1/p2p/x", "/ip4/10.0.0.1/tcp/1/p2p/x"], Relaying(uses=True)),
        ([], Relaying()),
    ],
)
def test_a_client_goes_through_relays_where_its_swarm_is_elsewhere(
    addresses: list[str], relaying: Relaying
) -> None:
    assert relaying_of(addresses, None, [PRIVATE]) == relaying


@pytest.mark.parametrize(
    ("listening", "own", "relaying"),
    [
        (Listening(("/ip4/127.0.0.1/tcp/0",)), PUBLIC, Relaying()),
        (Listening((HERE,)), PRIVATE, Relaying(uses=True)),
        (Listening((HERE,)), PUBLIC, Relaying(uses=True, serves=True)),
        (Listening((f"/ip4/{PUBLIC}/tcp/1",)), PRIVATE, Relaying(uses=True, serves=True)),
        (Listening((f"/ip4/{PRIVATE}/tcp/1",)), PUBLIC, Relaying(uses=True)),
        (Listening((HERE,), ("/ip4/1.1.1.1/tcp/1",)), PRIVATE, Relaying(uses=True, serves=True)),
        (Listening((HERE,), relays=True), PRIVATE, Relaying(uses=True, serves=True)),
        (Listening((HERE,), relays=False), PUBLIC, Relaying()),
    ],
)
def test_who_has_an_address_of_the_internet_relays(
    listening: Listening, own: str, relaying: Relaying
) -> None:
    assert relaying_of([], listening, ["127.0.0.1", own]) == relaying


def test_a_client_listens_where_others_may_come_to_it_and_tells_nobody() -> None:
    assert listening_of_client(Relaying()).host_maddrs == ()
    place = listening_of_client(Relaying(uses=True))
    (host,), (told,) = place.host_maddrs, place.announce_maddrs
    assert host.startswith("/ip4/0.0.0.0/tcp/")
    assert listening_port([told]) == int(host.rpartition("/")[2]) > 0
    assert is_loopback(told)


class Witnesses:
    """A server that may be hidden, and those who tell whether they could dial it."""

    def __init__(self) -> None:
        self.network = MemoryNetwork()
        self.own = self.network.transport("server")
        self.asked: list[int] = []

    async def add(self, name: str, answer: bool | None) -> MemoryTransport:
        """One who answers so; None refuses."""
        transport = self.network.transport(name)

        async def on_stream(stream: Stream) -> None:
            calls = MessageStream(stream)
            question, _ = await calls.receive()
            assert isinstance(question, DialBack)
            self.asked.append(question.port)
            if answer is None:
                await calls.send(Error(code="no_capacity", message="Enough."))
            else:
                await calls.send(DialledBack(nonce=question.nonce, address="", is_reached=answer))
            await calls.receive()

        await transport.listen(on_stream)
        return transport


@asynccontextmanager
async def witnesses(*answers: bool | None) -> AsyncIterator[tuple[Witnesses, list[MemoryTransport]]]:
    one = Witnesses()
    others = [await one.add(f"witness {number}", answer) for number, answer in enumerate(answers)]
    yield one, others
    for transport in (one.own, *others):
        await transport.close()


@in_virtual_time
@pytest.mark.parametrize(
    ("answers", "found"),
    [
        ([True], True),
        ([False], False),
        ([None], None),
        ([], None),
        ([False, False, True], True),
        ([False, None], False),
        ([False, False, False, True], False),
    ],
)
async def test_one_who_can_is_enough_and_one_who_cannot_where_none_can(
    answers: list[bool | None], found: bool | None
) -> None:
    async with witnesses(*answers) as (one, others):
        said = await dialled_back(one.own, [other.peer for other in others], 31330)
        assert (said.is_reached if said else None) is found
        assert set(one.asked) <= {31330}


@in_virtual_time
async def test_who_is_not_there_says_nothing() -> None:
    async with witnesses(False) as (one, others):
        gone = one.network.peer("gone")
        assert await dialled_back(one.own, [gone], 1) is None
        said = await dialled_back(one.own, [gone, others[0].peer], 1)
        assert said is not None
        assert not said.is_reached


def test_the_port_is_that_of_an_address_of_its_own() -> None:
    peer, relay = Identity.from_seed("server").peer, Identity.from_seed("relay").peer
    relayed, own = f"/ip4/1.1.1.1/tcp/9/p2p/{relay}/p2p-circuit/p2p/{peer}", f"/ip4/10.0.0.1/tcp/7/p2p/{peer}"
    assert listening_port([relayed, own]) == 7
    assert listening_port([relayed, f"/ip4/10.0.0.1/udp/7/quic-v1/p2p/{peer}"]) is None
    assert listening_port([]) is None


@in_virtual_time
async def test_those_it_joins_by_are_asked_unless_all_are_on_this_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with witnesses(False) as (one, others):
        addresses = [f"/ip4/1.1.1.1/tcp/1/p2p/{other.peer}" for other in (*others, one.own)]

        async def own(ip: str = PRIVATE) -> list[str]:
            return [f"/ip4/{ip}/tcp/7/p2p/{one.own.peer}"]

        monkeypatch.setattr(one.own, "addresses", own)
        said = await look_back(one.own, addresses)
        assert said is not None
        assert (said.is_reached, one.asked) == (False, [7])
        monkeypatch.setattr(one.own, "addresses", lambda: own("127.0.0.1"))
        assert await look_back(one.own, addresses) is None


@pytest.mark.parametrize(
    ("dialled", "is_reached", "own", "outer"),
    [
        ("/ip4/1.1.1.1/tcp/7", True, PRIVATE, "/ip4/1.1.1.1/tcp/7"),
        ("/ip4/1.1.1.1/tcp/7", False, PRIVATE, None),
        ("/ip4/1.1.1.1/tcp/7", True, PUBLIC, None),
        ("/ip4/1.1.1.1/tcp/8", True, PRIVATE, None),
        ("/ip4/10.0.0.1/tcp/7", True, PRIVATE, None),
        ("/ip4/1.1.1.1/udp/7/quic-v1", True, PRIVATE, None),
        ("nonsense", True, PRIVATE, None),
    ],
)
def test_an_address_that_a_router_forwards_is_told_to_others(
    dialled: str, is_reached: bool, own: str, outer: str | None
) -> None:
    said = DialledBack(nonce=1, address=dialled, is_reached=is_reached)
    assert outer_address(said, [f"/ip4/{own}/tcp/7"], 7) == outer


@in_virtual_time
async def test_relays_are_those_that_relay_enough() -> None:
    async with witnesses(True, True, True) as (one, others):
        first, second, third = others
        one.network.relays = {first.peer: 128 * 1024, second.peer: ENOUGH_BYTES}
        store = MemoryStore(lambda: 0.0)
        addresses = [
            f"/ip4/1.1.1.1/tcp/1/p2p/{first.peer}",
            f"/ip4/10.0.0.2/tcp/2/p2p/{second.peer}",
            f"/ip4/1.1.1.2/tcp/2/p2p/{second.peer}",
            f"/ip4/1.1.1.3/tcp/3/p2p/{third.peer}",
        ]
        assert await relays_among(one.own, store, addresses) == [addresses[2]]
        relayed = f"/ip4/1.1.1.1/tcp/1/p2p/{first.peer}/p2p-circuit/p2p/{second.peer}"
        assert await relays_among(one.own, store, [relayed]) == []


@pytest.mark.parametrize(
    ("listening", "relays", "says"),
    [
        (Listening(), [], "no peer that it knows is a relay"),
        (Listening(), ["/ip4/1.1.1.1/tcp/1/p2p/A"], "through a relay"),
        (Listening(relays=False), [], "nobody elsewhere can use it"),
        (Listening(announce_maddrs=("/ip4/1.1.1.1/tcp/7",)), [], "check that /ip4/1.1.1.1/tcp/7 leads to it"),
    ],
)
def test_the_operator_is_told_in_one_line(
    listening: Listening, relays: list[str], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        say_hidden(listening, 31330, relays)
    (record,) = caplog.records
    said = record.getMessage()
    assert says in said
    assert "cannot connect to TCP port 31330" in said
    assert ("--public-ip" in said) is not bool(listening.announce_maddrs)
    assert "\n" not in said
