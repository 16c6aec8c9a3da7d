"""The door of a peer, in the in-process network: keys in all directions, strangers, and lists that change."""

import asyncio
from pathlib import Path

import pytest

from swarm.net import door as door_module
from swarm.net import proof
from swarm.net.calls import MessageStream, Refused, ping
from swarm.net.door import REFRESH_PERIOD, Door
from swarm.net.identity import Identity
from swarm.net.memory import MemoryNetwork
from swarm.net.messages import Ping, Pong, decode, encode
from swarm.net.peer_lists import PeerLists
from swarm.net.proof import NONCE_BYTES, PROOF_BYTES, PROOF_TIMEOUT, call_prove
from swarm.net.swarm_key import SwarmKey
from swarm.net.transport import (
    MAX_HEADER_BYTES,
    PRIVATE_PROTOCOL,
    NotAdmitted,
    PeerUnreachable,
    Stream,
    StreamClosed,
)
from swarm.net.virtual_time import in_virtual_time
from swarm.net.wire import Link

RIGHT, WRONG = SwarmKey(b"r" * 32), SwarmKey(b"w" * 32)


class Host:
    """A listening peer that answers pings, and notes who came in."""

    def __init__(self, network: MemoryNetwork, door: Door | None):
        self.transport = network.transport("host", door)
        self.guests: list[str] = []
        self.ended = 0

    async def serve(self, stream: Stream) -> None:
        self.guests.append(stream.peer)
        try:
            while True:
                header, _ = await stream.receive()
                message = decode(header)
                assert isinstance(message, Ping)
                await stream.send(encode(Pong(nonce=message.nonce)))
        finally:
            self.ended += 1


async def host_of(network: MemoryNetwork, door: Door | None = None) -> Host:
    host = Host(network, door)
    await host.transport.listen(host.serve)
    return host


def now() -> float:
    return asyncio.get_running_loop().time()


async def pinged(stream: Stream) -> float:
    return await ping(MessageStream(stream), clock=now)


@in_virtual_time
async def test_who_has_the_key_comes_in_after_one_round_trip() -> None:
    network = MemoryNetwork(default_link=Link(latency=0.05))
    host = await host_of(network, Door(RIGHT))
    guest = network.transport("guest", Door(SwarmKey(b"r" * 32)))
    stream = await guest.open_stream(host.transport.peer)
    assert now() == pytest.approx(0.2), "the way there and back, and once more for the proof"
    assert await pinged(stream) == pytest.approx(0.1)
    assert host.guests == [guest.peer]


@pytest.mark.parametrize(("theirs", "own"), [(RIGHT, WRONG), (WRONG, RIGHT), (RIGHT, None), (None, RIGHT)])
@in_virtual_time
async def test_a_wrong_key_or_none_stays_out(theirs: SwarmKey | None, own: SwarmKey | None) -> None:
    network = MemoryNetwork()
    host = await host_of(network, Door(theirs))
    guest = network.transport("guest", Door(own))
    with pytest.raises(PeerUnreachable) as refusal:
        await guest.open_stream(host.transport.peer)
    assert now() < 0.1
    assert not host.guests
    assert refusal.value.message.endswith(
        "has another swarm key." if theirs and own else f"does not speak {Door(own).protocol}."
    )


class Keyless(Door):
    """The door of somebody who knows that the swarm is private, and not its key."""

    protocol = PRIVATE_PROTOCOL


async def at_the_door(network: MemoryNetwork, host: Host) -> Stream:
    """A stream of a stranger who has said nothing yet."""
    return await network.transport("stranger", Keyless()).open_stream(host.transport.peer)


@pytest.mark.parametrize(
    "said",
    [
        encode(Ping(nonce=1)),
        b"x",
        bytes(NONCE_BYTES - 1),
        bytes(NONCE_BYTES + 1),
        bytes(MAX_HEADER_BYTES),
        bytes(NONCE_BYTES + PROOF_BYTES),
    ],
)
@in_virtual_time
async def test_a_stranger_is_answered_with_nothing(said: bytes) -> None:
    network = MemoryNetwork()
    host = await host_of(network, Door(RIGHT))
    stream = await at_the_door(network, host)
    await stream.send(said)
    with pytest.raises(StreamClosed):
        await stream.receive()
    assert not host.guests


