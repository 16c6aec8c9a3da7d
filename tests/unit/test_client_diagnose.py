"""The command `diagnose`: what it sees of a swarm in this process, and what it makes of what it saw."""

import argparse
import asyncio
import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import pytest
from rich.console import Console

from swarm.client.diagnose import command, probing
from swarm.client.diagnose.about_here import about_clock, about_versions
from swarm.client.diagnose.about_peers import explained
from swarm.client.diagnose.examining import MAX_SERVERS, OWN_KEY, Examination, witnesses
from swarm.client.diagnose.finding import Finding
from swarm.client.diagnose.findings import findings
from swarm.client.diagnose.nat import View, nat_of
from swarm.client.diagnose.probing import Probe, what_is_at
from swarm.client.diagnose.seen import DialledBack, Fault, PeerSeen, RecordsSeen, Seen, Told
from swarm.dht.memory import MemoryStore
from swarm.dht.store import RecordStore
from swarm.errors import InputError, SwarmError
from swarm.net.addresses import Endpoint, endpoint_of, ip_of, parse_address
from swarm.net.calls import MessageStream
from swarm.net.dialling import Dialled
from swarm.net.identity import Identity
from swarm.net.messages import DialBack, Error, Observe, Observed, Ping, Pong
from swarm.net.reachability import own_addresses
from swarm.net.transport import OtherPeer, OtherProtocol, PeerId, Stream, StreamClosed, TransportError
from swarm.net.virtual_time import VirtualTimeLoop, in_virtual_time
from swarm.server.witness import Witness
from swarm.version import VERSION
from tests.health_swarm import AnnouncedSwarm

HERE, ROUTER = "203.0.113.5", "198.51.100.7"
AT = Endpoint("ip4", "192.0.2.1", "tcp", 4001)


def peer_of(name: str) -> PeerId:
    return Identity.from_seed(name).peer


def address_of(name: str) -> str:
    return f"/ip4/192.0.2.1/tcp/4001/p2p/{peer_of(name)}"


@dataclass
class Scene:
    """A swarm of announcements whose peers are witnesses too, and this machine at its edge.

    `hears` answers in a server's place; `dialled` is what servers find on this machine.
    """

    swarm: AnnouncedSwarm
    dialled: Dialled = "greeted"
    hears: Callable[[Any], Any] = lambda message: None
    fault: Fault = "refused"
    skew: float = 0.0
    asked: list[str] = field(default_factory=list)

    async def announce(self, name: str, *span: int, **more: Any) -> None:
        await self.swarm.announce(name, *span, **more)
        transport = self.swarm.transports[name]
        self.swarm.network.places[transport.peer] = f"/ip4/192.0.2.{len(self.swarm.transports)}/tcp/4001"

        async def found(*_: object) -> Dialled:
            return self.dialled

        witness = Witness(transport, found, lambda: self.swarm.now() + self.skew)
        await transport.listen(lambda stream: self.answer(name, witness, stream))

    async def answer(self, name: str, witness: Witness, stream: Stream) -> None:
        calls = MessageStream(stream)
        while True:
            asked, _ = await calls.receive()
            self.asked.append(f"{name} {type(asked).__name__}")
            answer = self.hears(asked)
            match asked:
                case _ if answer is not None:
                    pass
                case Ping():
                    answer = Pong(nonce=asked.nonce)
                case Observe():
                    answer = await witness.observe(stream.peer, asked)
                case DialBack():
                    answer = await witness.dial_back(stream.peer, asked)
            if answer == "close":
                return
            await calls.send(answer)

    async def examine(
        self,
        *initial: str,
        model: str | None = None,
        local: Sequence[str] = (HERE, "127.0.0.1"),
        seen_at: str = f"/ip4/{HERE}/tcp/5000",
        port_asked: bool = False,
        join: Callable[[Sequence[str]], Awaitable[RecordStore]] | None = None,
        timeout: float = 1000.0,
    ) -> Seen:
        access = self.swarm.access("here")
        self.swarm.network.places[access.transport.peer] = seen_at
        seen = Seen(local=frozenset(local), port=5000, is_port_asked=port_asked)

        async def find(endpoint: Endpoint) -> Fault:
            return self.fault

        async def join_records(reached: Sequence[str]) -> RecordStore:
            return access.store

        async with access.transport:
            probe = Probe(access.transport, self.swarm.now, find)
            examination = Examination(seen, probe, access.identity, model)
            try:
                async with asyncio.timeout(timeout):
                    await examination.run(initial, join or join_records)
            except TimeoutError:
                pass
        return seen


