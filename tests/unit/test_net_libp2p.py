"""The real network: daemons on loopback. One event loop and two peers serve most of the tests."""

import asyncio
import logging
import os
import signal
import socket
from contextlib import AsyncExitStack

import pytest
import pytest_asyncio

from swarm.errors import InputError
from swarm.net import daemon, door, libp2p_stream
from swarm.net.addresses import endpoint_of
from swarm.net.calls import MessageStream, ping
from swarm.net.dialling import dial
from swarm.net.identity import Identity
from swarm.net.libp2p import Libp2pTransport
from swarm.net.messages import Pong
from swarm.net.multiaddrs import peer_bytes
from swarm.net.peer_lists import PeerLists
from swarm.net.relaying import ENOUGH_BYTES, Relaying
from swarm.net.swarm_key import SwarmKey
from swarm.net.transport import FrameError, OtherPeer, PeerUnreachable, StreamClosed, TransportError

pytestmark = pytest.mark.asyncio(loop_scope="module")

LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)
NOBODY = Identity.from_seed("nobody").peer


class Server:
    """A listening peer whose streams the test at hand serves."""

    def __init__(self, transport: Libp2pTransport):
        self.transport = transport
        self.on_stream = echo

    async def serve(self, stream):
        await self.on_stream(stream)


async def echo(stream):
    while True:
        await stream.send(*await stream.receive())


async def start(
    initial_peers=(), host_maddrs=LOOPBACK, identity=None, key=None, lists=None, shortcut_port=0
) -> Libp2pTransport:
    return await Libp2pTransport.start(
        identity or Identity.generate(),
        initial_peers,
        host_maddrs,
        shortcut_port=shortcut_port,
        door=door.Door(key, lists),
    )


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def module_server():
    async with await start() as transport:
        server = Server(transport)
        await transport.listen(server.serve)
        yield server


@pytest.fixture
def server(module_server):
    module_server.on_stream = echo
    return module_server


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def client(module_server):
    """A peer that listens nowhere and knows the server from the start."""
    async with await start(await module_server.transport.addresses(), host_maddrs=()) as transport:
        yield transport


async def test_peers_are_authenticated_by_the_keys_that_sign(server, client):
    seen = asyncio.get_running_loop().create_future()

    async def on_stream(stream):
        seen.set_result(stream.peer)

    server.on_stream = on_stream
    stream = await client.open_stream(server.transport.peer)
    assert stream.peer == server.transport.peer
    assert await seen == client.peer == client.identity.peer
    assert str(client.p2p.peer_id) == client.peer


async def test_where_peers_listen_is_known_or_not(server, client):
    assert set(await client.known_addresses(server.transport.peer)) == set(await server.transport.addresses())
    assert await client.known_addresses(Identity.from_seed("nobody").peer) == []


async def test_frames_of_all_sizes(server, client):
    stream = await client.open_stream(server.transport.peer)
    for size in (0, 1, 65_536, 65_537, 4 * 2**20):
        body = os.urandom(size)
        await stream.send(b"header", body)
        assert await stream.receive() == (b"header", body)


async def test_senders_of_one_stream_do_not_mix(server, client):
    stream = await client.open_stream(server.transport.peer)
    bodies = [bytes([n]) * 100_000 for n in range(10)]
    async with asyncio.TaskGroup() as tasks:
        for body in bodies:
            tasks.create_task(stream.send(b"header", body))
        got = [bytes((await stream.receive())[1]) for _ in bodies]
    assert sorted(got) == bodies


async def test_a_close_is_noticed_and_nothing_sent_before_is_lost(server, client):
    got, ended = [], asyncio.Event()

    async def on_stream(stream):
        try:
            while True:
                got.append(len((await stream.receive())[1]))
        except StreamClosed:
            ended.set()

    server.on_stream = on_stream
    stream = await client.open_stream(server.transport.peer)
    for size in (1, 5_000_000, 2):
        await stream.send(b"header", bytes(size))
    stream.close()
    stream.close()
    async with asyncio.timeout(5):
        await ended.wait()
    assert got == [1, 5_000_000, 2]
    for use in (stream.receive, lambda: stream.send(b"x")):
        with pytest.raises(StreamClosed):
            await use()


