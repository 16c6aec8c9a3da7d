"""Telling this machine's libp2p daemon at which address its router shows it to the internet.

A daemon believes that, and makes straight connections with peers behind routers (hole punching), once four
peers with different IP addresses have told it the same. Few swarms have as many that can be dialled, so what
they tell is passed on by four peers that exist for a moment only, at four of this machine's own addresses.

They speak as little of libp2p as that takes. What the daemon is told is not checked here, nor with whom it
connects then.

Sources: libp2p specs, `connections/README.md` and `identify/README.md`; multistream-select 1.0; yamux's
`spec.md`; go-libp2p 0.32.1, `p2p/protocol/identify/obsaddr.go` (`ActivationThresh`).
"""

import ipaddress
import socket
import ssl
import struct

import base58

from swarm.net.addresses import Endpoint, endpoint_of
from swarm.net.dialling import GREETING
from swarm.net.identity import Identity
from swarm.net.loopback_tls import context_of

FROM = ("127.0.0.2", "127.0.0.3", "127.0.0.4", "127.0.0.5")
TIMEOUT = 3.0
"""Seconds for each step of a conversation with the daemon."""
MAX_FRAMES = 64
MAX_FRAME_BYTES = 64 * 1024

_TLS, _YAMUX, _IDENTIFY = b"\x0b/tls/1.0.0\n", b"\x0d/yamux/1.0.0\n", b"\x0f/ipfs/id/1.0.0\n"
_MULTIHASH_BYTES = 2  # come before the public key in a peer id
_IP4, _TCP = b"\x04", b"\x06"  # multiaddr's codes

_FRAME = struct.Struct(">BBHII")  # yamux: version, kind, flags, stream, and the length or another number
_DATA, _WINDOW = 0, 1
_ACK, _FIN, _RST = 2, 4, 8
_PING = 2


def tellable(address: str) -> Endpoint | None:
    """Where a multiaddr leads, if that is a TCP port of an IPv4 address, and through no relay; else None."""
    found = endpoint_of(address)
    fits = found and (found.kind, found.protocol, found.is_relayed) == ("ip4", "tcp", False)
    return found if fits else None


def tell(listening: Endpoint, outer: Endpoint) -> None:
    """Tell the daemon that listens at one `tellable` place that the internet sees it at another, `outer`.

    Blocks for less than a second if the daemon answers.

    Raises:
        OSError: it does not, says what it should not, or this machine has not the addresses to tell it from.
    """
    identity = Identity.generate()
    public = base58.b58decode(identity.peer)[_MULTIHASH_BYTES:]
    context = context_of(identity, public)
    seen = _IP4 + ipaddress.IPv4Address(outer.host).packed + _TCP + struct.pack(">H", outer.port)
    identified = _field(1, public) + _field(4, seen)
    for place in FROM:
        where = (listening.host, listening.port)
        with socket.create_connection(where, TIMEOUT, source_address=(place, 0)) as connection:
            _agree(connection, _TLS)
            with context.wrap_socket(connection) as secured:
                _agree(secured, _YAMUX)
                _be_identified(secured, identified)


def _be_identified(connection: ssl.SSLSocket, identified: bytes) -> None:
    """Answer the daemon when it asks who this is, and wait until it has heard."""
    heard: dict[int, bytes] = {}
    answer = GREETING + _IDENTIFY + bytes([len(identified)]) + identified
    for _ in range(MAX_FRAMES):
        _, kind, flags, stream, length = _FRAME.unpack(_exactly(connection, _FRAME.size))
        if kind == _PING and not flags & _ACK:
            connection.sendall(_FRAME.pack(0, _PING, _ACK, 0, length))
        if kind == _DATA and stream not in heard:
            heard[stream] = b""
        if kind == _DATA and length:
            if length > MAX_FRAME_BYTES:
                break
            asked = heard[stream] = (heard[stream] + _exactly(connection, length))[-MAX_FRAME_BYTES:]
            if asked == GREETING + _IDENTIFY:
                connection.sendall(_FRAME.pack(0, _DATA, _ACK | _FIN, stream, len(answer)) + answer)
        if flags & (_FIN | _RST) and heard.get(stream) == GREETING + _IDENTIFY:
            return
    raise OSError("the daemon asks for something else")


def _agree(connection: socket.socket, protocol: bytes) -> None:
    """
    Raises:
        OSError: the other end does not speak it.
    """
    connection.sendall(GREETING + protocol)
    if _exactly(connection, len(GREETING + protocol)) != GREETING + protocol:
        raise OSError("the daemon speaks something else")


def _exactly(connection: socket.socket, size: int) -> bytes:
    read = bytearray()
    while len(read) < size:
        piece = connection.recv(size - len(read))
        if not piece:
            raise OSError("the daemon has hung up")
        read += piece
    return bytes(read)


def _field(number: int, content: bytes) -> bytes:
    """A protobuf field of fewer than 128 bytes."""
    return bytes([number << 3 | 2, len(content)]) + content