@pytest.mark.parametrize(
    "second", [b"", bytes(PROOF_BYTES), bytes(PROOF_BYTES + 1), b"x", encode(Ping(nonce=1))]
)
@in_virtual_time
async def test_a_stranger_cannot_make_up_a_proof(second: bytes) -> None:
    network = MemoryNetwork()
    host = await host_of(network, Door(RIGHT))
    stream = await at_the_door(network, host)
    await stream.send(bytes(NONCE_BYTES))
    answer, _ = await stream.receive()
    assert len(answer) == NONCE_BYTES + PROOF_BYTES
    await stream.send(second or answer[NONCE_BYTES:])  # the host's own proof, sent back to it
    with pytest.raises(StreamClosed):
        await stream.receive()
    assert not host.guests


@in_virtual_time
async def test_a_body_is_no_proof() -> None:
    network = MemoryNetwork()
    host = await host_of(network, Door(RIGHT))
    stream = await at_the_door(network, host)
    await stream.send(bytes(NONCE_BYTES), b"x")
    with pytest.raises(StreamClosed):
        await stream.receive()


@in_virtual_time
async def test_a_proof_is_of_no_use_on_another_stream_or_for_another_peer() -> None:
    """What a member says to a stranger, the stranger says to the host in the member's place."""
    network = MemoryNetwork()
    host = await host_of(network, Door(RIGHT))
    member = network.transport("member", Door(RIGHT))
    relayed = []

    async def relay(stream: Stream) -> None:
        onward = await at_the_door(network, host)
        nonce, _ = await stream.receive()
        await onward.send(nonce)
        answer, _ = await onward.receive()
        await stream.send(answer)
        try:
            relayed.append(await stream.receive())
        except StreamClosed:
            relayed.append("the member saw through it")

    middle = network.transport("middle", Keyless())
    await middle.listen(relay)
    with pytest.raises(NotAdmitted):
        await member.open_stream(middle.peer)
    await asyncio.sleep(1)
    assert relayed == ["the member saw through it"]
    assert not host.guests


@in_virtual_time
async def test_silence_at_the_door_ends() -> None:
    network = MemoryNetwork()
    host = await host_of(network, Door(RIGHT))
    stream = await at_the_door(network, host)
    began = now()
    with pytest.raises(StreamClosed):
        await stream.receive()
    assert now() - began == pytest.approx(PROOF_TIMEOUT)


@in_virtual_time
async def test_a_host_that_proves_nothing_is_left() -> None:
    network = MemoryNetwork()
    host = await host_of(network, Keyless())
    guest = network.transport("guest", Door(RIGHT))
    began = now()
    with pytest.raises(NotAdmitted, match="did not prove"):
        await guest.open_stream(host.transport.peer)
    assert now() - began <= PROOF_TIMEOUT
    assert not guest.streams


@in_virtual_time
async def test_giving_up_in_the_middle_of_a_proof_leaves_nothing_open() -> None:
    network = MemoryNetwork(default_link=Link(latency=1.0))
    host = await host_of(network, Door(RIGHT))
    guest = network.transport("guest", Door(RIGHT))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(3.0):
            await guest.open_stream(host.transport.peer)
    assert not guest.streams
    await asyncio.sleep(5)
    assert not host.transport.streams
    assert not host.guests


def test_proofs_differ_by_all_that_they_are_bound_to() -> None:
    a, b, one, two = "A", "B", bytes(NONCE_BYTES), b"1" * NONCE_BYTES
    made = {
        proof._proof(RIGHT, "opener", a, b, one, two),
        proof._proof(WRONG, "opener", a, b, one, two),
        proof._proof(RIGHT, "acceptor", a, b, one, two),
        proof._proof(RIGHT, "opener", b, a, one, two),
        proof._proof(RIGHT, "opener", a, b, two, one),
        proof._proof(RIGHT, "opener", "AB", "", one, two),
    }
    assert len(made) == 6
    assert {len(one) for one in made} == {PROOF_BYTES}