@asynccontextmanager
async def scene(**settings: Any) -> AsyncIterator[Scene]:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    swarm = AnnouncedSwarm(loop.now)
    yield Scene(swarm, **settings)
    for transport in swarm.transports.values():
        await transport.close()


def told_of(seen: Seen, check: str) -> list[Finding]:
    return [one for one in findings(seen) if one.check == check]


def levels(seen: Seen) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for one in findings(seen):
        found.setdefault(one.check, set()).add(one.level)
    return found


@in_virtual_time
async def test_a_healthy_swarm_is_fine_on_all_sides() -> None:
    async with scene() as one:
        await one.announce("a", 0, 3, dtype="float16")
        await one.announce("b", 3, 6, quantization="int8")
        seen = await one.examine(address_of("a"))
        assert {level for some in levels(seen).values() for level in some} == {"ok"}
        assert set(levels(seen)) == {
            "network", "initial peer", "records", "model", "server", "nat", "reachable", "clock", "version",
        }  # fmt: skip
        (model,) = told_of(seen, "model")
        assert model.cause.startswith("tiny can be run: a (")
        first, second = told_of(seen, "server")
        assert "serves blocks 0 to 2 in float16 and answers in" in first.cause
        assert "serves blocks 3 to 5 in float32, int8" in second.cause
        assert second.facts["quantization"] == "int8"
        (nat,) = told_of(seen, "nat")
        assert nat.facts["kind"] == "local"  # documentation addresses are not global
        (reachable,) = told_of(seen, "reachable")
        assert f"could connect to /ip4/{HERE}/tcp/5000" in reachable.cause
        assert reachable.facts == {"port": 5000, "asked": 2, "reached": 2}


@in_virtual_time
async def test_what_was_written_expires_soon_and_is_nobody_elses() -> None:
    async with scene() as one:
        await one.announce("a", 0, 6)
        seen = await one.examine(address_of("a"))
        assert seen.records is not None
        assert (seen.records.written, seen.records.was_read) == (True, True)
        (record,) = (await one.swarm.store.get([OWN_KEY]))[OWN_KEY]
        assert record.expires_at <= one.swarm.now() + 60
        assert record.peer == peer_of("here")


@in_virtual_time
async def test_with_all_initial_peers_down_it_says_why_and_that_nothing_more_can_be_seen() -> None:
    async with scene(fault="silent") as one:
        seen = await one.examine(address_of("gone"), address_of("gone too"))
        first, second = told_of(seen, "initial peer")
        assert first.level == second.level == "problem"
        assert first.cause == "Nothing comes back from 192.0.2.1, TCP port 4001."
        assert first.facts["address"] == address_of("gone")
        assert levels(seen)["time"] == {"warning"}
        assert set(levels(seen)) == {"network", "initial peer", "time"}


@in_virtual_time
async def test_one_initial_peer_is_enough() -> None:
    async with scene() as one:
        await one.announce("a", 0, 6)
        joined: list[str] = []

        async def join(reached: Sequence[str]) -> RecordStore:
            joined.extend(reached)
            return one.swarm.own_store

        seen = await one.examine("/ip4/999/tcp/1/p2p/x", address_of("gone"), address_of("a"), join=join)
        assert [peer.fault for peer in seen.initial] == ["malformed", "refused", None]
        assert [finding.level for finding in told_of(seen, "initial peer")] == ["warning", "warning", "ok"]
        assert joined == [address_of("a")]
        assert not any(finding.level == "problem" for finding in findings(seen))


@in_virtual_time
async def test_each_address_of_a_peer_is_looked_at_for_itself() -> None:
    async with scene(fault="refused") as one:
        await one.announce("a", 0, 6)
        first = address_of("a")
        others = [first.replace("192.0.2.1", host) for host in ("192.0.2.2", "192.0.2.3")]
        seen = await one.examine(first, *others, first)
        assert [peer.fault for peer in seen.initial] == [None, "refused", "refused"]
        assert [finding.level for finding in told_of(seen, "initial peer")] == ["ok", "warning", "warning"]
        one.fault = "no_connection"  # a peer greets there
        seen = await one.examine(*others)
        assert [peer.fault for peer in seen.initial] == [None, None]
        assert "A peer listens at /ip4/192.0.2.3" in told_of(seen, "initial peer")[1].cause
        assert len(seen.answering) == 1
        assert levels(seen)["version"] == {"ok"}


