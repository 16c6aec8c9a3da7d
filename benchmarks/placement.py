"""How well servers are placed, by our rule and by others', on the same random swarms.

    python -m benchmarks.placement [--seeds 5] [--small 20] [--hours 3] [--json FILE]

What a swarm carries is what routes can get that enter and leave spans at any block, as ours may: the maximum
flow from servers, which give each of their blocks as much as they like, to blocks (`swarm.server.capacity`).
It is printed as a share of what its servers could carry if each could hold everything, which nothing exceeds.
Of our servers the part `--beside` has memory for other blocks beside its own: they serve on while they load.

1. Arranging: swarms of 10 to 100 servers, strengths from 1 to 50 (log-uniform), each able to hold 5 to 40 per
   cent of a model of 30 to 126 blocks. Ours and Petals' join one by one; `settled` is once nobody moves any
   more. Parallax' allocators see all servers at once.
2. Against the optimum: the same on `--small` swarms, so small that it can be computed.
3. Churn: servers come at random, and stay for a time that is log-normal with a mean of an hour. Who dies is
   noticed after 30 seconds, and loading takes 60. Moves are counted by server and hour, loading at the start
   is none.
"""

import argparse
import heapq
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.allocators import Parallax, Petals, Places, Server, carried, layout_of, optimum
from swarm.server.arranging import CALM, LOOK_PERIOD, REST
from swarm.server.placement import Holder, Move, choose, may_leave, plan, turn
from swarm.spans import Span

SWARMS = ((10, 30), (20, 60), (40, 80), (100, 126))
"""Servers, and blocks of the model."""

SMALL = ((6, 10), (7, 12), (8, 12))
CHURNING = ((12, 30), (40, 80))
OURS = "ours, none beside", "ours, settled", "ours, all beside"
STRONGEST = 50.0
SMALLEST, LARGEST = 0.05, 0.4
MEAN_STAY, SPREAD = 3600.0, 1.0
"""Seconds that a server stays, on average, and the standard deviation of its logarithm."""

NOTICED, LOADING = 30.0, 60.0
PETALS_PERIOD = 120.0
WARM_UP = 1800.0
"""Seconds of each run that do not count: the swarm fills."""


def random_servers(rng: np.random.Generator, count: int, num_blocks: int, first: int = 0) -> list[Server]:
    strengths = np.exp(rng.uniform(0, np.log(STRONGEST), count))
    sizes = np.maximum((num_blocks * rng.uniform(SMALLEST, LARGEST, count)).round(), 1).astype(int)
    return [
        Server(f"server-{first + at}-{rng.integers(2**32)}", size, strength)
        for at, (size, strength) in enumerate(zip(sizes.tolist(), strengths.tolist(), strict=True))
    ]


def holder(one: Server, span: Span, **state: Any) -> Holder:
    return Holder(one.name, span, one.strength, **state)


def serves_on(name: str, beside: float) -> bool:
    """Whether it is in the part `beside` of all servers, which have memory for other blocks beside theirs."""
    return turn(f"memory of {name}") < beside


# Arranging


def ours_joined(servers: Sequence[Server], num_blocks: int) -> Places:
    holders: list[Holder] = []
    for one in servers:
        span = choose(holders, num_blocks, holder(one, Span(0, one.size)))
        holders.append(holder(one, span, may_fill=True, may_improve=True))
    return {one.peer: one.span for one in holders}


def ours_settled(
    servers: Sequence[Server], places: Places, num_blocks: int, beside: float
) -> tuple[Places, int]:
    """Once nobody moves any more, and how many moves that took."""
    places, count = dict(places), 0
    while moves := plan(
        [
            holder(
                one,
                places[one.name],
                may_fill=True,
                may_improve=True,
                serves_on=serves_on(one.name, beside),
            )
            for one in servers
        ],
        num_blocks,
    ):
        places |= {move.peer: move.span for move in moves}
        count += len(moves)
    return places, count


def petals_joined(servers: Sequence[Server], num_blocks: int, rng: np.random.Generator) -> Places:
    rule, places = Petals(num_blocks, rng), {}
    for one in servers:
        places[one.name] = rule.join(servers, places, one)
    return places


def petals_settled(
    servers: Sequence[Server], places: Places, num_blocks: int, rng: np.random.Generator
) -> tuple[Places, int]:
    rule, places, count = Petals(num_blocks, rng), dict(places), 0
    for _ in range(20):
        before = count
        for one in servers:
            if rule.should_move(servers, places, one):
                places[one.name] = rule.move(servers, places, one)
                count += 1
        if count == before:
            break
    return places, count


