"""What a route costs: seconds, from what servers announce and this client has seen of them.

Owns the model of where a session's time goes, as arrays over servers: ways, queues, blocks, transfers; and of
the time that it takes others. Pure functions of announcements and of a demand; must not know how the cheapest
way is found, nor who is on it.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from swarm.dht.announcement import Announcement
from swarm.net.transport import PeerId

Seconds: TypeAlias = npt.NDArray[np.float64]

DEFAULT_RTT = 0.1
"""Seconds assumed for a round trip that was not measured yet: worse than most, so measured peers win."""

DEFAULT_DECODE = 50.0
"""Blocks a second assumed of a server that has not measured itself."""

PREFILL_GAIN = 10.0
"""How many times more tokens a server that did not measure it is taken to run in prefill than in decode."""

CONTEXT_DOUBLING = 16_384
"""Tokens of context at which attending to them is taken to cost as much as all else that a block does.

By the bytes that are read it lies at 9,000 for the smallest models and above 100,000 for large ones.
"""

WAITED = 3.0
"""Seconds that others wait for one in which a block is run, for each step that is in the queue there.

It delays each of those by one, and those who come later as well. Where steps come at random and `n` are
there, others wait n + n² in all (M/M/1): three for each where there are two. It is not taken to grow beyond
that, since servers that run steps together let nobody wait so long.
"""

MOST_WAITED = 30.0
"""The same for all steps in a queue at most, however many a server announces."""

HOP_SECONDS = 0.001
"""What each hop costs a step besides: taking it in, queueing it, handing its result on."""

TOKEN_ID_BYTES = 4

LOADING_SECONDS = 60.0
"""Seconds that a shard is taken to need until it serves, less what is loaded."""

WAKING_SECONDS = 3600.0
"""What waking a peer is taken to cost: more than any wait for one that loads already."""


@dataclass(frozen=True)
class Demand:
    """What a session is going to ask: a prompt, and an answer of `new_tokens`, each one decode step.

    The activations of a token take `token_bytes` on the wire. A decode step runs `rows` tokens: more than
    one where it verifies drafts; it is taken to yield one token all the same.
    """

    prompt_tokens: int = 0
    new_tokens: int = 1
    token_bytes: int = 0
    rows: int = 1

    @property
    def trips(self) -> int:
        """Passes along the whole route: one for the prompt, one for each new token."""
        return self.new_tokens + (self.prompt_tokens > 0)

    @property
    def prompt_bytes(self) -> int:
        return self.prompt_tokens * self.token_bytes


ONE_TOKEN = Demand()


class Seen(NamedTuple):
    """What this client's own steps met at a peer lately, and how true that still is, from 0 to 1.

    `queue` are the seconds until a step began, `pace` how many times what is announced it then took.
    """

    queue: float
    pace: float
    trust: float


@dataclass(frozen=True)
class Costs:
    """What one client knows of peers besides their announcements.

    `rtt` is the measured round trip between the client and a peer in seconds, None where unknown. Servers
    pass activations on to those to whom they announce a distance, except over the edges in `broken` and
    unless `pushes` is off. `penalties` are seconds that a session with a peer is taken to cost on top. `lot`
    is how many times what others wait at a peer counts for this client, 1 or more: all clients hear of the
    same queues some seconds late, and would all leave busy servers for the same others.
    """

    rtt: Callable[[PeerId], float | None]
    pushes: bool = True
    broken: Collection[tuple[PeerId, PeerId]] = ()
    seen: Mapping[PeerId, Seen] = field(default_factory=dict)
    penalties: Mapping[PeerId, float] = field(default_factory=dict)
    lot: Callable[[PeerId], float] = lambda peer: 1.0

    def link(self, source: Announcement, target: PeerId) -> float | None:
        """One-way seconds from `source` straight to `target`; None where only the client leads there."""
        rtt = source.rtts.get(target)
        if rtt is None or not self.pushes or (source.peer_id, target) in self.broken or target == source.peer:
            return None
        return rtt / 2


@dataclass(frozen=True)
class Prices:
    """What each of some servers costs in seconds: arrays [servers].

    `way`: between client and server, one way. `queue`: until a step begins. `block`: one block in one decode
    step. `prompt`: one block for the whole prompt. `byte`: one byte in or out, 0 where that is not known.
    `once`: for a whole session, until the server has its blocks and by the client's penalties. `toll`, which
    is a number: how many seconds others wait for one in which a block is run for this session.
    """

    way: Seconds
    queue: Seconds
    block: Seconds
    prompt: Seconds
    byte: Seconds
    once: Seconds
    toll: Seconds


class Rates(NamedTuple):
    """What servers announce of their speed: arrays [servers].

    `decode` and `prefill` in blocks a second for one token, `network` in bytes a second or 0 where unknown;
    `size`, the blocks of the span, and `queued`, those that the steps in the queue still run, each its whole
    span; `ready`, seconds until the blocks are loaded.
    """

    decode: Seconds
    prefill: Seconds
    network: Seconds
    size: Seconds
    queued: Seconds
    ready: Seconds


def rates(servers: Sequence[Announcement]) -> Rates:
    said = np.array([_rates(server) for server in servers], dtype=np.float64).reshape(-1, 6)
    decode, prefill, network, size, queued, ready = said.T
    decode = np.where(decode > 0, decode, DEFAULT_DECODE)
    return Rates(decode, np.where(prefill > 0, prefill, decode * PREFILL_GAIN), network, size, queued, ready)


def prices(peers: Sequence[PeerId], rates: Rates, costs: Costs, demand: Demand = ONE_TOKEN) -> Prices:
    """What the servers of `peers`, which announce `rates`, cost a session of `demand`.

    A step takes a block what is announced for one token, for each further row what is announced for a token
    in prefill, and more the longer the context. The queue is the announced one, each step in it running the
    server's whole span. As far as it is to be trusted, what this client saw stands in for both.

    What others wait follows from the queue in seconds too. So it is little where many steps are in the queue
    and run together, once this client has seen that they are. It counts as many times as the peer's lot says.
    """
    rtts = np.array(list(map(costs.rtt, peers)), dtype=np.float64)  # None becomes NaN
    queue, pace = rates.queued / rates.decode, np.full(len(peers), _growth(demand))
    once = rates.ready.copy()
    if costs.seen or costs.penalties:
        for index, peer in enumerate(peers):
            once[index] += costs.penalties.get(peer, 0.0)
            if (seen := costs.seen.get(peer)) is not None:
                queue[index] += seen.trust * (seen.queue - queue[index])
                pace[index] += seen.trust * (seen.pace - pace[index])
    lots = np.array(list(map(costs.lot, peers)), dtype=np.float64)
    network, block = rates.network, (1 / rates.decode + (demand.rows - 1) / rates.prefill) * pace
    return Prices(
        way=np.where(np.isnan(rtts), DEFAULT_RTT, rtts) / 2,
        queue=queue,
        block=block,
        prompt=demand.prompt_tokens / rates.prefill * (1 + demand.prompt_tokens / 2 / CONTEXT_DOUBLING),
        byte=np.divide(1.0, network, out=np.zeros(len(network)), where=network > 0),
        once=once,
        toll=lots * np.minimum(WAITED * queue / (rates.size * block), MOST_WAITED),
    )


def step_seconds(server: Announcement, rows: int) -> float:
    """What one block of `server` is announced to take for a step of `rows` tokens, in a short context."""
    decode = server.throughput.decode or DEFAULT_DECODE
    return 1 / decode + (rows - 1) / (server.throughput.prefill or decode * PREFILL_GAIN)


def _growth(demand: Demand) -> float:
    """How many times what it takes in a short context a decode step takes in that of `demand`, on average."""
    return 1 + (demand.prompt_tokens + (demand.new_tokens - 1) / 2) / CONTEXT_DOUBLING


def _rates(server: Announcement) -> tuple[float, float, float, int, float, float]:
    measured, size = server.throughput, server.end - server.start
    ready = 0.0 if server.state != "joining" else _loading_seconds(server)
    return measured.decode, measured.prefill, measured.network, size, server.queued * size, ready


def _loading_seconds(server: Announcement) -> float:
    return WAKING_SECONDS if server.asleep else LOADING_SECONDS * (1 - server.progress)
