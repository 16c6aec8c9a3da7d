"""Findings about this machine: how others see it, its clock, its version. Pure functions of what was seen."""

import ipaddress
from collections.abc import Collection, Iterator, Sequence
from statistics import median

from swarm.client.diagnose.finding import Finding, Level
from swarm.client.diagnose.nat import Nat, View, nat_of
from swarm.client.diagnose.seen import PeerSeen, Seen, Told
from swarm.dht.records import CLOCK_SKEW
from swarm.net.addresses import endpoint_of, ip_of
from swarm.net.relaying import is_relayed
from swarm.version import VERSION

NOTABLE_SKEW = 1.0
"""Seconds by which a clock may be off before it is worth a word; at `CLOCK_SKEW` records are refused."""

SET_CLOCK = "Have the clock set from the network: timedatectl set-ntp true."
FOR_A_SERVER = "Only servers need to be reached"


def about_network(seen: Seen) -> Iterator[Finding]:
    if seen.network_error is not None:
        yield Finding("network", "problem", seen.network_error.message, seen.network_error.hint)
    outward = sorted(ip for ip in seen.local if _leads_outward(ip))
    facts = {"addresses": outward}
    if outward:
        yield Finding("network", "ok", f"This machine has the addresses {', '.join(outward)}.", facts=facts)
    else:
        yield Finding(
            "network",
            "warning",
            "This machine has no address but its own loopback, so that it reaches nobody elsewhere.",
            "Connect it to a network.",
            facts,
        )


def about_nat(seen: Seen) -> Iterator[Finding]:
    views = views_of(seen.answering)
    kind = nat_of(views, seen.local)
    outer = sorted({view.ip for view in views if view.ip not in seen.local})
    where = f" as {' and '.join(outer)}" if outer else ""
    forward = (
        f"{FOR_A_SERVER}: for one, forward its TCP port on the router, and tell others the outer address with"
        " --public-ip."
    )
    sentences: dict[Nat, tuple[Level, str, str]] = {
        "none": ("ok", "No router translates this machine's addresses on the way to others.", ""),
        "local": (
            "ok",
            "All peers that were asked are near enough to see this machine's own addresses.",
            "",
        ),
        "cone": (
            "ok",
            f"A router translates this machine's addresses: all peers see it alike{where} (a cone NAT).",
            forward,
        ),
        "symmetric": (
            "warning",
            f"A router shows this machine differently to each peer{where} (a symmetric NAT).",
            forward,
        ),
        "unsure": (
            "ok",
            f"A router translates this machine's addresses: others see it{where}. One peer alone cannot tell"
            " of which kind the NAT is.",
            forward,
        ),
        "unknown": (
            "warning",
            "No peer said how it sees this machine, so that a NAT before it cannot be told.",
            "Bring the servers to the same version of swarm as runs here.",
        ),
    }
    level, cause, advice = sentences[kind]
    if kind == "unknown" and is_relayed([peer.told.address for peer in seen.answering if peer.told]):
        level, cause = (
            "ok",
            "All peers were reached through relays, which do not show a NAT before this machine.",
        )
        advice = "Join by the address of a peer that is reached straight, to be told of it."
    seen_as = [{"observer": view.observer, "ip": view.ip, "port": view.port} for view in views]
    yield Finding("nat", level, cause, advice, {"kind": kind, "seen_as": seen_as})


def views_of(peers: Sequence[PeerSeen]) -> list[View]:
    """How those see this machine who told it."""
    views = []
    for peer in peers:
        found = endpoint_of(peer.told.address) if peer.told else None
        observer = ip_of(peer.remote)
        if found is not None and not found.is_relayed and found.kind in ("ip4", "ip6") and observer:
            views.append(View(observer, found.host, found.port))
    return views