async def test_a_frame_too_large_closes_its_stream_and_no_other(server, client):
    async def on_stream(stream):
        while True:
            await stream.receive(max_body=10)
            await stream.send(b"taken")

    server.on_stream = on_stream
    good, bad = [await client.open_stream(server.transport.peer) for _ in range(2)]
    for _ in range(2):
        await bad.send(b"x", bytes(11))
    with pytest.raises(StreamClosed):
        await bad.receive()
    await good.send(b"x", bytes(10))
    assert await good.receive() == (b"taken", b"")


async def test_a_receive_cancelled_within_a_frame_closes_the_stream(server, client):
    async def on_stream(stream):
        stream._writer.write(b"\x05\0\0\0\0\0\0\0he")
        await asyncio.sleep(5)

    server.on_stream = on_stream
    stream = await client.open_stream(server.transport.peer)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await stream.receive()
    with pytest.raises(StreamClosed):
        await stream.receive()


async def test_a_receive_cancelled_between_frames_loses_nothing(server, client):
    stream = await client.open_stream(server.transport.peer)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await stream.receive()
    await stream.send(b"x", b"y")
    assert await stream.receive() == (b"x", b"y")


async def test_random_bytes_harm_nobody(server, client, caplog):
    async def on_stream(stream):
        messages = MessageStream(stream)
        while True:
            question, _ = await messages.receive(max_body=100)
            await messages.send(Pong(nonce=question.nonce))

    server.on_stream = on_stream
    with caplog.at_level(logging.ERROR):
        for _ in range(50):
            stream = await client.open_stream(server.transport.peer)
            stream._writer.write(os.urandom(100))
            with pytest.raises((StreamClosed, FrameError)):
                await stream.receive()
        assert await ping(MessageStream(await client.open_stream(server.transport.peer))) < 1
    assert not caplog.records


async def found_by_routing(client, peer):
    """A stream to a peer that has just come: those in between learn of it a moment later."""
    async with asyncio.timeout(5):
        while True:
            try:
                return await client.open_stream(peer.peer)
            except PeerUnreachable:
                await asyncio.sleep(0.02)


async def test_a_third_peer_is_found_by_routing_and_by_address(server, client):
    async with await start(await server.transport.addresses()) as third:
        await third.listen(echo)
        stream = await found_by_routing(client, third)
        await stream.send(b"by routing")
        assert (await stream.receive())[0] == b"by routing"
    async with await start() as stranger:
        await stranger.listen(echo)
        stream = await client.open_stream(stranger.peer, ["nonsense", *await stranger.addresses()])
        await stream.send(b"by address")
        assert (await stream.receive())[0] == b"by address"


async def test_a_peer_relays_for_nobody_unless_asked(server, client, monkeypatch):
    monkeypatch.setattr(door, "PROTOCOL", "/libp2p/circuit/relay/0.2.0/hop")
    with pytest.raises(PeerUnreachable, match=r"does not speak /libp2p/circuit/relay/0\.2\.0/hop"):
        await client.open_stream(server.transport.peer)


async def test_who_relays_carries_all_that_a_hidden_peer_says(server):
    """Of the two relays that a daemon starts, the one that ends connections after 128 KiB is not to count."""
    own = Identity.generate()
    async with AsyncExitStack() as stack:
        relay = await stack.enter_async_context(
            await Libp2pTransport.start(own, host_maddrs=LOOPBACK, relaying=Relaying(uses=True, serves=True))
        )
        (way,) = await relay.addresses()
        hidden = await stack.enter_async_context(
            await Libp2pTransport.start(
                Identity.generate(), [way], LOOPBACK, relaying=Relaying(uses=True, through=(way,))
            )
        )
        await hidden.listen(echo)
        asker = await stack.enter_async_context(
            await Libp2pTransport.start(
                Identity.generate(), [way], (), routes_for_others=False, relaying=Relaying(uses=True)
            )
        )
        assert await asker.bytes_relayed_by(relay.peer) >= ENOUGH_BYTES
        told = await hidden.addresses()
        (relayed,) = [address for address in told if "p2p-circuit" in address]
        assert relayed == f"{way}/p2p-circuit/p2p/{hidden.peer}"
        stream = await asker.open_stream(hidden.peer, [relayed])
        for _ in range(4):
            await stream.send(b"header", bytes(128 * 1024))
            _, body = await stream.receive()
            assert len(body) == 128 * 1024
        assert (await asker.networks())[peer_bytes(hidden.peer)] == "127.0.0.0/16"


