"""Who is asked for a second opinion: another peer, of another operator if possible, that computes as exactly.

Pure functions over announcements. Must not know how it is asked, nor why.
"""

import random
from collections.abc import Collection, Iterable, Sequence

from swarm.client.verdict import exactness
from swarm.dht.announcement import Announcement


def choose_witness(
    candidates: Sequence[Announcement], known: Iterable[Announcement], rng: random.Random
) -> Announcement | None:
    """One of `candidates`, by lot among the best; None if there are none.

    Those in a network of somebody `known` may be run by the same people: they are asked last.
    """
    near = {network for server in known for network in networks(server.addresses)}

    def rank(server: Announcement) -> tuple[bool, float]:
        is_near = not near.isdisjoint(networks(server.addresses))
        return is_near, exactness((server.dtype, server.quantization)).mean

    best = min(map(rank, candidates), default=None)
    among = sorted((one for one in candidates if rank(one) == best), key=lambda one: one.peer)
    return rng.choice(among) if among else None


def networks(addresses: Collection[str]) -> set[str]:
    """The networks of multiaddrs: of an IPv4 address its /24, of an IPv6 address its /48, and names."""
    found = set()
    for address in addresses:
        _, kind, host, *_ = [*address.split("/"), "", ""]
        if kind == "ip4":
            found.add(host.rpartition(".")[0])
        elif kind == "ip6":
            found.add(":".join(host.split(":")[:3]))
        elif kind.startswith("dns"):
            found.add(host)
    return found
