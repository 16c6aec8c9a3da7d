"""The fastest route: which peers run which blocks for one session.

A graph whose vertices are (peer, block) and whose edges cost seconds: entering a peer, waiting in its
queue, computing a block. Dijkstra's algorithm finds the cheapest way through all blocks. Pure functions
over announcements: nothing here knows of streams, tensors or time.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import groupby
from math import inf
from types import MappingProxyType

import msgspec

from swarm.client.text import printable
from swarm.dht.announcement import Announcement
from swarm.errors import SwarmError
from swarm.net.transport import PeerId
from swarm.spans import Span

DEFAULT_RTT = 0.1
"""Seconds assumed for a round trip that was not measured yet: worse than most, so measured peers win."""

DEFAULT_DECODE = 50.0
"""Blocks a second assumed of a server that has not measured itself."""

LOADING_SECONDS = 60.0
"""Seconds that a shard is taken to need until it serves, less what is loaded."""

WAKING_SECONDS = 3600.0
"""What waking a peer is taken to cost: more than any wait for one that loads already."""

CLIENT = -1
"""Stands for the client where a server would have its place in the list of announcements."""

DirectLatency = Callable[[Announcement], Mapping[PeerId, float]]


def through_client(_: Announcement) -> Mapping[PeerId, float]:
    """No server passes activations to the next: each change of peer goes through the client."""
    return {}


@dataclass(frozen=True)
class Costs:
    """What an edge of the graph costs, in seconds.

    `rtt` is the measured round trip between the client and a peer, None where unknown. `direct` gives
    the one-way latencies from a server to those servers that it can reach without the client.
    """

    rtt: Callable[[PeerId], float | None]
    direct: DirectLatency = through_client
    default_decode: float = DEFAULT_DECODE

    def one_way(self, peer: PeerId) -> float:
        """Latency between the client and `peer`, either way."""
        rtt = self.rtt(peer)
        return (DEFAULT_RTT if rtt is None else rtt) / 2

    def block_seconds(self, server: Announcement) -> float:
        """Time in which the server runs one block for one token."""
        return 1 / (server.throughput.decode or self.default_decode)

    def queue_seconds(self, server: Announcement) -> float:
        """Wait before a step starts: each step in the queue runs the server's whole span."""
        return server.queue * server.span.size * self.block_seconds(server)

    def ready_seconds(self, server: Announcement) -> float:
        """Wait until the server has its blocks, if they are to be loaded."""
        if server.state != "joining":
            return 0.0
        return WAKING_SECONDS if server.asleep else LOADING_SECONDS * (1 - server.progress)


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

    def __str__(self) -> str:
        return " → ".join(f"{label(hop.announcement)} [{hop.span}]" for hop in self.hops)


class NoRoute(SwarmError):
    """Some blocks have no server that can take the session now.

    There will be servers for all of them once those that are `loading` have done so, and those in `to_wake`,
    if there are any, were asked to.
    """

    def __init__(
        self,
        message: str,
        hint: str,
        missing: Sequence[Span] = (),
        loading: Sequence[Announcement] = (),
        to_wake: Sequence[Announcement] = (),
    ):
        super().__init__(message, hint)
        self.missing = tuple(missing)
        self.loading = tuple(loading)
        self.to_wake = tuple(to_wake)


def find_route(
    announcements: Sequence[Announcement],
    num_blocks: int,
    *,
    costs: Costs,
    model: str = "the model",
    tokens: int = 0,
    excluded: Mapping[PeerId, str] = MappingProxyType({}),
    woken: Collection[PeerId] = (),
) -> Route:
    """The fastest route through blocks `[0, num_blocks)` for a session of at most `tokens` tokens.

    Only serving peers with room for the session are used, and none of `excluded`, whose values say why
    ("did not answer"). Equal costs are decided by the number of hops, then by the order of peer ids.
    `woken` have been asked to load their blocks, and may not have announced yet that they do.

    Raises:
        NoRoute: some blocks have no such peer; says which, who is still loading them, and whom to wake.
    """
    usable = [
        server
        for server in announcements
        if server.state == "serving" and server.kv_tokens_left >= tokens and server.peer_id not in excluded
    ]
    usable.sort(key=lambda server: (server.peer, server.start, server.end))
    missing = missing_spans(usable, num_blocks)
    if missing:
        to_wake = _to_wake(announcements, usable, num_blocks, costs, excluded, woken)
        raise _no_route(announcements, missing, model, tokens, excluded, to_wake)
    return _Search(usable, num_blocks, costs).run()