async def test_a_server_of_the_internet_is_no_way_into_its_own_network(server, monkeypatch):
    (address,) = await server.transport.addresses()
    async with await start() as other:
        monkeypatch.setattr(other, "_own", ["/ip4/8.8.4.4/tcp/1"])
        with pytest.raises(PeerUnreachable):
            await other.open_stream(server.transport.peer, [address])
        assert await server.transport.seen_at(other.peer) == "", "it was not dialled"
    async with await start() as private:
        (await private.open_stream(server.transport.peer, [address])).close()


async def test_only_who_has_the_key_speaks_to_a_private_peer(server):
    right, wrong = SwarmKey.generate(), SwarmKey.generate()
    served = []

    async def serve(stream):
        served.append(stream.peer)
        await echo(stream)

    async with await start(key=right) as private:
        await private.listen(serve)
        known = await private.addresses()
        async with await start(known, (), key=right) as member:
            stream = await member.open_stream(private.peer)
            await stream.send(b"header", b"body")
            assert await stream.receive() == (b"header", b"body")
            with pytest.raises(PeerUnreachable, match="does not speak /swarm/private"):
                await member.open_stream(server.transport.peer, await server.transport.addresses())
        for key, says in ((wrong, "another swarm key"), (None, "does not speak /swarm/inference")):
            async with await start(known, (), key=key) as stranger:
                with pytest.raises(PeerUnreachable, match=says):
                    await stranger.open_stream(private.peer)
                assert not stranger._streams
        assert served == [member.peer]


async def talk(stream, until):
    """Have things echoed until that holds, and once more."""
    async with asyncio.timeout(5):
        is_enough = False
        while not is_enough:
            is_enough = until()
            await stream.send(b"header", b"body")
            assert await stream.receive() == (b"header", b"body")


async def test_a_stream_that_lives_goes_on_by_a_shortcut(server, client):
    before = set(server.transport._streams)
    stream = await client.open_stream(server.transport.peer)
    assert not stream.is_short
    await talk(stream, until=lambda: stream.is_short)
    (other,) = server.transport._streams - before
    assert other.is_short
    assert other.peer == client.peer
    stream.close()
    async with asyncio.timeout(5):
        while other in server.transport._streams:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_private_stream_goes_on_by_a_shortcut():
    key = SwarmKey.generate()
    async with await start(key=key) as private, await start(await private.addresses(), (), key=key) as member:
        await private.listen(echo)
        stream = await member.open_stream(private.peer)
        assert stream.protocol.startswith("/swarm/private/")
        await talk(stream, until=lambda: stream.is_short)


async def test_who_knows_of_no_shortcuts_is_spoken_to_as_ever(server, client):
    (address,) = await server.transport.addresses()
    async with await start([address], shortcut_port=None) as older:
        await older.listen(echo)
        for opener, acceptor in ((older, server.transport), (client, older)):
            stream = await opener.open_stream(acceptor.peer, await acceptor.addresses())
            assert stream.protocol == "/swarm/inference/1.0.0"
            for _ in range(20):
                await stream.send(b"header")
                assert await stream.receive() == (b"header", b"")
            assert not stream.is_short
            stream.close()


async def test_who_is_not_admitted_any_more_is_cut_off_a_shortcut_too(client, tmp_path, monkeypatch):
    monkeypatch.setattr(door, "REFRESH_PERIOD", 0.05)
    blocked = tmp_path / "blocked"
    blocked.touch()
    async with await start(lists=PeerLists(block=blocked)) as choosy:
        await choosy.listen(echo)
        stream = await client.open_stream(choosy.peer, await choosy.addresses())
        await talk(stream, until=lambda: stream.is_short)
        blocked.write_text(client.peer)
        async with asyncio.timeout(5):
            with pytest.raises(StreamClosed):
                await stream.receive()
        assert not choosy._streams