@in_virtual_time
async def test_a_peer_that_connects_and_says_nothing() -> None:
    async with scene(hears=lambda message: "close" if isinstance(message, Ping) else None) as one:
        await one.announce("a", 0, 6)
        seen = await one.examine(address_of("a"))
        assert [peer.fault for peer in seen.initial] == ["mute"]


@in_virtual_time
async def test_servers_of_a_version_that_tells_nothing() -> None:
    def old(message: Any) -> Any:
        if isinstance(message, Observe | DialBack):
            return Error(code="bad_request", message="A peer sent a message that is not of this protocol.")
        return None

    async with scene(hears=old) as one:
        await one.announce("a", 0, 6)
        seen = await one.examine(address_of("a"))
        assert [peer.fault for peer in seen.initial] == [None]
        for check in ("clock", "version", "nat", "reachable"):
            assert levels(seen)[check] == {"warning"}, check
        assert "not of this protocol" in told_of(seen, "reachable")[0].cause


@in_virtual_time
async def test_what_a_hostile_peer_tells_steers_no_terminal() -> None:
    def hostile(message: Any) -> Any:
        if isinstance(message, Observe):
            return Observed(
                nonce=1, address="/ip4/\x1b[31m/tcp/1", clock=1e12, version="9.\x1b]0;title\x07" + "9" * 80
            )
        return None

    async with scene(hears=hostile) as one:
        await one.announce("a", 0, 6)
        seen = await one.examine(address_of("a"))
        for finding in findings(seen):
            text = json.dumps(finding.as_json(), allow_nan=False)
            assert "\\u001b" not in text
            assert "\\u0007" not in text
        assert levels(seen)["nat"] == {"warning"}
        assert levels(seen)["clock"] == {"problem"}


@in_virtual_time
@pytest.mark.parametrize(("port_asked", "level"), [(False, "warning"), (True, "problem")])
async def test_a_machine_that_nobody_reaches(port_asked: bool, level: str) -> None:
    async with scene(dialled="silent") as one:
        await one.announce("a", 0, 6)
        seen = await one.examine(
            address_of("a"), local=["10.0.0.2"], seen_at=f"/ip4/{ROUTER}/tcp/5000", port_asked=port_asked
        )
        (found,) = told_of(seen, "reachable")
        assert found.level == level
        assert found.cause == f"No peer that was asked could connect to /ip4/{ROUTER}/tcp/5000."
        assert "forward" in found.advice
        (nat,) = told_of(seen, "nat")
        assert nat.facts["kind"] == "unsure"
        assert ROUTER in nat.cause


@in_virtual_time
async def test_a_machine_that_nobody_reaches_but_by_a_relay() -> None:
    async with scene(dialled="silent") as one:
        await one.announce("a", 0, 6)
        one.swarm.network.relays[Identity.from_seed("a").peer] = 2**40
        seen = await one.examine(
            address_of("a"), local=["10.0.0.2"], seen_at=f"/ip4/{ROUTER}/tcp/5000", port_asked=True
        )
        (found,) = told_of(seen, "reachable")
        assert (found.level, found.facts["relays"]) == ("warning", 1)
        assert "through a relay" in found.advice


@in_virtual_time
async def test_who_is_reached_through_a_relay_sees_no_nat() -> None:
    async with scene() as one:
        await one.announce("a", 0, 6)
        seen = await one.examine(address_of("a"), seen_at=f"/ip4/{ROUTER}/tcp/1/p2p-circuit")
        (nat,) = told_of(seen, "nat")
        assert (nat.level, nat.facts["kind"]) == ("ok", "unknown")
        assert "relays" in nat.cause


@in_virtual_time
async def test_a_model_without_some_blocks() -> None:
    async with scene() as one:
        await one.announce("a", 0, 3)
        (found,) = told_of(await one.examine(address_of("a")), "model")
        assert (found.level, found.cause) == ("problem", "No server serves blocks 3 to 5 of tiny.")
        assert "--blocks 3:6" in found.advice


