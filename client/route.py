"""The fastest route: which peers run which blocks for one session.

Turns announcements and their prices into a graph, has the cheapest way through it found, and says what is
missing where there is none. Pure functions over announcements: nothing here knows of streams or tensors.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import msgspec
import numpy as np

from swarm.client.costs import ONE_TOKEN, Costs, Demand
from swarm.client.estimate import estimate
from swarm.client.graph import View, graph_of
from swarm.client.search import Indices, cheapest
from swarm.client.text import printable
from swarm.dht.announcement import Announcement
from swarm.errors import SwarmError
from swarm.net.transport import PeerId
from swarm.spans import Span


@dataclass(frozen=True)
class Hop:
    """One peer running `span`, a part or all of what it announced."""

    peer: PeerId
    span: Span
    announcement: Announcement


@dataclass(frozen=True)
class Route:
    """Ordered hops that cover the model; `seconds` is the estimated time of one token."""

    hops: tuple[Hop, ...]
    seconds: float

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
) -> Route:
    """The fastest route through the blocks of `span` for a session of at most `tokens` tokens.

    Fastest is what takes the least time for the whole of `demand`. Only serving peers with room for the
    session are used, and none of `excluded`, whose values say why ("has no room"). Equal costs are decided
    by the number of hops, then by the order of peer ids. `woken` have been asked to load their blocks, and
    may not have announced yet that they do.

    Raises:
        NoRoute: some blocks have no such peer; says which, who is still loading them, and whom to wake.
    """
    view = announcements if isinstance(announcements, View) else View.of(announcements)
    usable = view.usable(tokens, excluded)
    if view.covers(usable, span):
        return _cheapest(view, usable, span, costs, demand)
    held = [view.servers[index] for index in usable]
    to_wake = _to_wake(view.servers, held, span, costs, excluded, woken)
    raise _no_route(view.servers, missing_spans(held, span), model, tokens, excluded, to_wake)


def missing_spans(servers: Sequence[Announcement], span: Span) -> list[Span]:
    """The parts of `span` that none of `servers` covers."""
    missing, reached = [], span.start
    held = sorted((server.start, server.end) for server in servers)
    for start, end in [*held, (span.end, span.end)]:
        if reached < min(start, span.end):
            missing.append(Span(reached, min(start, span.end)))
        reached = max(reached, end)
    return missing


def _cheapest(view: View, usable: Indices, span: Span, costs: Costs, demand: Demand) -> Route:
    hops = []
    for index, start, end in cheapest(graph_of(view, usable, span, costs, demand)):
        server = view.servers[index]
        hops.append(Hop(server.peer_id, Span(span.start + start, span.start + end), server))
    times = estimate([(hop.announcement, hop.span) for hop in hops], costs, demand)
    return Route(tuple(hops), times.token)


def _to_wake(
    announcements: Sequence[Announcement],
    usable: Sequence[Announcement],
    span: Span,
    costs: Costs,
    excluded: Mapping[PeerId, str],
    woken: Collection[PeerId],
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
    if missing_spans(candidates, span):
        return []
    view = View.of(candidates)
    hops = _cheapest(view, np.arange(len(view.servers)), span, costs, ONE_TOKEN).hops
    return [hop.announcement for hop in hops if hop.announcement.asleep]


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
    message = f"No server serves {blocks} of {model}" + (f": {'; '.join(reasons)}." if reasons else ".")
    if loading or asleep or failed:
        hint = "Wait a little and try again."
    elif full:
        hint = "Ask for fewer tokens, or wait until another session ends."
    else:
        hint = f"Start one: python -m swarm.server --model {model} --blocks {missing[0]}."
    held = {block for server in concerned if server.state == "serving" for block in server.span.blocks}
    is_full = all(held.issuperset(span.blocks) for span in missing)
    return NoRoute(message, hint, missing, loading, to_wake, is_full=is_full)
