"""How long a given route takes, and where: each hop's share of a token, and the time to the first one.

And how long it keeps others waiting, whose steps share its servers.

Pure functions over announcements, by the prices of `costs`. Must not know how a route is chosen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from swarm.client.costs import HOP_SECONDS, ONE_TOKEN, TOKEN_ID_BYTES, Costs, Demand, prices, rates
from swarm.dht.announcement import Announcement
from swarm.spans import Span

PREFILL_CHUNK = 128
"""Tokens of a prompt that a hop is taken to run while the next one runs those before."""


@dataclass(frozen=True)
class Share:
    """Seconds of one decode step that a hop accounts for: the way to and into it, its queue, its blocks.

    `is_direct`: the hop before sends straight to this one, without the client. `prompt` are the seconds in
    which it takes the whole prompt in and runs it. `toll` are those that others wait for its blocks, all of
    them together, which are no part of the step's own time.
    """

    way: float
    queue: float
    compute: float
    prompt: float
    toll: float
    is_direct: bool

    @property
    def seconds(self) -> float:
        return self.way + self.queue + self.compute


@dataclass(frozen=True)
class Estimate:
    """Where the time on a route goes, in seconds: one share a hop, and the way `back` to the client.

    `token` is the time of a decode step, `first_token` that from the prompt to the first token. `toll` is the
    time of a decode step that others wait for it.
    """

    shares: tuple[Share, ...]
    back: float
    token: float
    first_token: float
    toll: float

    @property
    def cost(self) -> float:
        """What a decode step takes everybody: by this routes are chosen."""
        return self.token + self.toll


def estimate(hops: Sequence[tuple[Announcement, Span]], costs: Costs, demand: Demand = ONE_TOKEN) -> Estimate:
    """The time on a route: who runs which blocks, in order."""
    servers = [server for server, _ in hops]
    priced = prices([server.peer_id for server in servers], rates(servers), costs, demand)
    links = [None, *(costs.link(one, other.peer_id) for one, other in pairwise(servers))]
    shares, leaving = [], 0.0
    for index, (link, (_, span)) in enumerate(zip(links, hops, strict=True)):
        arriving = float(priced.way[index])
        through_client = leaving + arriving
        is_direct = link is not None and link < through_client
        is_fed_ids = span.start == 0
        size = demand.prompt_tokens * TOKEN_ID_BYTES if is_fed_ids else demand.prompt_bytes
        compute = float(priced.block[index]) * span.size
        shares.append(
            Share(
                way=HOP_SECONDS + (link if link is not None and is_direct else through_client),
                queue=float(priced.queue[index]),
                compute=compute,
                prompt=float(priced.prompt[index]) * span.size + size * float(priced.byte[index]),
                toll=compute * float(priced.toll[index]),
                is_direct=is_direct,
            )
        )
        leaving = arriving
    token = sum(share.seconds for share in shares) + leaving
    toll = sum(share.toll for share in shares)
    return Estimate(tuple(shares), leaving, token, _first_token(shares, leaving, demand), toll)


def _first_token(shares: Sequence[Share], back: float, demand: Demand) -> float:
    """Hops run the chunks of a prompt at the same time: one through all, the others at the slowest's pace."""
    waiting = sum(share.way + share.queue for share in shares) + back
    chunks = max(1, -(-demand.prompt_tokens // PREFILL_CHUNK)) if len(shares) > 1 else 1
    one_each = sum(share.prompt for share in shares) / chunks
    return waiting + one_each + max(share.prompt for share in shares) * (chunks - 1) / chunks