def arranged(
    servers: Sequence[Server], num_blocks: int, rng: np.random.Generator, beside: float
) -> dict[str, float]:
    """What each way lets the swarm carry, in tokens a second, and the moves of each server until settled."""
    joined, as_petals = ours_joined(servers, num_blocks), petals_joined(servers, num_blocks, rng)
    settled, moves = ours_settled(servers, joined, num_blocks, beside)
    petals, petals_moves = petals_settled(servers, as_petals, num_blocks, rng)
    places = {
        "ours, joined": joined,
        "ours, settled": settled,
        "petals, joined": as_petals,
        "petals, settled": petals,
        "parallax, greedy": Parallax(num_blocks, by_programme=False).allocate(servers),
        "parallax, programme": Parallax(num_blocks, by_programme=True).allocate(servers),
    }
    found = {name: carried(servers, each, num_blocks) for name, each in places.items()}
    return {
        **found,
        "moves, ours": moves / len(servers),
        "moves, petals": petals_moves / len(servers),
    }


def arranging(seeds: int, beside: float) -> dict[str, dict[str, float]]:
    table = {}
    for count, num_blocks in SWARMS:
        rows = []
        for seed in range(seeds):
            rng = np.random.default_rng(seed)
            servers = random_servers(rng, count, num_blocks)
            bound = sum(one.strength for one in servers) / num_blocks
            found = arranged(servers, num_blocks, rng, beside)
            rows.append({name: value if "moves" in name else value / bound for name, value in found.items()})
        table[f"{count} servers, {num_blocks} blocks"] = means(rows)
        _say(f"{count} servers, {num_blocks} blocks: {table[f'{count} servers, {num_blocks} blocks']}")
    return table


def against_optimum(seeds: int, beside: float) -> dict[str, dict[str, float]]:
    """Shares of the optimum; the servers can hold the model at least once.

    Ours also where no server has memory for other blocks beside its own, and where all have.
    """
    table = {}
    for count, num_blocks in SMALL:
        rows = []
        for seed in range(seeds):
            rng = np.random.default_rng(seed)
            servers = random_servers(rng, count, num_blocks)
            if sum(one.size for one in servers) < num_blocks * 1.2:
                continue
            best = optimum(servers, num_blocks)
            found = arranged(servers, num_blocks, rng, beside)
            joined = ours_joined(servers, num_blocks)
            for name, part in (("ours, none beside", 0.0), ("ours, all beside", 1.0)):
                settled, _ = ours_settled(servers, joined, num_blocks, part)
                found[name] = carried(servers, settled, num_blocks)
            rows.append({name: value if "moves" in name else value / best for name, value in found.items()})
        least = {f"least {name}": round(min(row[name] for row in rows), 4) for name in OURS}
        table[f"{count} servers, {num_blocks} blocks"] = {**means(rows), **least, "swarms": len(rows)}
        _say(f"{count} servers, {num_blocks} blocks: {table[f'{count} servers, {num_blocks} blocks']}")
    return table


# Churn


@dataclass
class Life:
    """A server in a churning swarm. It serves `span` from `ready_at` on, and until then `before`, if any."""

    server: Server
    span: Span
    ready_at: float
    dies_at: float
    before: Span | None = None
    rests_until: float = 0.0
    wished_since: float | None = None

    def serves(self, now: float) -> Span | None:
        return self.span if now >= self.ready_at else self.before


@dataclass
class World:
    """Who is there, as it is (`alive`) and as everybody sees it (`listed`); and what has been counted."""

    num_blocks: int
    beside: float
    rng: np.random.Generator
    now: float = 0.0
    alive: dict[str, Life] = field(default_factory=dict)
    listed: dict[str, Life] = field(default_factory=dict)
    moves: int = 0

    def place(self, one: Server, span: Span, dies_at: float) -> None:
        life = Life(one, span, self.now + LOADING, dies_at)
        self.alive[one.name] = self.listed[one.name] = life

    def move(self, name: str, span: Span, *, keeps: bool) -> None:
        """`keeps`: what it serves is served while the other blocks load."""
        life = self.listed[name]
        if span == life.span or name not in self.alive:
            return
        self.moves += self.now > WARM_UP
        life.before = life.serves(self.now) if keeps else None
        life.span, life.ready_at = span, self.now + LOADING

    @property
    def servers(self) -> list[Server]:
        return [life.server for life in self.listed.values()]

    @property
    def places(self) -> Places:
        return {name: life.span for name, life in self.listed.items()}


