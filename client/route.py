"""The fastest route: which peers run which blocks for one session.

Turns announcements and their prices into a graph, has the cheapest way through it found, and says what is
missing where there is none. Pure functions over announcements: nothing here knows of streams or tensors.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias

import msgspec
import numpy as np

from swarm.client.costs import ONE_TOKEN, Costs, Demand
from swarm.client.estimate import estimate
from swarm.client.graph import View, graph_of
from swarm.client.privacy import NO_LIMITS, Limits
from swarm.client.search import Indices, Visit, cheapest
from swarm.client.shares import cheapest_within, unplaced
from swarm.client.text import printable
from swarm.dht.announcement import Announcement
from swarm.errors import SwarmError
from swarm.net.transport import PeerId
from swarm.spans import Span

Lack: TypeAlias = Literal["server", "trusted server", "share"]
"""What some blocks lack: anybody, anybody trusted, or anybody who may run that many."""

LACKS: dict[Lack, str] = {
    "server": "No server serves {blocks} of {model}",
    "trusted server": "No trusted server serves {blocks} of {model}, which others may not run",
    "share": "Nobody is left for {blocks} of {model}, since no peer may run so large a share of it",
}
TAKEN = "No server can take {blocks} of {model} now"
"""What is said instead where servers serve them all."""

HINTS: dict[Lack, str] = {
    "server": "Start one: {start}.",
    "trusted server": "Trust more peers, or start a server of your own: {start}.",
    "share": "Allow a larger share, or start another server: {start}.",
}


@dataclass(frozen=True)
class Hop:
    """One peer running `span`, a part or all of what it announced."""

    peer: PeerId
    span: Span
    announcement: Announcement


@dataclass(frozen=True)
class Route:
    """Ordered hops that cover the model; `seconds` is the estimated time of one token.

    `toll` are the seconds that others are taken to wait for each of its tokens.
    """

    hops: tuple[Hop, ...]
    seconds: float
    toll: float = 0.0

    @property
    def cost(self) -> float:
        """What a token takes everybody."""
        return self.seconds + self.toll

    @property
    def visits(self) -> list[tuple[Announcement, Span]]:
        """Who runs which blocks."""
        return [(hop.announcement, hop.span) for hop in self.hops]

    def __str__(self) -> str:
        return " → ".join(f"{label(hop.announcement)} [{hop.span}]" for hop in self.hops)


class NoRoute(SwarmError):
    """Some blocks have no server that can take the session now.

    There will be servers for all of them once those that are `loading` have done so, and those in `to_wake`,
    if there are any, were asked to. `is_full` says that servers hold them all, but take no more now.
    """

    def __init__(
        self,
        message: str,
        hint: str,
        missing: Sequence[Span] = (),
        loading: Sequence[Announcement] = (),
        to_wake: Sequence[Announcement] = (),
        *,
        is_full: bool = False,
    ):
        super().__init__(message, hint)
        self.is_full = is_full
        self.missing = tuple(missing)
        self.loading = tuple(loading)
        self.to_wake = tuple(to_wake)


def find_route(
    announcements: Sequence[Announcement] | View,
    span: Span,
    *,
    costs: Costs,
    demand: Demand = ONE_TOKEN,
    model: str = "the model",
    tokens: int = 0,
    excluded: Mapping[PeerId, str] = MappingProxyType({}),
    woken: Collection[PeerId] = (),
    limits: Limits = NO_LIMITS,
) -> Route:
    """The fastest route through the blocks of `span` for a session of at most `tokens` tokens.

    Fastest is what takes the least time for the whole of `demand`, and it counts as well how long others wait
    for it: a route that takes its session a little longer may let many go faster. Only serving peers with
    room for the session are used, and none of `excluded`, whose values say why ("has no room"). Equal costs
    are decided by the number of hops, then by the order of peer ids. `woken` have been asked to load their
    blocks, and may not have announced yet that they do. Nobody runs more than `limits` allow.

    Raises:
        NoRoute: some blocks have no such peer; says which, who is still loading them, and whom to wake.
    """
    view = (announcements if isinstance(announcements, View) else View.of(announcements)).within(limits)
    usable = view.usable(tokens, excluded)
    if view.covers(usable, span):
        route = _cheapest(view, usable, span, costs, demand, limits)
        if route is not None:
            return route
    held = [view.servers[index] for index in usable]
    to_wake = _to_wake(view.servers, held, span, costs, excluded, woken, limits)
    if missing := missing_spans(held, span):
        raise _no_route(view.servers, missing, model, tokens, excluded, to_wake)
    allowed = limits.within(view.servers)
    if missing := missing_spans(limits.within(held), span):
        raise _no_route(allowed, missing, model, tokens, excluded, to_wake, lack="trusted server")
    missing = _unplaced(view, usable, span, costs, limits)
    raise _no_route(allowed, missing, model, tokens, excluded, to_wake, lack="share")


def missing_spans(servers: Sequence[Announcement | Span], span: Span) -> list[Span]:
    """The parts of `span` that none of `servers` covers."""
    missing, reached = [], span.start
    held = sorted((server.start, server.end) for server in servers)
    for start, end in [*held, (span.end, span.end)]:
        if reached < min(start, span.end):
            missing.append(Span(reached, min(start, span.end)))
        reached = max(reached, end)
    return missing


def _cheapest(
    view: View, usable: Indices, span: Span, costs: Costs, demand: Demand, limits: Limits
) -> Route | None:
    """The fastest route through servers that hold all blocks; None where `limits` allow none."""
    graph = graph_of(view, usable, span, costs, demand)
    visits: list[Visit] | None = cheapest(graph)
    if limits.most is not None:
        visits = cheapest_within(graph, view.quota(limits))
    if visits is None:
        return None
    hops = []
    for index, start, end in visits:
        server = view.servers[index]
        hops.append(Hop(server.peer_id, Span(span.start + start, span.start + end), server))
    times = estimate([(hop.announcement, hop.span) for hop in hops], costs, demand)
    return Route(tuple(hops), times.token, times.toll)


def _unplaced(view: View, usable: Indices, span: Span, costs: Costs, limits: Limits) -> list[Span]:
    """Parts of `span` for which nobody is left, since those that hold them may run no more blocks."""
    graph = graph_of(view, usable, span, costs, ONE_TOKEN)
    left = [span.start + block for block in unplaced(graph, view.quota(limits))]
    held = sorted(set(span.blocks) - set(left))
    return missing_spans([Span(block, block + 1) for block in held], span)


def _to_wake(
    announcements: Sequence[Announcement],
    usable: Sequence[Announcement],
    span: Span,
    costs: Costs,
    excluded: Mapping[PeerId, str],
    woken: Collection[PeerId],
    limits: Limits,
) -> list[Announcement]:
    """Who sleeps on the fastest way through all that serve, load or sleep; nobody where there is no way."""
    joining = [server for server in announcements if server.state == "joining"]
    coming = [
        *(server for server in joining if server.peer_id not in excluded),
        *(
            msgspec.structs.replace(server, state="joining", asleep=False)
            for server in announcements
            if server.peer_id in woken
        ),
    ]
    candidates = [*usable, *coming]
    if missing_spans(limits.within(candidates), span):
        return []
    view = View.of(candidates).within(limits)
    route = _cheapest(view, np.arange(len(view.servers)), span, costs, ONE_TOKEN, limits)
    return [hop.announcement for hop in route.hops if hop.announcement.asleep] if route else []


def label(server: Announcement) -> str:
    """How people see a peer: its public name if it has one, and the end of its id."""
    short = f"…{server.peer[-6:]}"
    return f"{printable(server.name)} ({short})" if server.name else short


def blocks_text(span: Span) -> str:
    return f"block {span.start}" if span.size == 1 else f"blocks {span.start} to {span.end - 1}"


def _no_route(
    announcements: Sequence[Announcement],
    missing: Sequence[Span],
    model: str,
    tokens: int,
    excluded: Mapping[PeerId, str],
    to_wake: Sequence[Announcement],
    lack: Lack = "server",
) -> NoRoute:
    concerned = [
        server
        for server in sorted(announcements, key=lambda server: (server.start, server.peer))
        if any(server.start < span.end and span.start < server.end for span in missing)
    ]
    loading = [server for server in concerned if server.state == "joining" and not server.asleep]
    asleep = [server for server in concerned if server.asleep and server.peer_id not in excluded]
    full = [server for server in concerned if server.state == "serving" and server.kv_tokens_left < tokens]
    failed = [server for server in concerned if server.peer_id in excluded and server not in loading]
    blocks = ", ".join(blocks_text(span) for span in missing)
    reasons = [
        *(f"{label(s)} is loading {blocks_text(s.span)}, {s.progress:.0%} done" for s in loading),
        *(f"{label(s)} is asleep" for s in asleep),
        *(f"{label(s)} has room for {s.kv_tokens_left} tokens where {tokens} are needed" for s in full),
        *(f"{label(s)} {excluded[s.peer_id]}" for s in failed if s not in full),
    ]
    held = {block for server in concerned if server.state == "serving" for block in server.span.blocks}
    is_full = lack != "share" and all(held.issuperset(span.blocks) for span in missing)
    said = TAKEN if is_full and lack == "server" else LACKS[lack]
    message = said.format(blocks=blocks, model=model)
    message += f": {'; '.join(reasons)}." if reasons else "."
    if loading or asleep or failed:
        hint = "Wait a little and try again."
    elif full:
        hint = "Ask for fewer tokens, or wait until another session ends."
    else:
        start = f"python -m swarm.server --model {model} --blocks {missing[0]}"
        hint = HINTS[lack].format(start=start)
    return NoRoute(message, hint, missing, loading, to_wake, is_full=is_full)