def written(path: Path, *names: str) -> Path:
    path.write_text("".join(f"{Identity.from_seed(f'memory network: {name}').peer}\n" for name in names))
    return path


@in_virtual_time
async def test_who_is_not_on_the_list_is_told_so(tmp_path: Path) -> None:
    network = MemoryNetwork()
    host = await host_of(network, Door(lists=PeerLists(allow=written(tmp_path / "allow", "friend"))))
    friend, other = network.transport("friend"), network.transport("other")
    assert await pinged(await friend.open_stream(host.transport.peer)) == 0
    stream = MessageStream(await other.open_stream(host.transport.peer))
    with pytest.raises(Refused, match=f"Peer {other.peer} is not admitted") as refusal:
        await stream.call(Ping(nonce=1), timeout=1)
    assert refusal.value.error.code == "not_allowed"
    assert host.guests == [friend.peer]
    stream.close()
    await host.transport.close()


@in_virtual_time
async def test_who_is_turned_away_cannot_stay() -> None:
    network = MemoryNetwork()
    host = await host_of(network)
    host.transport.door.admits = lambda peer: False  # type: ignore[method-assign]
    stream = await network.transport("other").open_stream(host.transport.peer)
    with pytest.raises(StreamClosed):
        await stream.receive()
    assert now() == pytest.approx(door_module.TURN_AWAY_TIMEOUT)
    assert not host.guests


@in_virtual_time
async def test_nothing_is_opened_to_who_is_blocked(tmp_path: Path) -> None:
    network = MemoryNetwork()
    host = await host_of(network)
    guest = network.transport("guest", Door(lists=PeerLists(block=written(tmp_path / "block", "host"))))
    with pytest.raises(NotAdmitted, match="do not admit"):
        await guest.open_stream(host.transport.peer)
    assert not host.transport.streams


@in_virtual_time
async def test_a_changed_list_ends_what_it_forbids(tmp_path: Path) -> None:
    network = MemoryNetwork()
    block = written(tmp_path / "block")
    host = await host_of(network, Door(lists=PeerLists(block=block)))
    good, bad = network.transport("good"), network.transport("bad")
    streams = [await peer.open_stream(host.transport.peer) for peer in (good, bad)]
    assert [await pinged(stream) for stream in streams] == [0, 0]
    written(block, "bad")
    await asyncio.sleep(2 * REFRESH_PERIOD)
    assert await pinged(streams[0]) == 0
    with pytest.raises(StreamClosed):
        await streams[1].receive()
    with pytest.raises(Refused):
        await pinged(await bad.open_stream(host.transport.peer))
    written(block)
    await asyncio.sleep(2 * REFRESH_PERIOD)
    assert await pinged(await bad.open_stream(host.transport.peer)) == 0
    await host.transport.close()


@in_virtual_time
async def test_a_member_may_be_blocked_all_the_same(tmp_path: Path) -> None:
    network = MemoryNetwork()
    host = await host_of(network, Door(RIGHT, PeerLists(block=written(tmp_path / "block", "bad"))))
    good, bad = network.transport("good", Door(RIGHT)), network.transport("bad", Door(RIGHT))
    assert await pinged(await good.open_stream(host.transport.peer)) == 0
    with pytest.raises(Refused):
        await pinged(await bad.open_stream(host.transport.peer))
    await host.transport.close()


async def test_proving_over_a_broken_stream_is_refusal() -> None:
    network = MemoryNetwork()
    host = await host_of(network)
    stream = await network.transport("guest").open_stream(host.transport.peer)
    stream.close()
    with pytest.raises(NotAdmitted):
        await call_prove(stream, host.transport.peer, RIGHT)