class Ours:
    """Looks every few seconds; a move that fills no hole must have been worth it for a while."""

    def __init__(self) -> None:
        self._planned_for: list[Holder] = []
        self._moves: tuple[Move, ...] = ()

    def on_join(self, world: World, one: Server) -> Span:
        return choose(self._holders(world), world.num_blocks, holder(one, Span(0, one.size)))

    def on_look(self, world: World) -> None:
        holders = self._holders(world)
        if holders != self._planned_for:
            self._moves, self._planned_for = plan(holders, world.num_blocks), holders
        moves = self._moves
        for life in world.listed.values():
            if not any(move.peer == life.server.name for move in moves):
                life.wished_since = None
        for move in moves:
            life = world.listed[move.peer]
            since = life.wished_since = world.now if life.wished_since is None else life.wished_since
            calm = 0.0 if move.is_urgent else CALM[0] + (CALM[1] - CALM[0]) * turn(move.peer)
            keeps = serves_on(move.peer, world.beside)
            is_safe = may_leave(holders, move.peer, move.span if keeps or move.is_urgent else None)
            if world.now >= since + calm and is_safe:
                world.move(move.peer, move.span, keeps=keeps)
                life.rests_until, life.wished_since = world.now + REST, None

    def on_loss(self, world: World) -> None:
        """It is looked at anyway."""

    def _holders(self, world: World) -> list[Holder]:
        return [
            holder(
                life.server,
                life.span,
                serves=life.serves(world.now) == life.span,
                may_fill=True,
                may_improve=world.now >= life.rests_until,
                serves_on=serves_on(life.server.name, world.beside),
            )
            for life in world.listed.values()
        ]


class AsPetals:
    """Each server looks every two minutes on average, and stops serving while it loads other blocks."""

    def __init__(self, world: World):
        self._rule = Petals(world.num_blocks, world.rng)

    def on_join(self, world: World, one: Server) -> Span:
        return self._rule.join(world.servers, world.places, one)

    def on_look(self, world: World) -> None:
        for name, life in list(world.listed.items()):
            is_due = world.rng.random() < LOOK_PERIOD / PETALS_PERIOD and name in world.alive
            if not is_due or life.serves(world.now) is None:
                continue
            if self._rule.should_move(world.servers, world.places, life.server):
                span = self._rule.move(world.servers, world.places, life.server)
                world.move(name, span, keeps=False)

    def on_loss(self, world: World) -> None:
        """Each server finds out by itself."""


class AsParallax:
    """A scheduler that knows all: a newcomer begins at the lightest block; where no pipeline is left, all are
    allocated anew."""

    def __init__(self, world: World, *, by_programme: bool):
        self._rule = Parallax(world.num_blocks, by_programme=by_programme)

    def on_join(self, world: World, one: Server) -> Span:
        if self._rule.has_pipeline(world.places):
            return self._rule.join(world.servers, world.places, one)
        self._allocate(world, [*world.servers, one])
        return self._allocated.get(one.name, Span(0, one.size))

    def on_look(self, world: World) -> None:
        """Nothing happens in between."""

    def on_loss(self, world: World) -> None:
        if not self._rule.has_pipeline(world.places):
            self._allocate(world, world.servers)

    def _allocate(self, world: World, servers: Sequence[Server]) -> None:
        self._allocated = self._rule.allocate(servers)
        for name, span in self._allocated.items():
            if name in world.listed:
                world.move(name, span, keeps=False)


POLICIES: dict[str, Callable[[World], Any]] = {
    "ours": lambda world: Ours(),
    "petals": AsPetals,
    "parallax, greedy": lambda world: AsParallax(world, by_programme=False),
    "parallax, programme": lambda world: AsParallax(world, by_programme=True),
    "nobody moves": lambda world: Still(),
}


class Still(Ours):
    """Newcomers choose as ours do, and stay."""

    def on_look(self, world: World) -> None:
        """They stay."""


