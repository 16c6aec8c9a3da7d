"""Which of the addresses that strangers name a server dials, so that it is no way into its own network.

A peer's addresses stand in its records, and clients name them: anybody can write anything there. A server
that the internet reaches is told of peers on the internet, and has no reason to dial the machines beside it.
Where a server has private addresses only, so may its peers.
"""

import asyncio
import ipaddress
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from swarm.net.addresses import Address, endpoint_of, ip_of
from swarm.net.dialling import FAMILIES, resolve

RESOLVE_TIMEOUT = 2.0


async def permitted(addresses: Sequence[Address], own: Collection[str]) -> list[Address]:
    """Those of `addresses` that a server at `own` may dial; where they have names, what these lead to."""
    looked_up = await asyncio.gather(*map(_looked_up, addresses))
    return worth_dialling((one for some in looked_up for one in some), own)


async def _looked_up(address: Address) -> list[Address]:
    found = endpoint_of(address)
    if found is None or found.kind not in FAMILIES:
        return [address]
    return resolved(address, await resolve(found.host, FAMILIES[found.kind], RESOLVE_TIMEOUT))


def is_public(own: Iterable[str]) -> bool:
    """Whether one of a peer's own addresses is the internet's."""
    return any(ipaddress.ip_address(ip).is_global for ip in map(ip_of, own) if ip)


def worth_dialling(addresses: Iterable[Address], own: Collection[str]) -> list[Address]:
    """Those of `addresses` that a server at `own` may dial though a stranger named them.

    Names are none of them: who looks one up finds any address behind it. `resolved` says what they led to.
    """
    is_wary = is_public(own)
    links = any(ipaddress.ip_address(ip).is_link_local for ip in map(ip_of, own) if ip)
    return [one for one in addresses if _may_be_dialled(ip_of(one.path), is_wary=is_wary, links=links)]


def resolved(address: Address, ips: Iterable[str]) -> list[Address]:
    """The addresses that begin with these IP addresses where `address` begins with a name."""
    found = endpoint_of(address)
    if found is None:
        return []
    head = f"/{found.kind}/{found.host}"
    return [
        replace(address, path=f"/{'ip6' if ':' in ip else 'ip4'}/{ip}{address.path.removeprefix(head)}")
        for ip in ips
    ]


def _may_be_dialled(text: str, *, is_wary: bool, links: bool) -> bool:
    if not text:
        return False
    ip = ipaddress.ip_address(text)
    inner = getattr(ip, "ipv4_mapped", None) or ip
    if inner.is_multicast or inner.is_unspecified or (inner.is_reserved and inner.version == 4):
        return False
    if inner.is_link_local and not links:
        return False
    return inner.is_global or not is_wary