@in_virtual_time
async def test_a_model_that_still_loads_is_no_problem() -> None:
    async with scene() as one:
        await one.announce("a", 0, 3)
        await one.announce("b", 3, 6, "joining", progress=0.4)
        (found,) = told_of(await one.examine(address_of("a")), "model")
        assert found.level == "warning"
        assert "40% done" in found.cause


@in_virtual_time
async def test_a_model_whose_loading_servers_are_not_enough() -> None:
    async with scene() as one:
        await one.announce("a", 0, 3)
        await one.announce("b", 3, 5, "joining", progress=0.4)
        (found,) = told_of(await one.examine(address_of("a")), "model")
        assert found.level == "problem"


@in_virtual_time
async def test_a_server_that_is_announced_and_gone() -> None:
    async with scene() as one:
        await one.announce("a", 0, 6)
        await one.announce("spare", 0, 6, addresses=(address_of("spare"),))
        one.swarm.kill("spare")
        seen = await one.examine(address_of("a"))
        alive, gone = told_of(seen, "server")
        assert (alive.level, gone.level) == ("ok", "warning")
        assert gone.cause.startswith("spare (")
        assert "blocks 0 to 5, is not reached: nobody listens on 192.0.2.1, TCP port 4001." in gone.cause
        assert levels(seen)["model"] == {"ok"}


@in_virtual_time
async def test_blocks_whose_only_server_is_gone() -> None:
    async with scene() as one:
        await one.announce("a", 0, 3)
        await one.announce("b", 3, 6, addresses=(address_of("b"),))
        one.swarm.kill("b")
        seen = await one.examine(address_of("a"))
        (model,) = told_of(seen, "model")
        assert model.level == "problem"
        assert "cannot be reached from here" in model.cause


@in_virtual_time
@pytest.mark.parametrize(
    ("model", "level", "says"),
    [("tiny", "ok", "can be run"), ("other", "problem", "The swarm carries no model other.")],
)
async def test_one_model_may_be_asked_for(model: str, level: str, says: str) -> None:
    async with scene() as one:
        await one.announce("a", 0, 6)
        (found,) = told_of(await one.examine(address_of("a"), model=model), "model")
        assert found.level == level
        assert says in found.cause


@in_virtual_time
async def test_a_swarm_without_a_model() -> None:
    async with scene() as one:
        await one.announce("a", 0, 6, lifetime=0.0)
        (found,) = told_of(await one.examine(address_of("a")), "model")
        assert (found.level, found.cause) == ("problem", "No server of this swarm announces a model.")


@in_virtual_time
async def test_records_that_cannot_be_joined_written_or_read() -> None:
    async with scene() as one:
        await one.announce("a", 0, 6)

        async def refuse(reached: Sequence[str]) -> RecordStore:
            raise SwarmError("It cannot be joined.", "Check the clock.")

        (found,) = told_of(await one.examine(address_of("a"), join=refuse), "records")
        assert (found.level, found.cause, found.advice) == (
            "problem",
            "It cannot be joined.",
            "Check the clock.",
        )
        one.swarm.own_store.reachable = False
        (found,) = told_of(await one.examine(address_of("a")), "records")
        assert (found.level, found.cause) == ("problem", "The record store cannot be reached.")
        late = MemoryStore(lambda: one.swarm.now() + 5000.0)

        async def join(reached: Sequence[str]) -> RecordStore:
            store = late.another()
            store.now = one.swarm.now
            return Forgetful(store)  # type: ignore[return-value]

        (found,) = told_of(await one.examine(address_of("a"), join=join), "records")
        assert (found.level, found.facts["peers"]) == ("problem", 0)


class Forgetful:
    """A store that accepts nothing."""

    peers = 0

    def __init__(self, store: MemoryStore):
        self.now = store.now
        self.get = store.get

    async def put(self, records: object) -> int:
        return 0


