"""Sessions of many clients on a swarm of thousands: the real routes, and queues by formula.

Servers are announcements, with distances to as many others as they measure; each client knows the distances
that it would have measured. Sessions begin round by round, on the route that is the fastest by what is
announced then: of queues, what they were on average in the round before. Once there are as many as there are
to be, some end in each round and as many begin. A server serves steps in the order they come, each taking
what its blocks take; how long steps wait for it is that of an M/D/1 queue.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from statistics import median
from time import process_time

import msgspec
import numpy as np

from benchmarks.world import Floats, World
from swarm.client.costs import PREFILL_GAIN, Costs, Demand
from swarm.client.graph import View
from swarm.client.lots import lot
from swarm.client.route import Route, find_route
from swarm.dht.announcement import MAX_NEIGHBOURS, Announcement, Throughput
from swarm.dht.directory import MAX_PEERS
from swarm.dht.rtts import MAX_PEERS as MAX_MEASURED
from swarm.net.transport import PeerId
from swarm.server.capacity import Layout
from swarm.spans import Span

CLIENTS = 60
MOST_SESSIONS = 1500
FILLING, RENEWING = 10, 6
"""Rounds in which sessions come to be, and in which some are replaced: as many as came in one."""

ITERATIONS = 60

DEMAND = Demand(prompt_tokens=256, new_tokens=128)
FULLEST = 0.98
"""The utilisation that a server comes to at most."""

TIMED = 15


@dataclass(frozen=True)
class Town:
    """Servers as they are announced, their places in the world, and the clients that know some of them."""

    num_blocks: int
    servers: tuple[Announcement, ...]
    world: World
    clients: tuple[dict[str, float], ...]

    @property
    def span(self) -> Span:
        return Span(0, self.num_blocks)

    @cached_property
    def number(self) -> dict[PeerId, int]:
        return {one.peer_id: number for number, one in enumerate(self.servers)}

    @cached_property
    def strengths(self) -> Floats:
        return np.array([one.throughput.decode for one in self.servers])

    @cached_property
    def capacity(self) -> float:
        """Tokens a second."""
        starts, ends = np.array([one.span for one in self.servers], np.int64).T
        return Layout(self.num_blocks, starts, ends, self.strengths).tight().throughput

    def session(self, view: View, client: int) -> "Session":
        """One of a client, on the fastest route by `view` of these servers."""
        costs = Costs(rtt=self.clients[client].get, lot=partial(lot, PeerId(f"client {client}")))
        return Session(client, find_route(view, self.span, costs=costs, demand=DEMAND))


@dataclass(frozen=True)
class Session:
    client: int
    route: Route


def town(placed: Sequence[tuple[Span, float]], num_blocks: int, seed: int) -> Town:
    """Servers of so many blocks and strengths, as many as a directory lists, drawn at random."""
    rng = random.Random(seed)
    placed = sorted(rng.sample(placed, min(len(placed), MAX_PEERS)))
    world = World(len(placed) + CLIENTS, np.random.default_rng(seed))
    names = [f"peer-{number:05}" for number in range(len(placed))]

    def distances(here: int, others: Sequence[int], most: int) -> dict[str, float]:
        """Round trips from one place to as many others as are measured."""
        known = rng.sample(others, min(len(others), most))
        return {
            names[at]: 2 * seconds
            for at, seconds in zip(known, world.seconds(here, known).tolist(), strict=True)
        }

    holders: list[list[int]] = [[] for _ in range(num_blocks + 1)]
    for number, (span, _) in enumerate(placed):
        for block in span.blocks:
            holders[block].append(number)
    servers = [
        Announcement(
            peer=names[number],
            model_id="m",
            start=span.start,
            end=span.end,
            state="serving",
            kv_tokens_left=10**9,
            throughput=Throughput(decode=strength, prefill=PREFILL_GAIN * strength),
            rtts=distances(number, holders[span.end], MAX_NEIGHBOURS),
        )
        for number, (span, strength) in enumerate(placed)
    ]
    clients = [distances(len(placed) + client, range(len(placed)), MAX_MEASURED) for client in range(CLIENTS)]
    return Town(num_blocks, tuple(servers), world, tuple(clients))


def traffic(town: Town, load: float, seed: int) -> dict[str, float] | None:
    """How sessions fare that would ask for the part `load` of what the servers carry, if nobody had to wait.

    None if that takes more than `MOST_SESSIONS`.
    """
    rng = random.Random(seed)
    view = View.of(town.servers)
    alone = [sum(ways_and_work(town, town.session(view, client))) for client in range(CLIENTS)]
    count = round(load * town.capacity * median(alone))
    if not 0 < count <= MOST_SESSIONS:
        return None
    sessions: list[Session] = []
    flow = Flow.of(town, [])
    for number in range(FILLING + RENEWING):
        view = View.of(flow.announced(town))
        kept = len(sessions) if number < FILLING else round(len(sessions) * (1 - 1 / FILLING))
        sessions = rng.sample(sessions, kept)
        goal = round(count * min(1.0, (number + 1) / FILLING))
        sessions += [town.session(view, rng.randrange(CLIENTS)) for _ in range(goal - len(sessions))]
        flow = Flow.of(town, sessions)
    return {
        "load": load,
        "capacity": town.capacity,
        "sessions": count,
        "given": float((1 / flow.token).sum()),
        "token_ms": 1000 * float(np.median(flow.token)),
        "token_ms_p95": 1000 * float(np.quantile(flow.token, 0.95)),
        "hops": float(np.mean([len(one.route.hops) for one in sessions])),
    }


@dataclass(frozen=True)
class Flow:
    """The balance of some sessions: seconds of a `token` by session, and `queues` by server: steps there."""

    token: Floats
    queues: Floats

    @classmethod
    def of(cls, town: Town, sessions: Sequence[Session]) -> "Flow":
        """A session asks for the next token when it has one, so that it asks for less where it waits.

        Found by iteration: waits from utilisation, and utilisation from waits. Where a server would be asked
        for more than it can do, waiting grows until it is not.
        """
        count = len(town.servers)
        alone = np.array([sum(ways_and_work(town, one)) for one in sessions])
        of_session = np.repeat(np.arange(len(sessions)), [len(one.route.hops) for one in sessions])
        hops = [hop for one in sessions for hop in one.route.hops]
        at = np.array([town.number[hop.peer] for hop in hops], np.int64)
        work = np.array([hop.span.size for hop in hops]) / town.strengths[at] if hops else np.zeros(0)
        waits, token, steps, used = np.zeros(count), alone, np.zeros(count), np.zeros(count)
        for _ in range(ITERATIONS if hops else 0):
            token = alone + np.bincount(of_session, waits[at], len(sessions))
            rate = (1 / token)[of_session]
            steps = np.bincount(at, rate, count)
            used = np.bincount(at, rate * work, count)
            service = np.divide(used, steps, out=np.zeros(count), where=steps > 0)
            wanted = np.maximum(
                waiting(used) * service, np.where(used > FULLEST, waits * used / FULLEST, 0.0)
            )
            waits = (waits + wanted) / 2
        return cls(token, steps * waits + used)

    def announced(self, town: Town) -> list[Announcement]:
        queues = self.queues.tolist()
        return [
            msgspec.structs.replace(one, mean_queue=queue)
            for one, queue in zip(town.servers, queues, strict=True)
        ]


def waiting(used: Floats) -> Floats:
    """How many times its service a step waits at such utilisations, by Pollaczek and Khinchine."""
    full = np.minimum(used, FULLEST)
    return full / (2 * (1 - full))


def ways_and_work(town: Town, session: Session) -> tuple[float, float]:
    """Seconds of one token on all ways, and in all blocks.

    Hops pass on straight to whom they announce a distance, else by the client.
    """
    here = len(town.servers) + session.client
    hops = session.route.hops
    places = [town.number[hop.peer] for hop in hops]
    ways = float(town.world.seconds(here, places[0]) + town.world.seconds(here, places[-1]))
    for hop, place, after in zip(hops, places, places[1:], strict=False):
        straight = float(town.world.seconds(place, after))
        by_client = float(town.world.seconds(here, place) + town.world.seconds(here, after))
        ways += straight if town.servers[after].peer in hop.announcement.rtts else by_client
    return ways, sum(hop.span.size / town.strengths[at] for hop, at in zip(hops, places, strict=True))


def routing(town: Town) -> dict[str, float]:
    """Milliseconds of the processor to find one route: with the servers as known, and after news of them."""
    known, new = [], []
    view = View.of(town.servers)
    for client in range(TIMED):
        costs = Costs(rtt=town.clients[client].get)
        began = process_time()
        find_route(view, town.span, costs=costs, demand=DEMAND)
        known.append(process_time() - began)
        began = process_time()
        find_route(town.servers, town.span, costs=costs, demand=DEMAND)
        new.append(process_time() - began)
    return {"servers": len(town.servers), "known_ms": 1000 * median(known), "new_ms": 1000 * median(new)}
