"""Why a route is the fastest: each hop's share of a token's time, the runner-up, what would make it faster.

Pure functions over announcements and costs. Must not know how they were read, nor how they are shown.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any

from swarm.client.costs import DEFAULT_DECODE, DEFAULT_RTT, Costs, Demand
from swarm.client.estimate import Estimate, Share, estimate
from swarm.client.graph import View
from swarm.client.privacy import NO_LIMITS, Limits
from swarm.client.route import Hop, NoRoute, Route, blocks_text, find_route, label
from swarm.dht.announcement import Announcement
from swarm.net.transport import PeerId
from swarm.spans import Span

NOTABLE_SHARE = 0.1
"""The part of a token's time above which something is worth to be named as what would make it faster."""


@dataclass(frozen=True)
class Explanation:
    """The fastest route, where its time goes, the best one without one of its peers, and advice.

    It keeps to `limits`, if there are any; `unlimited` is the fastest that does not.
    """

    route: Route
    times: Estimate
    demand: Demand
    runner_up: Route | None
    advice: tuple[str, ...]
    limits: Limits = NO_LIMITS
    unlimited: Route | None = None

    @property
    def slower(self) -> float:
        """By which part of its time a token takes longer on the runner-up."""
        return 0.0 if self.runner_up is None else self.runner_up.seconds / self.times.token - 1

    def as_json(self) -> dict[str, Any]:
        """The contract of `--json`."""
        runner_up = self.runner_up and {
            "hops": [{"peer": hop.peer, "blocks": list(hop.span)} for hop in self.runner_up.hops],
            "token_ms": _ms(self.runner_up.seconds),
            "toll_ms": _ms(self.runner_up.toll),
            "slower": round(self.slower, 4),
        }
        return {
            "hops": [
                _hop_json(hop, share, self.times)
                for hop, share in zip(self.route.hops, self.times.shares, strict=True)
            ],
            "back_ms": _ms(self.times.back),
            "token_ms": _ms(self.times.token),
            "toll_ms": _ms(self.times.toll),
            "tokens_per_s": round(1 / self.times.token, 3),
            "prompt_tokens": self.demand.prompt_tokens,
            "new_tokens": self.demand.new_tokens,
            "first_token_ms": _ms(self.times.first_token),
            "runner_up": runner_up,
            "privacy": None if self.unlimited is None else _privacy_json(self.limits, self.unlimited),
            "advice": list(self.advice),
        }


def explain(
    announcements: Sequence[Announcement],
    num_blocks: int,
    costs: Costs,
    demand: Demand,
    *,
    model: str = "the model",
    limits: Limits = NO_LIMITS,
) -> Explanation:
    """The fastest route for a session of `demand` through a model of `num_blocks`, and why.

    Raises:
        NoRoute: some blocks have no server with room, or none that may run them.
    """
    view, span = View.of(announcements), Span(0, num_blocks)

    def find(excluded: Mapping[PeerId, str] = MappingProxyType({}), limits: Limits = limits) -> Route:
        tokens = demand.prompt_tokens + demand.new_tokens
        return find_route(
            view,
            span,
            costs=costs,
            demand=demand,
            model=model,
            tokens=tokens,
            excluded=excluded,
            limits=limits,
        )

    def without(peer: PeerId) -> Iterator[Route]:
        try:
            yield find({peer: "is left out"})
        except NoRoute:
            return

    route = find()
    times = estimate(route.visits, costs, demand)
    others = [other for peer in dict.fromkeys(hop.peer for hop in route.hops) for other in without(peer)]
    runner_up = min(others, key=lambda other: other.cost, default=None)
    advice = (
        *_what_takes_longest(route, times),
        *_what_is_not_known(route, costs),
        *_what_goes_through_the_client(route, costs),
        *_what_is_at_risk(view.servers, num_blocks),
    )
    unlimited = find(limits=NO_LIMITS) if limits.are_any else None
    return Explanation(route, times, demand, runner_up, advice, limits, unlimited)