@in_virtual_time
@pytest.mark.parametrize("after", [0.0, 1.0, 5.0])
async def test_when_time_is_over_what_was_seen_by_then_is_told(after: float) -> None:
    async with scene() as one:
        await one.announce("a", 0, 6)

        async def hang(reached: Sequence[str]) -> RecordStore:
            await asyncio.Event().wait()
            raise AssertionError

        seen = await one.examine(address_of("a"), join=hang, timeout=after)
        assert told_of(seen, "time")[0].level == "problem"
        assert told_of(seen, "time")[0].cause.startswith("There was no time left for the ")
        assert bool(told_of(seen, "initial peer")) == (after > 0)


@in_virtual_time
async def test_peers_that_hang_hold_up_nothing_for_long() -> None:
    async def hang(stream: Stream) -> None:
        await asyncio.Event().wait()

    async with scene() as one:
        for name in "abcdef":
            await one.announce(name, 0, 6)
            await one.swarm.transports[name].listen(hang)
        began = asyncio.get_running_loop().time()
        seen = await one.examine(*map(address_of, "abcdef"))
        assert {peer.fault for peer in seen.initial} == {"mute"}
        assert asyncio.get_running_loop().time() - began < 10


@in_virtual_time
async def test_of_very_many_servers_some_are_looked_at() -> None:
    async with scene() as one:
        await one.announce("a", 0, 6)
        for number in range(MAX_SERVERS + 10):
            await one.swarm.announce(f"s{number}", 0, 6, answers=False)
        seen = await one.examine(address_of("a"))
        assert len(seen.servers) == MAX_SERVERS
        assert levels(seen)["model"] == {"ok"}
        assert findings(seen)


@in_virtual_time
async def test_a_network_of_ones_own_that_fails_ends_it() -> None:
    async with scene() as one:
        await one.announce("a", 0, 6)
        access = one.swarm.access("here")
        one.swarm.network.kill(access.identity)
        examination = Examination(Seen(), Probe(access.transport), access.identity, None)
        with pytest.raises(TransportError):
            await examination.run([address_of("a")], lambda reached: asyncio.sleep(0))  # type: ignore[arg-type]


class Refusing:
    """A network on which opening a stream fails in one way."""

    peer = peer_of("here")

    def __init__(self, error: Exception):
        self.error = error

    async def open_stream(self, peer: PeerId, addresses: Sequence[str] = ()) -> Stream:
        raise self.error


@pytest.mark.parametrize(
    ("error", "fault", "detail"),
    [
        (OtherPeer("", "", "12D3other"), "another_peer", "12D3other"),
        (OtherProtocol("", ""), "other_protocol", ""),
        (StreamClosed(""), "refused", ""),
        (TimeoutError(), "refused", ""),
    ],
)
async def test_why_a_stream_did_not_open(error: Exception, fault: str, detail: str) -> None:
    async def find(endpoint: Endpoint) -> Fault:
        return "refused" if endpoint == AT else "silent"

    probe = Probe(Refusing(error), find=find)  # type: ignore[arg-type]
    addresses = [parse_address(text.replace("192.0.2.1", host)) for host in ("192.0.2.9", "192.0.2.1")
                 for text in [address_of("a")]]  # fmt: skip
    seen = await probe.look("a", peer_of("a"), addresses)
    assert (seen.fault, seen.detail) == (fault, detail)
    if fault == "refused":
        assert seen.at == AT, "the address that led farthest"


