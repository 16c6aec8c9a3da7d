"""What this process asks of its libp2p daemon: whom it knows, and ways to other peers.

The only file that knows the daemon's requests and how it words its faults. hivemind's own calls leave the
connection to the daemon open when they fail or are cancelled; these do not. What peers say to each other over
a stream that was opened is not known here.
"""

import asyncio
import logging
import re
from collections.abc import Iterable, Sequence

import swarm.net.slim  # noqa: F401, before hivemind

# isort: split

from hivemind.p2p import P2P, P2PDaemonError
from hivemind.p2p.p2p_daemon_bindings.utils import (
    raise_if_failed,
    read_pbmsg_safe,
    read_unsigned_varint,
    write_pbmsg,
)
from hivemind.proto.p2pd_pb2 import (
    ConnectRequest,
    DHTRequest,
    DisconnectRequest,
    PeerInfo,
    Request,
    Response,
    StreamOpenRequest,
)

from swarm.net.addresses import Address
from swarm.net.multiaddrs import encoded, multiaddr, peer_bytes, texts_of
from swarm.net.relaying import HOP_PROTOCOL, MAX_ANSWER_BYTES, RESERVE, bytes_relayed
from swarm.net.transport import CONNECT_TIMEOUT, OtherPeer, OtherProtocol, PeerId, PeerUnreachable

logger = logging.getLogger(__name__)

DIAL_TIMEOUT = CONNECT_TIMEOUT / 2
"""Seconds for the addresses a caller knows; the rest of `CONNECT_TIMEOUT` is left for routing."""
ROUTING_ATTEMPTS = 20
ROUTING_PERIOD = 0.1
"""How often, and after how many seconds again, to look for a peer while the daemon learns whom to ask."""
FIND_TIMEOUT = 5
"""Seconds that the daemon may look for a peer's addresses, where it does not know them by itself."""

Opened = tuple[str, asyncio.StreamReader, asyncio.StreamWriter]
"""A stream: the protocol that it speaks, and the connection to the daemon that goes on as it."""

_NO_ROUTING_YET = "failed to find any peer in table"
_OTHER_PEER = "peer id mismatch"
_FOUND = re.compile(r"remote key matches (\w{1,128})")


class Control:
    """The calls to the daemon of `p2p`. Each may raise what a dead daemon does: OSError, EOFError."""

    def __init__(self, p2p: P2P):
        self._client = p2p._client

    async def listening_at(self) -> list[str]:
        """The multiaddrs at which the daemon can be reached, as far as it knows."""
        _, known = await self._client.identify()
        return texts_of(known)

    async def connected(self) -> Sequence[PeerInfo]:
        """The peers that the daemon has connections with."""
        response, _, writer = await self._ask(Request(type=Request.LIST_PEERS))
        writer.close()
        return list(response.peers)

    async def addresses_of(self, peer: PeerId) -> list[str]:
        """The multiaddrs at which `peer` listens, as the daemon knows or finds out."""
        asked = DHTRequest(type=DHTRequest.FIND_PEER, peer=peer_bytes(peer), timeout=FIND_TIMEOUT)
        try:
            response, _, writer = await self._ask(Request(type=Request.DHT, dht=asked))
        except P2PDaemonError as error:
            logger.debug("no address of peer %s is known: %s", peer, error)
            return []
        writer.close()
        return texts_of(map(multiaddr, response.dht.peer.addrs))

    async def bytes_relayed_by(self, peer: PeerId) -> int:
        """What `peer` would relay of one connection; 0 if it is no relay.

        Raises:
            P2PDaemonError: there is no stream to it.
        """
        _, reader, writer = await self._ask(_opening(peer, (HOP_PROTOCOL,)))
        try:
            writer.write(RESERVE)
            size = await read_unsigned_varint(reader)
            return bytes_relayed(await reader.readexactly(min(size, MAX_ANSWER_BYTES)))
        finally:
            writer.transport.abort()

    async def connect(self, peer: PeerId, addresses: Iterable[Address]) -> str:
        """Have the daemon connected to `peer`, by one of these addresses if it is not yet.

        Returns what kept it from that, in the daemon's words; empty if it is connected.
        """
        target = ConnectRequest(peer=peer_bytes(peer), addrs=encoded(addresses))
        try:
            _, _, writer = await self._ask(Request(type=Request.CONNECT, connect=target))
        except (P2PDaemonError, OSError, EOFError) as error:
            logger.debug("peer %s cannot be dialled: %s", peer, error)
            return str(error) or "no answer"
        writer.close()
        return ""

    async def disconnect(self, peer: PeerId) -> None:
        """Have the daemon end its connections with `peer`."""
        target = DisconnectRequest(peer=peer_bytes(peer))
        _, _, writer = await self._ask(Request(type=Request.DISCONNECT, disconnect=target))
        writer.close()

    async def open_stream(
        self, peer: PeerId, addresses: Sequence[Address], protocols: Sequence[str]
    ) -> Opened:
        """A stream to `peer`, by these addresses or others, of the first of `protocols` that it speaks.

        Raises:
            P2PDaemonError: there is no way to it.
        """
        fault = ""
        if addresses:
            try:
                async with asyncio.timeout(DIAL_TIMEOUT):
                    fault = await self.connect(peer, addresses)
            except TimeoutError:
                logger.debug("peer %s does not answer at its addresses", peer)
        for _ in range(ROUTING_ATTEMPTS):
            try:
                response, reader, writer = await self._ask(_opening(peer, protocols))
            except P2PDaemonError as error:
                if _OTHER_PEER in fault:
                    raise P2PDaemonError(fault) from error
                if _NO_ROUTING_YET not in str(error):
                    raise
                await asyncio.sleep(ROUTING_PERIOD)
            else:
                return response.streamInfo.proto, reader, writer
        raise P2PDaemonError("this peer knows no other peer")

    async def _ask(self, request: Request) -> tuple[Response, asyncio.StreamReader, asyncio.StreamWriter]:
        """The daemon's answer, and the connection to it, which an opened stream goes on using."""
        reader, writer = await self._client.control.daemon_connector.open_connection()
        response = Response()
        try:
            await write_pbmsg(writer, request)
            await read_pbmsg_safe(reader, response)
            raise_if_failed(response)
        except BaseException:
            writer.close()
            raise
        return response, reader, writer


def unreachable(peer: PeerId, protocol: str, reason: str) -> PeerUnreachable:
    """Why there is no stream of `protocol` to `peer`, for people; `reason` may be in the daemon's words."""
    logger.debug("no stream to peer %s: %s", peer, reason)
    if _OTHER_PEER in reason:
        found = _FOUND.search(reason)
        other = found[1] if found else ""
        return OtherPeer(
            f"At the addresses of peer {peer} another one answers, {other or 'of unknown id'}.",
            "Take the address that the server prints now.",
            other,
        )
    if "protocols not supported" in reason:
        return OtherProtocol(
            f"Peer {peer} does not speak {protocol}.",
            "It may run another version, be in another swarm, or serve nothing.",
        )
    return PeerUnreachable(f"Peer {peer} cannot be reached.", "It may have left, or be behind a firewall.")


def _opening(peer: PeerId, protocols: Sequence[str]) -> Request:
    target = StreamOpenRequest(peer=peer_bytes(peer), proto=protocols)
    return Request(type=Request.STREAM_OPEN, streamOpen=target)
