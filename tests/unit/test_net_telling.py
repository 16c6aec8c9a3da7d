"""The libp2p daemon is told where the internet sees it. What answers instead of a daemon is an error."""

import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from swarm.net.addresses import Endpoint
from swarm.net.dialling import GREETING
from swarm.net.identity import Identity
from swarm.net.libp2p import Libp2pTransport
from swarm.net.relaying import Relaying
from swarm.net.telling import tell, tellable

OUTER = "/ip4/5.6.7.8/tcp/31330"
LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)

many_loopbacks = pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 to 5 are Linux's alone")


@pytest.mark.parametrize(
    ("address", "place"),
    [
        (OUTER, Endpoint("ip4", "5.6.7.8", "tcp", 31330)),
        ("/ip6/2a00::1/tcp/1", None),
        ("/ip4/5.6.7.8/udp/1/quic-v1", None),
        ("/dns4/example.org/tcp/1", None),
        (f"{OUTER}/p2p/{Identity.from_seed('relay').peer}/p2p-circuit", None),
        ("nonsense", None),
    ],
)
def test_what_can_be_told(address: str, place: Endpoint | None) -> None:
    assert tellable(address) == place


@many_loopbacks
async def test_the_daemon_believes_it() -> None:
    async with await Libp2pTransport.start(
        Identity.generate(), (), LOOPBACK, relaying=Relaying(uses=True)
    ) as transport:
        for useless in ("nonsense", "/ip6/2a00::1/tcp/1"):
            await transport.be_seen_at(useless)
        assert len(await transport.addresses()) == 1
        await transport.be_seen_at(OUTER)
        assert f"{OUTER}/p2p/{transport.peer}" in await transport.addresses()


async def test_who_listens_nowhere_is_told_nothing() -> None:
    async with await Libp2pTransport.start(
        Identity.generate(), (), (), relaying=Relaying(uses=True)
    ) as transport:
        await transport.be_seen_at(OUTER)
        assert await transport.addresses() == []


@contextmanager
def listener(answer: Callable[[socket.socket], None]) -> Iterator[Endpoint]:
    """Something that is no daemon, and answers one connection so."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with server.accept()[0] as connection:
                connection.settimeout(5)
                answer(connection)

        serving = threading.Thread(target=serve)
        serving.start()
        yield Endpoint("ip4", "127.0.0.1", "tcp", server.getsockname()[1])
        serving.join()


def hang_up(connection: socket.socket) -> None:
    connection.recv(8)


def speak_otherwise(connection: socket.socket) -> None:
    connection.recv(8)
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(64))


def break_off(connection: socket.socket) -> None:
    greeted = GREETING + b"\x0b/tls/1.0.0\n"
    connection.sendall(greeted)
    connection.recv(len(greeted), socket.MSG_WAITALL)
    connection.sendall(bytes(64))


@many_loopbacks
@pytest.mark.parametrize(
    ("answer", "says"),
    [(hang_up, "hung up|reset"), (speak_otherwise, "something else"), (break_off, "SSL")],
)
def test_what_is_no_daemon_is_an_error(answer: Callable[[socket.socket], None], says: str) -> None:
    with listener(answer) as place, pytest.raises(OSError, match=says):
        tell(place, Endpoint("ip4", "5.6.7.8", "tcp", 31330))