@pytest.mark.parametrize(
    ("dialled", "fault"),
    [
        (["greeted", "refused"], "no_connection"),
        (["not_a_peer", "silent"], "not_a_peer"),
        (["refused", "no_way"], "refused"),
        ([], "unresolved"),
    ],
)
async def test_of_a_names_addresses_the_one_that_leads_farthest_counts(
    dialled: list[Dialled], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def resolve(host: str, *_: object) -> list[str]:
        return [f"192.0.2.{number}" for number in range(len(dialled))]

    async def dial(host: str, *_: object) -> Dialled:
        return dialled[int(host.rpartition(".")[2])]

    monkeypatch.setattr(probing, "resolve", resolve)
    monkeypatch.setattr(probing, "dial", dial)
    assert await what_is_at(Endpoint("dns4", "swarm.example", "tcp", 4001)) == fault


async def test_a_way_by_udp_is_not_dialled() -> None:
    assert await what_is_at(Endpoint("ip4", "192.0.2.1", "udp", 4001)) == "no_connection"


@pytest.mark.parametrize("fault", get_args(Fault))
@pytest.mark.parametrize("at", [AT, Endpoint("ip6", "2001:db8::1", "udp", 1), None])
def test_each_fault_has_a_cause_and_an_advice(fault: Fault, at: Endpoint | None) -> None:
    cause, advice = explained(PeerSeen("the peer", peer_of("a"), fault, at=at))
    for sentence in (cause, advice):
        assert sentence.endswith(".")
        assert "None" not in sentence


@pytest.mark.parametrize(
    ("views", "kind"),
    [
        ([], "unknown"),
        ([("1.1.1.1", "8.8.4.4", 1), ("1.1.1.2", "8.8.4.4", 2)], "none"),
        ([("10.0.0.9", "10.0.0.1", 1)], "local"),
        ([("1.1.1.1", "9.9.9.9", 7)], "unsure"),
        ([("1.1.1.1", "9.9.9.9", 7), ("1.1.1.1", "9.9.9.9", 7)], "unsure"),
        ([("1.1.1.1", "9.9.9.9", 7), ("2.2.2.2", "9.9.9.9", 7)], "cone"),
        ([("1.1.1.1", "9.9.9.9", 7), ("2.2.2.2", "9.9.9.9", 8)], "symmetric"),
        ([("1.1.1.1", "9.9.9.9", 7), ("2.2.2.2", "9.9.9.10", 7)], "symmetric"),
        ([("10.0.0.9", "10.0.0.1", 1), ("1.1.1.1", "9.9.9.9", 7)], "unsure"),
        ([("172.17.0.1", "172.17.0.2", 3), ("1.1.1.1", "9.9.9.9", 7)], "unsure"),
        ([("2606::1", "2607::9", 7), ("1.1.1.1", "9.9.9.9", 8)], "unsure"),
    ],
)
def test_kinds_of_nat(views: list[tuple[str, str, int]], kind: str) -> None:
    assert nat_of([View(*view) for view in views], ["10.0.0.1", "8.8.4.4"]) == kind


def clocks(*ahead: float, uncertainty: float = 0.1) -> list[PeerSeen]:
    return [
        PeerSeen(f"peer {number}", told=Told("", seconds, uncertainty, VERSION))
        for number, seconds in enumerate(ahead)
    ]


@pytest.mark.parametrize(
    ("ahead", "expected"),
    [
        ([0.0], ["ok"]),
        ([1.05], ["ok"]),
        ([1.5], ["warning"]),
        ([-3.2], ["problem"]),
        ([3.2], ["problem"]),
        ([0.0, 0.1, 9.0], ["ok", "warning"]),
        ([9.0, 9.1, 0.0], ["problem", "warning"]),
        ([], ["warning"]),
    ],
)
def test_clocks(ahead: list[float], expected: list[str]) -> None:
    assert [one.level for one in about_clock(clocks(*ahead))] == expected


def test_a_clock_that_is_off_is_told_in_which_direction() -> None:
    (found,) = about_clock(clocks(-7.0, -7.2))
    assert "is 7.1 seconds ahead, by what 2 peers say" in found.cause
    assert found.facts["ahead_s"] == 7.1
    (found,) = about_clock(clocks(5.0))
    assert "is 5.0 seconds behind, by what 1 peer says" in found.cause


@pytest.mark.parametrize(
    ("version", "level"),
    [(VERSION, "ok"), ("0.1.99", "ok"), ("0.2.0", "warning"), ("", "warning"), (None, "warning")],
)
def test_versions(version: str | None, level: str) -> None:
    told = None if version is None else Told("", 0.0, 0.0, version)
    (found,) = about_versions([PeerSeen("a", told=told)])
    assert found.level == level


def test_a_machine_without_a_network() -> None:
    (found, _) = findings(Seen(local=frozenset({"127.0.0.1", "::1"})))
    assert (found.check, found.level) == ("network", "warning")
    failed = Seen(
        local=frozenset({HERE}), network_error=TransportError("The daemon died.", "Start it again.")
    )
    found, addresses = findings(failed)
    assert (found.level, found.cause, found.advice) == ("problem", "The daemon died.", "Start it again.")
    assert HERE in addresses.cause
    assert "127.0.0.1" in own_addresses()


def test_peers_on_machines_of_their_own_are_asked_first() -> None:
    peers = [
        PeerSeen(name, peer_of(name), remote=f"/ip4/{ip}/tcp/1")
        for name, ip in (
            ("a", "1.1.1.1"),
            ("b", "1.1.1.1"),
            ("c", "1.1.1.1"),
            ("d", "2.2.2.2"),
            ("e", "3.3.3.3"),
        )
    ]
    assert [peer.name for peer in witnesses(peers)] == ["a", "d", "e"]
    assert [peer.name for peer in witnesses(peers[:3])] == ["a", "b", "c"]
    assert witnesses([]) == []


@pytest.mark.parametrize(
    ("address", "nearness"),
    [
        ("/ip4/127.0.0.1/tcp/1", "from this machine itself"),
        ("/ip4/10.0.0.1/tcp/1", "from the same network"),
        ("/ip4/8.8.8.8/tcp/1", "8/tcp/1."),
    ],
)
def test_from_where_it_is_reached(address: str, nearness: str) -> None:
    seen = Seen(dialled_back=[DialledBack("a", address, True), DialledBack("b", refusal="No.")])
    seen.initial = [PeerSeen("a", peer_of("a"), rtt=0.1)]
    (found,) = told_of(seen, "reachable")
    assert found.cause.startswith("1 of 2 peers that were asked could connect to ")
    assert nearness in found.cause


def test_addresses_lead_first_to_a_machine() -> None:
    assert endpoint_of("/ip4/192.0.2.1/tcp/4001") == AT
    assert endpoint_of(parse_address(address_of("a"))) == AT
    relayed = endpoint_of(f"/ip4/192.0.2.1/tcp/4001/p2p/{peer_of('a')}/p2p-circuit")
    assert relayed == replace(AT, is_relayed=True)
    assert endpoint_of("/ip4/192.0.2.1") is None
    assert (ip_of("/dns4/x.example/tcp/1"), ip_of("/ip6/::1/udp/1/quic-v1"), ip_of("x")) == ("", "::1", "")


PROBLEM = Finding("records", "problem", "It is broken.", "Mend it.", {"peers": 0})
FINE = Finding("clock", "ok", "It is right.")


def args(**more: Any) -> argparse.Namespace:
    given = {
        "initial_peers": (address_of("a"),),
        "swarm_key": None,
        "identity": None,
        "allow_peers": None,
        "block_peers": None,
        "json": False,
        "timeout": 5.0,
        "port": None,
    }
    return argparse.Namespace(**{**given, "model": None, **more})


@pytest.mark.parametrize(("found", "code"), [([FINE], 0), ([FINE, PROBLEM], 1)])
@pytest.mark.parametrize("as_json", [True, False])
async def test_the_exit_code_says_whether_something_is_wrong(
    found: list[Finding],
    code: int,
    as_json: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def look(*_: object) -> Seen:
        return Seen()

    monkeypatch.setattr(command, "look", look)
    monkeypatch.setattr(command, "findings", lambda seen: found)
    assert await command.main(args(json=as_json)) == code
    out = capsys.readouterr().out
    if as_json:
        assert [json.loads(line) for line in out.splitlines()] == [one.as_json() for one in found]
    else:
        assert ("Nothing is wrong." if code == 0 else "1 problem.") in out


def test_findings_are_drawn_with_what_to_do_below() -> None:
    drawn = io.StringIO()
    Console(file=drawn, width=60).print(command.drawn([FINE, PROBLEM]))
    lines = [line.rstrip() for line in drawn.getvalue().splitlines()]
    assert lines == [
        "ok       clock    It is right.",
        "problem  records  It is broken.",
        "                  → Mend it.",
    ]


async def test_without_a_peer_to_join_by_there_is_nothing_to_look_at() -> None:
    with pytest.raises(InputError, match="no peer to join by"):
        await command.main(args(initial_peers=()))


def test_records_say_what_is_wrong_with_them() -> None:
    for records, level in (
        (RecordsSeen(None, True, True, 0.01, 1), "ok"),
        (RecordsSeen(None, True, False, 0.01, 1), "problem"),
        (RecordsSeen(None, False, False, 0.01, 1), "problem"),
    ):
        (found,) = told_of(Seen(records=records), "records")
        assert found.level == level
        assert "1 peer keeps them" in found.cause or level == "problem"