def _what_takes_longest(route: Route, times: Estimate) -> Iterator[str]:
    """The largest part of a token's time, and what would shorten it."""
    parts = [
        (seconds, index, kind)
        for index, share in enumerate(times.shares)
        for kind, seconds in (("compute", share.compute), ("way", share.way), ("queue", share.queue))
    ]
    seconds, index, kind = max(parts, key=lambda part: part[0])
    part = seconds / times.token
    if part < NOTABLE_SHARE:
        return
    hop, share = route.hops[index], times.shares[index]
    blocks, name = blocks_text(hop.span), label(hop.announcement)
    if kind == "compute":
        yield f"A faster server for {blocks}: computing them takes {part:.0%} of the time."
    elif kind == "queue":
        yield f"Another server for {blocks}: waiting in the queue of {name} takes {part:.0%} of the time."
    else:
        near = label(route.hops[index - 1].announcement) if share.is_direct else "you"
        yield f"A server for {blocks} nearer to {near}: the way to {name} takes {part:.0%} of the time."


def _what_is_not_known(route: Route, costs: Costs) -> Iterator[str]:
    for hop in _distinct(route):
        name = label(hop.announcement)
        if costs.rtt(hop.peer) is None:
            yield (
                f"Nothing is known of the distance to {name}, which was not pinged or did not answer:"
                f" {DEFAULT_RTT * 1000:.0f} ms are assumed."
            )
        if not hop.announcement.throughput.decode:
            yield f"{name} has not measured its speed: {DEFAULT_DECODE:.0f} blocks/s are assumed."


def _what_goes_through_the_client(route: Route, costs: Costs) -> Iterator[str]:
    for one, other in pairwise(route.hops):
        if costs.link(one.announcement, other.peer) is not None:
            continue
        source, target = label(one.announcement), label(other.announcement)
        if (one.peer, other.peer) in costs.broken:
            yield f"{source} cannot reach {target}: what it passes on goes through you."
        else:
            yield f"{source} announces no distance to {target}: the way is counted as one through you."


def _what_is_at_risk(servers: Sequence[Announcement], num_blocks: int) -> Iterator[str]:
    """Blocks that a single peer serves, as spans."""
    holders: list[set[PeerId]] = [set() for _ in range(num_blocks)]
    for server in servers:
        if server.state == "serving":
            for block in range(server.start, min(server.end, num_blocks)):
                holders[block].add(server.peer_id)
    names = {server.peer_id: label(server) for server in servers}
    start = 0
    for end in range(1, num_blocks + 1):
        if end < num_blocks and holders[end] == holders[start]:
            continue
        if len(holders[start]) == 1:
            alone, blocks = names[next(iter(holders[start]))], blocks_text(Span(start, end))
            yield f"A second server for {blocks}: {alone} alone has them, and nothing works without it."
        start = end


def _distinct(route: Route) -> list[Hop]:
    return list({hop.peer: hop for hop in route.hops}.values())


def _hop_json(hop: Hop, share: Share, times: Estimate) -> dict[str, Any]:
    said = hop.announcement
    return {
        "peer": hop.peer,
        "name": said.name,
        "blocks": list(hop.span),
        "dtype": said.dtype,
        "quantization": said.quantization,
        "is_direct": share.is_direct,
        "way_ms": _ms(share.way),
        "queue_ms": _ms(share.queue),
        "compute_ms": _ms(share.compute),
        "toll_ms": _ms(share.toll),
        "share": round(share.seconds / times.token, 4),
    }


def _privacy_json(limits: Limits, unlimited: Route) -> dict[str, Any]:
    return {
        "trusted_peers": None if limits.trusted is None else len(limits.trusted),
        "others_may_run": list(limits.inner),
        "max_blocks": limits.most,
        "token_ms_without": _ms(unlimited.seconds),
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
