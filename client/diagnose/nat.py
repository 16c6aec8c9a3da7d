"""Behind which kind of NAT this machine is, by how peers elsewhere see it. A pure decision.

All connections leave from the port that this peer listens on, so that what differs was made different on
the way. Source of the kinds: RFC 4787, section 4.1: a mapping that is endpoint-independent is called a cone.
"""

import ipaddress
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

Nat: TypeAlias = Literal["none", "local", "cone", "symmetric", "unsure", "unknown"]
"""No translation; none on the way to peers nearby, who are all there are; to the same outer port for all;
to another port for each; some translation that a single peer cannot tell more of; nobody said anything."""


@dataclass(frozen=True)
class View:
    """How a peer on machine `observer` sees this one. All are IP addresses."""

    observer: str
    ip: str
    port: int


def nat_of(views: Collection[View], local: Collection[str]) -> Nat:
    """The kind of translation between this machine, with the addresses `local`, and the observers."""
    outer = [view for view in views if view.ip not in local]
    if not outer:
        if not views:
            return "unknown"
        return "none" if any(_is_global(view.ip) for view in views) else "local"
    kinds = [_kind(views) for views in _comparable(outer)]
    return next(kind for kind in ("symmetric", "cone", "unsure") if kind in kinds)


def _comparable(views: Iterable[View]) -> Iterable[list[View]]:
    """Views that crossed the same border, as far as one can know."""
    groups: dict[tuple[int, bool], list[View]] = defaultdict(list)
    for view in views:
        groups[ipaddress.ip_address(view.ip).version, _is_global(view.ip)].append(view)
    return groups.values()


def _kind(views: Collection[View]) -> Nat:
    if len({(view.ip, view.port) for view in views}) > 1:
        return "symmetric"
    return "cone" if len({view.observer for view in views}) > 1 else "unsure"


def _is_global(ip: str) -> bool:
    return ipaddress.ip_address(ip).is_global