def visits(
    rng: np.random.Generator, count: int, num_blocks: int, seconds: float
) -> Iterator[tuple[float, Server, float]]:
    """When servers come, about `count` at a time, and when they go again."""
    mu = np.log(MEAN_STAY) - SPREAD**2 / 2
    for number, one in enumerate(random_servers(rng, count, num_blocks)):
        yield 10.0 * number, one, 10.0 * number + float(np.exp(rng.normal(mu, SPREAD)))
    at, number = 0.0, count
    while (at := at + float(rng.exponential(MEAN_STAY / count))) < seconds:
        (one,) = random_servers(rng, 1, num_blocks, number)
        number += 1
        yield at, one, at + float(np.exp(rng.normal(mu, SPREAD)))


def churned(
    policy_of: Callable[[World], Any], count: int, num_blocks: int, seed: int, seconds: float, beside: float
) -> dict[str, float]:
    """Shares of the time after the warm-up, and moves by server and hour."""
    rng = np.random.default_rng(seed)
    events: list[tuple[float, int, str, Any]] = []
    for number, (at, one, until) in enumerate(visits(rng, count, num_blocks, seconds)):
        heapq.heappush(events, (at, number, "join", (one, until)))
    world = World(num_blocks, beside, rng)
    policy = policy_of(world)
    number, tallies = len(events), defaultdict(float)
    known: tuple[Any, float] = (None, 0.0)
    for now in np.arange(0.0, seconds, LOOK_PERIOD).tolist():
        while events and events[0][0] <= now:
            world.now, _, kind, what = heapq.heappop(events)
            number += 1
            if kind == "join":
                one, until = what
                world.place(one, policy.on_join(world, one), until)
                heapq.heappush(events, (until, number, "die", one.name))
            elif kind == "die":
                world.alive.pop(what, None)
                heapq.heappush(events, (world.now + NOTICED, number, "noticed", what))
            else:
                world.listed.pop(what, None)
                policy.on_loss(world)
        world.now = now
        policy.on_look(world)
        if now >= WARM_UP and world.alive:
            serving = {name: span for name, life in world.alive.items() if (span := life.serves(now))}
            key = tuple(sorted(serving.items()))
            if key != known[0]:
                servers = [life.server for life in world.alive.values()]
                bound = sum(one.strength for one in servers) / num_blocks
                is_whole = bool(layout_of(servers, serving, num_blocks).held.all())
                known = key, carried(servers, serving, num_blocks) / bound if is_whole else 0.0
            tallies["carried"] += known[1]
            tallies["uncovered"] += known[1] == 0.0
            tallies["server hours"] += len(world.alive) * LOOK_PERIOD / 3600
            tallies["looks"] += 1
    return {
        "carried": tallies["carried"] / tallies["looks"],
        "uncovered": tallies["uncovered"] / tallies["looks"],
        "moves a server and hour": world.moves / tallies["server hours"],
    }


def churning(seeds: int, hours: float, beside: float) -> dict[str, dict[str, dict[str, float]]]:
    table: dict[str, dict[str, dict[str, float]]] = {}
    for count, num_blocks in CHURNING:
        of_swarm = table[f"{count} servers, {num_blocks} blocks"] = {}
        for name, policy in POLICIES.items():
            runs = [
                churned(policy, count, num_blocks, seed, WARM_UP + 3600 * hours, beside)
                for seed in range(seeds)
            ]
            of_swarm[name] = means(runs)
            _say(f"{count} servers, {num_blocks} blocks, {name}: {of_swarm[name]}")
    return table


def means(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: round(fmean(row[name] for row in rows), 4) for name in rows[0]}


def as_table(rows: dict[str, dict[str, float]]) -> str:
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [["", *names], ["---"] * (len(names) + 1)]
    lines += [[title, *(f"{row.get(name, 0.0):.3g}" for name in names)] for title, row in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="swarms of each kind; default: %(default)s")
    parser.add_argument("--small", type=int, help="of those with an optimum; default: 4 times that")
    parser.add_argument("--hours", type=float, default=3.0, help="of churn; default: %(default)s")
    parser.add_argument("--beside", type=float, default=0.5, help="part of our servers; default: %(default)s")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    found = {
        "arranging": arranging(args.seeds, args.beside),
        "against the optimum": against_optimum(args.small or 4 * args.seeds, args.beside),
        "churn": churning(args.seeds, args.hours, args.beside),
    }
    print("Shares of what the servers could carry at most\n\n" + as_table(found["arranging"]))
    print("\nShares of the optimum\n\n" + as_table(found["against the optimum"]))
    for title, rows in found["churn"].items():
        print(f"\nChurn, {title}\n\n{as_table(rows)}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