async def test_a_server_of_the_internet_takes_no_shortcut_into_its_own_network(server, monkeypatch):
    async with await start() as other:
        stream = await other.open_stream(server.transport.peer, await server.transport.addresses())
        assert await other._shortcut_hosts(server.transport.peer) == ["127.0.0.1"]
        monkeypatch.setattr(other, "_own", ["/ip4/8.8.4.4/tcp/1"])
        assert await other._shortcut_hosts(server.transport.peer) == []
        assert await other._shortcut_hosts(NOBODY) == []
        stream.close()


async def test_who_cannot_be_reached_costs_no_connection(server, client):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        for peer in (NOBODY, "nonsense", client.peer):
            with pytest.raises(PeerUnreachable, match="cannot be reached"):
                await client.open_stream(peer, [f"/ip4/127.0.0.1/tcp/1/p2p/{peer}"])
    with pytest.raises(PeerUnreachable, match="does not speak /swarm/inference"):
        await server.transport.open_stream(client.peer)
    await asyncio.sleep(0)
    assert len(os.listdir("/proc/self/fd")) <= before


async def test_another_peer_at_the_address_is_named(server, client):
    (address,) = await server.transport.addresses()
    path = address.partition("/p2p/")[0]
    with pytest.raises(OtherPeer) as wrong:
        await client.open_stream(NOBODY, [f"{path}/p2p/{NOBODY}"])
    assert wrong.value.found == server.transport.peer
    with pytest.raises(PeerUnreachable, match="cannot be reached"):
        await start([f"{path}/p2p/{NOBODY}"], host_maddrs=())


async def test_peers_tell_where_connections_come_from(server):
    async with await start(await server.transport.addresses()) as peer:
        (own,) = await peer.addresses()
        (address,) = await server.transport.addresses()
        assert await server.transport.seen_at(peer.peer) == own.partition("/p2p/")[0]
        assert await peer.seen_at(server.transport.peer) == address.partition("/p2p/")[0]
    assert await server.transport.seen_at(NOBODY) == ""


async def test_who_connects_is_greeted_before_saying_anything(server):
    (address,) = await server.transport.addresses()
    at = endpoint_of(address.partition("/p2p/")[0])
    assert at is not None
    assert await dial(at.host, at.port, 10.0) == "greeted"


async def test_a_dial_that_is_cancelled_leaves_no_stream(server, client):
    before = set(server.transport._streams), set(client._streams)
    for delay in (0, 0.0002, 0.0005, 0.001, 0.002):
        dialling = asyncio.create_task(client.open_stream(server.transport.peer))
        await asyncio.sleep(delay)
        if not dialling.cancel():
            dialling.result().close()
    async with asyncio.timeout(5):
        while (server.transport._streams, client._streams) != before:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_dead_daemon_is_noticed(server):
    victim = await start(await server.transport.addresses())
    stream = await victim.open_stream(server.transport.peer)
    await stream.send(b"x")
    await stream.receive()
    os.kill(victim._daemon._process.pid, signal.SIGKILL)
    async with asyncio.timeout(2):
        with pytest.raises(StreamClosed):
            await stream.receive()
        failure = await victim.wait_failed()
    assert "daemon of this peer died (exit code -9)" in failure.message
    assert failure.hint
    for use in (victim.addresses, lambda: victim.open_stream(server.transport.peer)):
        with pytest.raises(TransportError):
            await use()
    await victim.close()
    await victim.close()
    with pytest.raises(PeerUnreachable):
        await server.transport.open_stream(victim.peer)


async def test_a_port_in_use():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port}: address already in use"):
            await start(host_maddrs=[f"/ip4/127.0.0.1/tcp/{port}"])


async def test_a_port_for_shortcuts():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        taken.listen()
        with pytest.raises(InputError, match=f"port {port}: address already in use"):
            await start(shortcut_port=port)
    async with (
        await start(shortcut_port=port) as transport,
        await start(await transport.addresses(), ()) as peer,
    ):
        await transport.listen(echo)
        stream = await peer.open_stream(transport.peer)
        await talk(stream, until=lambda: stream.is_short)
        assert stream._writer.transport.get_extra_info("peername") == ("127.0.0.1", port)