def about_reachability(seen: Seen) -> Iterator[Finding]:
    answers = seen.dialled_back or []
    reached = [one for one in answers if one.is_reached]
    tried = [one for one in answers if not one.refusal]
    port = f"TCP port {seen.port}"
    facts = {"port": seen.port, "asked": len(answers), "reached": len(reached)}
    if reached:
        addresses = " and ".join(sorted({one.address for one in reached}))
        whose = "All peers" if len(reached) == len(answers) else f"{len(reached)} of {len(answers)} peers"
        near = _nearness([one.address for one in reached])
        yield Finding(
            "reachable", "ok", f"{whose} that were asked could connect to {addresses}{near}.", facts=facts
        )
    elif tried:
        level: Level = "problem" if seen.is_port_asked and not seen.relays else "warning"
        relay = (
            "Else it is reached through a relay, which is slower."
            if seen.relays
            else "Else nobody reaches it: no peer that was asked is a relay (--relay)."
        )
        addresses = " and ".join(sorted({one.address for one in tried}))
        yield Finding(
            "reachable",
            level,
            f"No peer that was asked could connect to {addresses}.",
            f"{FOR_A_SERVER}: for one, let {port} in through this machine's firewall, and forward it on the"
            f" router if there is one, whose address is then its --public-ip. {relay}",
            {**facts, "relays": seen.relays},
        )
    else:
        why = answers[0].refusal if answers else "Nobody was asked."
        yield Finding(
            "reachable",
            "warning",
            f"Whether others can connect to this machine is not known: {why}",
            "Try again in a minute.",
            facts,
        )


def about_clock(peers: Sequence[PeerSeen]) -> Iterator[Finding]:
    told = {peer.name: peer.told for peer in peers if peer.told is not None}
    if not told:
        yield Finding(
            "clock", "warning", "No peer told the time.", "Bring the servers to the version that runs here."
        )
        return
    off = -median(one.ahead for one in told.values())
    doubt = min(one.uncertainty for one in told.values())
    facts = {"ahead_s": round(off, 3), "uncertainty_s": round(doubt, 3), "peers": len(told)}
    by = f"by what {len(told)} {'peer says' if len(told) == 1 else 'peers say'}"
    if abs(off) - doubt <= NOTABLE_SKEW:
        yield Finding(
            "clock",
            "ok",
            f"This machine's clock is right to within {_seconds(abs(off) + doubt)}, {by}.",
            facts=facts,
        )
    else:
        is_bad = abs(off) - doubt > CLOCK_SKEW
        yield Finding(
            "clock",
            "problem" if is_bad else "warning",
            f"This machine's clock is {_seconds(abs(off))} {_direction(off)}, {by}; at more"
            f" than {_seconds(CLOCK_SKEW)} its records are refused.",
            SET_CLOCK,
            facts,
        )
    if len(told) > 2:
        yield from _clocks_that_differ(told, -off)


def _clocks_that_differ(told: dict[str, Told], usual: float) -> Iterator[Finding]:
    """Peers whose clocks are wrong by what most say."""
    for name, one in told.items():
        off = one.ahead - usual
        if abs(off) - one.uncertainty > CLOCK_SKEW:
            yield Finding(
                "clock",
                "warning",
                f"By the others' clocks, that of {name} is {_seconds(abs(off))} {_direction(off)}.",
                f"Tell who runs it. {SET_CLOCK}",
                {"ahead_s": round(off, 3)},
            )


def about_versions(peers: Sequence[PeerSeen]) -> Iterator[Finding]:
    """Whoever answered speaks the same protocol; software of another minor version may lack something."""
    versions = {peer.name: peer.told.version for peer in peers if peer.told is not None}
    others = {name: version for name, version in versions.items() if _series(version) != _series(VERSION)}
    silent = [peer.name for peer in peers if peer.told is None]
    for name, version in others.items():
        yield Finding(
            "version",
            "warning",
            f"{name} runs version {version or 'unknown'} of swarm, and this machine {VERSION}.",
            "Bring both to the same version.",
            {"version": version},
        )
    for name in silent:
        yield Finding(
            "version",
            "warning",
            f"{name} does not tell its version of swarm, as versions before {VERSION} do not.",
            f"Bring it to {VERSION}, which runs here.",
        )
    if versions and not others and not silent:
        yield Finding(
            "version",
            "ok",
            f"All peers that were reached run version {VERSION} of swarm or one like it.",
            facts={"version": VERSION},
        )


def _series(version: str) -> tuple[str, ...]:
    """The part of a version that tells what works together: major and minor."""
    return tuple(version.split(".")[:2])


def _nearness(addresses: Collection[str]) -> str:
    ips = [ipaddress.ip_address(ip) for ip in map(ip_of, addresses) if ip]
    if ips and all(ip.is_loopback for ip in ips):
        return ", from this machine itself; from elsewhere that may differ"
    if ips and not any(ip.is_global for ip in ips):
        return ", from the same network; from elsewhere that may differ"
    return ""


def _leads_outward(ip: str) -> bool:
    address = ipaddress.ip_address(ip)
    return not (address.is_loopback or address.is_link_local)


def _direction(off: float) -> str:
    return "ahead" if off > 0 else "behind"


def _seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.1f} seconds" if seconds < 10 else f"{seconds:,.0f} seconds"
