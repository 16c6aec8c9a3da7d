"""How long finding a route takes, in swarms of several shapes.

    python -m benchmarks.routes [--servers 2000] [--blocks 126] [--rounds 30] [--json FILE]

Nothing is served: servers are announcements. "Known" is a search among announcements that were searched
before, as a client does it between two readings of the DHT; "new" is the first one after a reading; "shared"
is "known" where no peer may run as many blocks as one does on the fastest route. All are measured in wall
time and in processor time, which other processes on the machine disturb less.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import json
import platform
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from swarm.client.costs import Costs, Demand
from swarm.client.graph import View
from swarm.client.privacy import NO_LIMITS, Limits
from swarm.client.route import Route, find_route
from swarm.dht.announcement import MAX_NEIGHBOURS, Announcement, Throughput
from swarm.net.transport import PeerId
from swarm.spans import Span

DEMAND = Demand(prompt_tokens=512, new_tokens=128, token_bytes=16_384)
DISTANCE = 0.15
"""Seconds of a round trip across the whole map on which servers and client lie."""


@dataclass(frozen=True)
class Shape:
    """A kind of swarm: how many blocks a server holds at least and at most, and distances it announces."""

    name: str
    least: int
    most: int
    neighbours: int
    is_map: bool = True
    """Whether distances are those of places on a map; otherwise each is drawn for itself."""


SHAPES = (
    Shape("no edges between servers", 4, 16, 0),
    Shape("8 edges a server", 4, 16, 8),
    Shape("64 edges a server", 4, 16, MAX_NEIGHBOURS),
    Shape("64 edges, distances at random", 4, 16, MAX_NEIGHBOURS, is_map=False),
    Shape("64 edges, small spans", 1, 4, MAX_NEIGHBOURS),
    Shape("64 edges, large spans", 30, 60, MAX_NEIGHBOURS),
)


@dataclass(frozen=True)
class Town:
    """A swarm of some shape: what is announced, and what the client has measured."""

    announcements: Sequence[Announcement]
    costs: Costs
    span: Span

    def route(self, view: View | None = None, limits: Limits = NO_LIMITS) -> Route:
        return find_route(
            view or self.announcements, self.span, costs=self.costs, demand=DEMAND, limits=limits
        )


def town(shape: Shape, servers: int, blocks: int, seed: int) -> Town:
    rng = random.Random(seed)
    spans = [random_span(rng, shape, blocks) for _ in range(servers)]
    places = [(rng.random(), rng.random()) for _ in range(servers + 1)]
    names = [PeerId(f"peer-{index:05}") for index in range(servers)]
    holders: list[list[int]] = [[] for _ in range(blocks + 1)]
    for index, span in enumerate(spans):
        for block in span.blocks:
            holders[block].append(index)

    def rtt(one: int, other: int) -> float:
        if not shape.is_map:
            return rng.uniform(0.002, 2 * DISTANCE)
        (x, y), (u, v) = places[one], places[other]
        return 0.001 + DISTANCE * ((x - u) ** 2 + (y - v) ** 2) ** 0.5 * rng.uniform(1, 1.3)

    announcements = [
        Announcement(
            peer=names[index],
            model_id="m",
            start=span.start,
            end=span.end,
            state="serving",
            kv_tokens_left=100_000,
            queue=rng.choice([0, 0, 0, 1, 3]),
            throughput=Throughput(decode=rng.uniform(50, 500), prefill=rng.uniform(500, 5000)),
            rtts={
                names[near]: rtt(index, near)
                for near in holders[span.end][: shape.neighbours]
                if near != index
            },
        )
        for index, span in enumerate(spans)
    ]
    distances = {names[index]: rtt(index, servers) for index in range(servers)}
    return Town(announcements, Costs(rtt=distances.get), Span(0, blocks))


def random_span(rng: random.Random, shape: Shape, blocks: int) -> Span:
    size = min(rng.randint(shape.least, shape.most), blocks)
    start = min(max(rng.randrange(-size, blocks), 0), blocks - size)
    return Span(start, start + size)


def timed(work: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Milliseconds of `work`: medians and minima over the rounds, of the clock and of the processor."""
    wall, processor = [], []
    for _ in range(rounds):
        begun, busy = time.perf_counter(), time.process_time()
        work()
        wall.append((time.perf_counter() - begun) * 1000)
        processor.append((time.process_time() - busy) * 1000)
    return {
        "wall_ms": median(wall),
        "least_wall_ms": min(wall),
        "processor_ms": median(processor),
        "least_processor_ms": min(processor),
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    rows = []
    for shape in SHAPES:
        built = town(shape, args.servers, args.blocks, args.seed)
        view = View.of(built.announcements)
        route = built.route(view)
        limits = Limits(most=max(1, max(hop.span.size for hop in route.hops) - 1))
        rows.append(
            {
                "shape": shape.name,
                "edges": sum(len(one.rtts) for one in built.announcements),
                "hops": len(route.hops),
                "known": timed(lambda built=built, view=view: built.route(view), args.rounds),
                "new": timed(built.route, args.rounds),
                "shared": timed(
                    lambda built=built, view=view, limits=limits: built.route(view, limits), args.rounds
                ),
            }
        )
    return {
        "servers": args.servers,
        "blocks": args.blocks,
        "rounds": args.rounds,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, numpy {np.__version__}",
        "load": os.getloadavg()[0],
        "shapes": rows,
    }


def show(result: dict[str, Any]) -> None:
    title = (
        f"{result['servers']} servers, {result['blocks']} blocks: milliseconds to find a route,"
        f" medians of {result['rounds']} (least)"
    )
    table = Table(title=title)
    for column in ("", "edges", "hops", "known", "its CPU", "new", "its CPU", "shared", "its CPU"):
        table.add_column(column, justify="right" if column else "left")
    for row in result["shapes"]:
        times = [
            f"{row[kind][clock]:.1f} ({row[kind][f'least_{clock}']:.1f})"
            for kind in ("known", "new", "shared")
            for clock in ("wall_ms", "processor_ms")
        ]
        table.add_row(row["shape"], str(row["edges"]), str(row["hops"]), *times)
    Console().print(table)
    print(
        f"{result['machine']}; load {result['load']:.1f} at the end: above the cores, times are of the load."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--servers", type=int, default=2000)
    parser.add_argument("--blocks", type=int, default=126)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    result = measure(args)
    show(result)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