def missing_spans(servers: Sequence[Announcement], num_blocks: int) -> list[Span]:
    """The spans of `[0, num_blocks)` that none of `servers` covers."""
    missing, reached = [], 0
    held = sorted((server.start, server.end) for server in servers)
    for start, end in [*held, (num_blocks, num_blocks)]:
        if reached < min(start, num_blocks):
            missing.append(Span(reached, min(start, num_blocks)))
        reached = max(reached, end)
    return missing


def _to_wake(
    announcements: Sequence[Announcement],
    usable: Sequence[Announcement],
    num_blocks: int,
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
    candidates = [*usable, *sorted(coming, key=lambda server: (server.peer, server.start, server.end))]
    if missing_spans(candidates, num_blocks):
        return []
    hops = _Search(candidates, num_blocks, costs).run().hops
    return [hop.announcement for hop in hops if hop.announcement.asleep]


@dataclass
class _Search:
    """Dijkstra's algorithm over the vertices (server, blocks done), the client being one of the servers.

    Passing through the client is a vertex of its own, which keeps the edges proportional to the number
    of announced blocks, where edges between all pairs of servers would grow with its square.
    """

    servers: Sequence[Announcement]
    num_blocks: int
    costs: Costs
    best: dict[tuple[int, int], tuple[float, int]] = field(default_factory=dict)
    came_from: dict[tuple[int, int], int] = field(default_factory=dict)
    queue: list[tuple[float, int, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        costs, servers = self.costs, self.servers
        self.one_way = [costs.one_way(server.peer_id) for server in servers]
        self.compute = [costs.block_seconds(server) for server in servers]
        self.enter = [
            costs.ready_seconds(server) + costs.queue_seconds(server) + costs.block_seconds(server)
            for server in servers
        ]
        self.at_block: list[list[int]] = [[] for _ in range(self.num_blocks)]
        self.of_peer: dict[PeerId, list[int]] = {}
        for index, server in enumerate(servers):
            self.of_peer.setdefault(server.peer_id, []).append(index)
            for block in range(server.start, min(server.end, self.num_blocks)):
                self.at_block[block].append(index)

    def run(self) -> Route:
        self._offer(0.0, 0, CLIENT, 0, CLIENT)
        while True:
            seconds, changes, done, place = heappop(self.queue)
            if (seconds, changes) > self.best[place, done]:
                continue
            if place != CLIENT:
                self._leave(seconds, changes, place, done)
            elif done == self.num_blocks:
                return Route(self._hops(), seconds)
            else:
                for server in self.at_block[done]:
                    arrived = seconds + self.one_way[server] + self.enter[server]
                    self._offer(arrived, changes + 1, server, done + 1, CLIENT)

    def _leave(self, seconds: float, changes: int, place: int, done: int) -> None:
        """From a server that has run blocks up to `done`: one more block, the client, or another server."""
        if done < min(self.servers[place].end, self.num_blocks):
            self._offer(seconds + self.compute[place], changes, place, done + 1, place)
        self._offer(seconds + self.one_way[place], changes, CLIENT, done, place)
        if done == self.num_blocks:
            return
        for peer, one_way in self.costs.direct(self.servers[place]).items():
            for server in self.of_peer.get(peer, ()):
                if self.servers[server].start <= done < self.servers[server].end and server != place:
                    self._offer(seconds + one_way + self.enter[server], changes + 1, server, done + 1, place)

    def _offer(self, seconds: float, changes: int, place: int, done: int, origin: int) -> None:
        if (seconds, changes) < self.best.get((place, done), (inf, 0)):
            self.best[place, done] = (seconds, changes)
            self.came_from[place, done] = origin
            heappush(self.queue, (seconds, changes, done, place))

    def _hops(self) -> tuple[Hop, ...]:
        hops = []
        for place, steps in groupby(self._backwards(), key=lambda step: step[0]):
            blocks = [block for _, block in steps]
            server = self.servers[place]
            hops.append(Hop(server.peer_id, Span(blocks[-1], blocks[0] + 1), server))
        return tuple(reversed(hops))

    def _backwards(self) -> Iterator[tuple[int, int]]:
        """(server, block) of the found way, from the last block to the first."""
        place, done = CLIENT, self.num_blocks
        while done:
            origin = self.came_from[place, done]
            if place != CLIENT:
                done -= 1
                yield place, done
            place = origin


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
    return NoRoute(message, hint, missing, loading, to_wake)