async def test_a_port_of_another_peer(server):
    (address,) = await server.transport.addresses()
    with pytest.raises(InputError, match="address already in use"):
        await start(host_maddrs=[address.partition("/p2p/")[0]])


@pytest.mark.parametrize("address", ["/ip4/192.0.2.1/tcp/0", "/ip4/192.0.2.1/udp/0/quic-v1"])
async def test_an_address_of_another_machine(address):
    with pytest.raises(InputError, match=r"Cannot listen on 192\.0\.2\.1"):
        await start(host_maddrs=[address])


async def test_initial_peers_that_do_not_answer(server):
    silent = [f"/ip4/127.0.0.1/tcp/{port}/p2p/{NOBODY}" for port in (1, 2)]
    with pytest.raises(PeerUnreachable, match=r"initial peer /ip4/127\.0\.0\.1/tcp/1/p2p/12D3") as raised:
        await start(silent[:1])
    assert raised.value.hint
    with pytest.raises(PeerUnreachable, match="None of the initial peers"):
        await start(silent)
    (address,) = await server.transport.addresses()
    with pytest.raises(PeerUnreachable):  # the right place, but not the peer that was asked for
        await start([address.replace(server.transport.peer, NOBODY)])
    async with await start([*silent, address]) as joined:
        assert (await joined.open_stream(server.transport.peer)).peer == server.transport.peer


async def test_a_peer_is_no_initial_peer_of_itself():
    identity = Identity.generate()
    async with await start([f"/ip4/127.0.0.1/tcp/1/p2p/{identity.peer}"], identity=identity) as transport:
        assert transport.peer == identity.peer


@pytest.mark.parametrize("address", ["foo", "/ip4/127.0.0.1/tcp/1", "/ip4/1.2.3/tcp/1/p2p/" + NOBODY])
async def test_malformed_initial_peers(address):
    with pytest.raises(InputError, match="is not the address of a peer"):
        await start([address])


async def test_a_daemon_that_cannot_start(monkeypatch):
    with pytest.raises(TransportError, match=r"did not start: .*failed to parse multiaddr"):
        await daemon.Daemon.start(Identity.generate(), ["-hostAddrs=nonsense"])
    monkeypatch.setattr(daemon.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TransportError, match="is missing from the hivemind package"):
        await start()


async def test_a_daemon_needs_a_folder_with_a_short_path(tmp_path, monkeypatch):
    long = tmp_path / ("x" * daemon.MOST_SOCKET_PATH)
    long.mkdir()
    monkeypatch.setattr(daemon.tempfile, "tempdir", str(long))
    with pytest.raises(InputError, match="too long a path"):
        await daemon.Daemon.start(Identity.generate(), [])
    assert not list(long.iterdir())


async def test_a_peer_that_never_reads_does_not_keep_a_closed_stream(server, client, monkeypatch):
    monkeypatch.setattr(libp2p_stream, "LINGER", 0.1)
    server.on_stream = lambda stream: asyncio.sleep(60)
    stream = await client.open_stream(server.transport.peer)

    async def send_forever():
        while True:
            await stream.send(b"x", bytes(2**20))

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(send_forever(), 0.3)
    transport = stream._writer.transport
    assert transport.get_write_buffer_size()
    stream.close()
    await asyncio.sleep(0.2)
    assert not transport.get_write_buffer_size()


async def test_closing_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(daemon.tempfile, "tempdir", str(tmp_path))
    before = asyncio.all_tasks()
    transport = await start()
    folder = transport._daemon._folder
    assert folder.parent == tmp_path
    assert os.listdir(folder) == ["control.sock"]
    process = transport._daemon._process
    assert os.getsid(process.pid) != os.getsid(0)
    await transport.close()
    assert process.returncode is not None
    assert not os.listdir(tmp_path)
    assert asyncio.all_tasks() <= before


async def test_hivemind_leaves_logging_alone():
    assert logging.getLevelName(logging.WARNING) == "WARNING"
    assert not logging.getLogger("hivemind").handlers
    assert logging.getLogger("hivemind").propagate
