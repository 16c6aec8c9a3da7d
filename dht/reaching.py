"""Whether others reach a server that starts, and through which relays if they do not.

Decides how a peer deals with relays; says, in one line of the log, why nobody reaches it and what to do.
"""

import logging
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from swarm.dht.store import RecordStore
from swarm.net.addresses import endpoint_of, ip_of, is_loopback, outward, parse_address
from swarm.net.messages import DialledBack
from swarm.net.reachability import dialled_back, listening_port
from swarm.net.relaying import ENOUGH_BYTES, Relaying
from swarm.net.transport import PeerId, Transport
from swarm.net.wary import is_public

logger = logging.getLogger(__name__)

MAX_RELAYS = 4
CANDIDATES = 8


@dataclass(frozen=True)
class Listening:
    """Where a peer that serves others listens, and what it tells them instead.

    It `relays` for others, or has nothing to do with relays. None is as it fits: it relays if it has an
    address of the internet, and is reached through relays if it is not reached otherwise. Streams turn to
    shortcuts at TCP port `shortcut_port`, 0 being a free one; with None they turn to none anywhere.
    """

    host_maddrs: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0",)
    announce_maddrs: tuple[str, ...] = ()
    relays: bool | None = None
    shortcut_port: int | None = 0

    @property
    def is_local(self) -> bool:
        """Whether only this machine's own peers are to reach it."""
        return all(is_loopback(address) for address in self.host_maddrs)


def relaying_of(addresses: Sequence[str], listening: Listening | None, own_ips: Sequence[str]) -> Relaying:
    """What a peer has to do with relays that joins by `addresses`, on a machine that has `own_ips`."""
    if listening is None:
        return Relaying(uses=not all(map(is_loopback, addresses)))
    if listening.relays is not None:
        return Relaying(uses=listening.relays, serves=listening.relays)
    if listening.is_local:
        return Relaying()
    hosts = [*listening.announce_maddrs, *listening.host_maddrs]
    if not listening.announce_maddrs and any(ip_of(host) in ("0.0.0.0", "::") for host in hosts):
        hosts += [f"/{'ip6' if ':' in ip else 'ip4'}/{ip}/tcp/1" for ip in own_ips]
    return Relaying(uses=True, serves=is_public(hosts))


def listening_of_client(relaying: Relaying) -> Listening:
    """Where a client listens: nowhere, unless it goes through relays.

    Servers behind routers may come straight to it then. They are told no address that leads to it, which
    they would try in vain first, so that their routers come to refuse what the client sends.
    """
    if not relaying.uses:
        return Listening(())
    with socket.socket() as some:
        some.bind(("", 0))
        port = some.getsockname()[1]
    return Listening((f"/ip4/0.0.0.0/tcp/{port}",), (f"/ip4/127.0.0.1/tcp/{port}",))


async def look_back(transport: Transport, addresses: Sequence[str]) -> DialledBack | None:
    """What the peers at `addresses` say of connecting to this one; None if it is not asked, or not told."""
    own = await transport.addresses()
    port = listening_port(own)
    if port is None or all(map(is_loopback, own)):
        return None
    witnesses = dict.fromkeys(parse_address(address).peer for address in addresses)
    return await dialled_back(transport, [one for one in witnesses if one != transport.peer], port)


def outer_address(said: DialledBack, own: Sequence[str], port: int) -> str | None:
    """The address of the internet at which a witness reached this peer, if this peer knows none of its own.

    A router or a cloud translates it then, and forwards the port.
    """
    found = endpoint_of(said.address)
    if found is None or found.port != port or found.protocol != "tcp" or found.is_relayed:
        return None
    is_new = said.is_reached and is_public([said.address]) and not is_public(own)
    return f"/{found.kind}/{found.host}/tcp/{port}" if is_new else None


async def relays_among(transport: Transport, store: RecordStore, addresses: Sequence[str]) -> list[str]:
    """Addresses of relays for this peer: of those it joined by, and of others that it knows."""
    known = (*outward(addresses), *await store.neighbours(CANDIDATES))
    by_peer: dict[PeerId, list[str]] = {}
    for address in known:
        if "p2p-circuit" not in address:
            by_peer.setdefault(parse_address(address).peer, []).append(address)
    found: list[str] = []
    for peer, some in by_peer.items():
        if len(found) < MAX_RELAYS and await transport.bytes_relayed_by(peer) >= ENOUGH_BYTES:
            found.append(min(some, key=lambda address: not is_public([address])))
    return found


def say_hidden(listening: Listening, port: int | None, relays: Sequence[str]) -> None:
    """Tell the operator that nobody reaches this server by itself, and what to do, once."""
    cause = f"Other peers cannot connect to TCP port {port} of this machine"
    forward = "let it in through the firewall, forward it on the router, and give --port N --public-ip IP"
    relay = "or have a server that others reach run with --relay"
    if listening.announce_maddrs:
        remedy = f"check that {' and '.join(listening.announce_maddrs)} leads to it"
    elif relays:
        remedy = f"they reach it through a relay, which is slower. For a straight way, {forward}"
    elif listening.relays is not None:
        remedy = f"nobody elsewhere can use it; {forward}"
    else:
        remedy = f"nobody elsewhere can use it, and no peer that it knows is a relay; {forward}; {relay}"
    logger.warning("%s: %s.", cause, remedy)
