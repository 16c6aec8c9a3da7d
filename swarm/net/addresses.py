"""Addresses as people write them and peers announce them: multiaddrs, checked as text.

Light enough for a command to check its options before anything heavy is imported. Whether somebody
answers at an address is not known here.
"""

import ipaddress
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from swarm.errors import InputError
from swarm.net.identity import is_peer_id
from swarm.net.transport import PeerId

MAX_ADDRESSES = 16
"""So many of a peer's announced addresses are tried at most."""

_LOOPBACK = ("/ip4/127.", "/ip6/::1/")
_MAX_CHARACTERS = 300
_HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9])?\.?")
_EXAMPLE = (
    "It looks like /ip4/203.0.113.5/tcp/31337/p2p/12D3KooW…; each server prints its own when it starts."
)
_LISTEN_EXAMPLE = "It looks like /ip4/0.0.0.0/tcp/31337, or ends in /tcp/0 for a free port."


@dataclass(frozen=True)
class Address:
    """Where a peer may be reached: `path` leads to a machine or a relay, `peer` is who must answer there."""

    path: str
    peer: PeerId

    def __str__(self) -> str:
        return f"{self.path}/p2p/{self.peer}"


@dataclass(frozen=True)
class Endpoint:
    """The machine and the port that an address leads to first; `is_relayed` if it goes on from there.

    `kind` is that of `host`: ip4, ip6, dns, dns4 or dns6.
    """

    kind: str
    host: str
    protocol: str
    port: int
    is_relayed: bool = False


def endpoint_of(address: Address | str) -> Endpoint | None:
    """Where an address leads first; None if it is malformed."""
    text = address.path if isinstance(address, Address) else address
    if not _is_path(text):
        return None
    _, kind, host, protocol, port, *more = text.split("/")
    return Endpoint(kind, host, protocol, int(port), "p2p-circuit" in more)


def ip_of(address: str) -> str:
    """The IP address that a multiaddr begins with; empty if it does not, or is malformed."""
    found = endpoint_of(address)
    return found.host if found is not None and found.kind in ("ip4", "ip6") else ""


def network_of(address: str) -> str:
    """The network that a multiaddr's machine, or its relay, lies in: all of it may well be one person's.

    It is named by the first 16 bits of an IPv4 address or 32 of IPv6; empty if `address` begins with neither.
    """
    ip = ip_of(address)
    if not ip:
        return ""
    return str(ipaddress.ip_network((ip, 16 if "." in ip else 32), strict=False))


def parse_address(text: str) -> Address:
    """The address of a peer, ending in `/p2p/PEER`.

    Raises:
        InputError: it is malformed, or does not end in a peer id.
    """
    path, _, peer = text.strip().rpartition("/p2p/")
    if not (is_peer_id(peer) and _is_path(path)):
        raise InputError(f"'{text}' is not the address of a peer.", _EXAMPLE)
    return Address(path, PeerId(peer))


def parse_listen_address(text: str) -> str:
    """An address of this machine to listen on: `/ip4/…/tcp/…` and the like, without a peer.

    Raises:
        InputError: it is malformed.
    """
    if "/p2p" in text or not _is_path(text):
        raise InputError(f"'{text}' is not an address to listen on.", _LISTEN_EXAMPLE)
    return text


def is_loopback(address: str) -> bool:
    """Whether an address leads to this machine alone, whoever dials it."""
    return address.startswith(_LOOPBACK)


def outward(addresses: Iterable[str]) -> list[str]:
    """Those of `addresses` that lead there from other machines too, if any do; else all."""
    given = list(addresses)
    return [address for address in given if not is_loopback(address)] or given


def usable_addresses(peer: PeerId, announced: Iterable[str]) -> list[Address]:
    """The well-formed ones of the addresses that `peer` announced for itself, `MAX_ADDRESSES` at most."""
    usable: list[Address] = []
    for text in announced:
        path, _, owner = text[: _MAX_CHARACTERS + 1].rpartition("/p2p/")
        if owner == peer and _is_path(path) and len(usable) < MAX_ADDRESSES:
            usable.append(Address(path, peer))
    return usable


def _is_ip(version: int) -> Callable[[str], bool]:
    parse = ipaddress.IPv4Address if version == 4 else ipaddress.IPv6Address

    def check(text: str) -> bool:
        try:
            return "%" not in text and bool(parse(text))
        except ValueError:
            return False

    return check


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 5 and int(text) < 65536


def _is_host_name(text: str) -> bool:
    return _HOST_NAME.fullmatch(text) is not None


_WITH_VALUE: dict[str, Callable[[str], bool]] = {
    "ip4": _is_ip(4),
    "ip6": _is_ip(6),
    "dns": _is_host_name,
    "dns4": _is_host_name,
    "dns6": _is_host_name,
    "tcp": _is_port,
    "udp": _is_port,
    "p2p": is_peer_id,
}
_WITHOUT_VALUE = ("quic-v1", "ws", "wss", "p2p-circuit")
_MACHINES = ("ip4", "ip6", "dns", "dns4", "dns6")


def _is_path(text: str) -> bool:
    """Whether `text` names a machine, a port, and nothing unknown after them."""
    if len(text) > _MAX_CHARACTERS or not text.startswith("/"):
        return False
    parts = iter(text[1:].split("/"))
    names = []
    for name in parts:
        if name in _WITH_VALUE:
            if not _WITH_VALUE[name](next(parts, "")):
                return False
        elif name not in _WITHOUT_VALUE:
            return False
        names.append(name)
    return len(names) >= 2 and names[0] in _MACHINES and names[1] in ("tcp", "udp")
