"""The graph of a route: what the servers of a span cost a session, as the search takes it.

Turns announcements and prices into arrays. Must not know how the cheapest way is found.
"""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import chain, repeat

import numpy as np

from swarm.client.costs import HOP_SECONDS, TOKEN_ID_BYTES, Costs, Demand, Prices, Rates, prices, rates
from swarm.client.privacy import Limits
from swarm.client.search import Floats, Graph, Indices, Links
from swarm.client.shares import Quota
from swarm.dht.announcement import Announcement
from swarm.net.transport import PeerId
from swarm.spans import Span

NOBODY = -1

NO_ROOM = -1


@dataclass(frozen=True)
class View:
    """Announcements of one model, by peer and span, and the distances that they announce as arrays.

    Making one takes as long as finding a route in it, so it is kept as long as the announcements stay.
    `of_peer` has the servers of each peer: who holds two spans is two of them. `spans` is [servers, 2],
    `room` the tokens of KV left, none at a server that does not serve. Distances are round trips in seconds
    to the servers `targets`, both [servers, most neighbours], with infinity where a server has fewer.
    """

    servers: tuple[Announcement, ...]
    peers: tuple[PeerId, ...]
    of_peer: dict[str, list[int]]
    rates: Rates
    spans: Indices
    room: Indices
    targets: Indices
    rtts: Floats

    @classmethod
    def of(cls, announcements: Sequence[Announcement]) -> "View":
        servers = sorted(announcements, key=lambda server: (server.peer, server.start, server.end))
        of_peer: defaultdict[str, list[int]] = defaultdict(list)
        for index, server in enumerate(servers):
            of_peer[server.peer].append(index)
        sources, targets, rtts = _announced(servers, {peer: held[0] for peer, held in of_peer.items()})
        if len(of_peer) < len(servers):
            sources, targets, rtts = _to_each(sources, targets, rtts, [of_peer[one.peer] for one in servers])
        targets, rtts = _padded(len(servers), sources, targets, rtts)
        spans = np.array([(one.start, one.end) for one in servers], dtype=np.int64).reshape(-1, 2)
        room = [one.kv_tokens_left if one.state == "serving" else NO_ROOM for one in servers]
        return cls(
            servers=tuple(servers),
            peers=tuple(one.peer_id for one in servers),
            of_peer=dict(of_peer),
            rates=rates(servers),
            spans=spans,
            room=np.array(room, dtype=np.int64),
            targets=targets,
            rtts=rtts,
        )

    def within(self, limits: Limits) -> "View":
        """The same servers with what of their spans they may run."""
        if limits.trusted is None:
            return self
        others = np.array([peer not in limits.trusted for peer in self.peers], dtype=np.bool_)
        spans = np.where(others[:, None], np.clip(self.spans, *limits.inner), self.spans)
        return replace(self, spans=spans)

    def quota(self, limits: Limits) -> Quota:
        """How many blocks each server's peer may run."""
        left = {peer: limits.left(PeerId(peer)) for peer in self.of_peer}
        return Quota(
            owner=np.array([self.of_peer[peer][0] for peer in self.peers], dtype=np.int64),
            most=np.array([left[peer] for peer in self.peers], dtype=np.int64),
        )

    def usable(self, tokens: int, excluded: Collection[PeerId]) -> Indices:
        """The serving servers with room for `tokens` whose peers are not `excluded`."""
        usable = self.room >= tokens
        for peer in excluded:
            usable[self.of_peer.get(peer, [])] = False
        return np.flatnonzero(usable)

    def covers(self, usable: Indices, span: Span) -> bool:
        """Whether those servers together hold all blocks of `span`."""
        start, end = np.clip(self.spans[usable] - span.start, 0, span.size).T
        change = np.bincount(start, minlength=span.size + 1) - np.bincount(end, minlength=span.size + 1)
        return bool(change.cumsum()[: span.size].all())


def _announced(servers: Sequence[Announcement], first: dict[str, int]) -> tuple[Indices, Indices, Floats]:
    """The distances between servers, ordered by source; to the `first` one of each peer that is there."""
    degrees = [len(server.rtts) for server in servers]
    sources = np.repeat(np.arange(len(servers)), degrees)
    others = chain.from_iterable(server.rtts for server in servers)
    targets = np.fromiter(map(first.get, others, repeat(NOBODY)), np.int64, len(sources))
    rtts = np.fromiter(
        chain.from_iterable(server.rtts.values() for server in servers), np.float64, len(sources)
    )
    own = np.array([first[server.peer] for server in servers], dtype=np.int64)
    usable = np.flatnonzero((targets != NOBODY) & (targets != own[sources]))
    return sources[usable], targets[usable], rtts[usable]


def _to_each(
    sources: Indices, targets: Indices, rtts: Floats, of_same_peer: Sequence[list[int]]
) -> tuple[Indices, Indices, Floats]:
    """The same distances, to all servers of a peer instead of its first."""
    each = [of_same_peer[target] for target in targets]
    sizes = [len(some) for some in each]
    to = np.fromiter(chain.from_iterable(each), np.int64, sum(sizes))
    return np.repeat(sources, sizes), to, np.repeat(rtts, sizes)


def _padded(count: int, sources: Indices, targets: Indices, rtts: Floats) -> tuple[Indices, Floats]:
    degrees = np.bincount(sources, minlength=count)
    columns = np.arange(len(sources)) - np.repeat(np.cumsum(degrees) - degrees, degrees)
    shape = count, int(degrees.max(initial=0))
    to, distances = np.zeros(shape, np.int64), np.full(shape, np.inf)
    to[sources, columns], distances[sources, columns] = targets, rtts
    return to, distances


def graph_of(view: View, usable: Indices, span: Span, costs: Costs, demand: Demand) -> Graph:
    """The graph of those servers of `view` that are `usable`, as far as they hold blocks of `span`.

    Its costs are the seconds of all of `demand`: the prompt and each new token go along the whole route
    once. Activations of the prompt travel between hops; the first block is given token ids, the client one
    token's activations in the end.

    What a block takes counts for those as well who wait meanwhile: else a route that needs a block which few
    hold would have their servers run others too, that many hold, since it waits there once in any case.
    """
    priced = prices(view.peers, view.rates, costs, demand)
    way = priced.way * demand.trips
    carried = priced.byte * demand.prompt_bytes
    ids = priced.byte * (demand.prompt_tokens * TOKEN_ID_BYTES)
    held = np.zeros_like(view.spans)
    held[usable] = view.spans[usable]
    start, end = np.clip(held - span.start, 0, span.size).T
    return Graph(
        num_blocks=span.size,
        start=start,
        end=end,
        enter=priced.once + (priced.queue + HOP_SECONDS) * demand.trips,
        block=(priced.block * demand.new_tokens + priced.prompt) * (1 + priced.toll),
        come=way + carried,
        leave=way + carried,
        first=way + (ids if span.start == 0 else carried),
        last=way,
        links=_links(view, costs, demand, priced) if costs.pushes and view.targets.size else None,
    )


def _links(view: View, costs: Costs, demand: Demand, priced: Prices) -> Links:
    seconds = view.rtts * (demand.trips / 2)
    if demand.prompt_bytes:
        slower = np.maximum(priced.byte[:, None], priced.byte[view.targets])
        seconds += slower * demand.prompt_bytes
    for source, target in costs.broken:
        for row in view.of_peer.get(source, ()):
            seconds[row, np.isin(view.targets[row], view.of_peer.get(target, ()))] = np.inf
    return Links(view.targets, seconds)
