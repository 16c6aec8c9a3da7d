"""The parts of `benchmarks.simulate`, each some rows of figures: one row a swarm."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import fmean, median
from time import process_time
from typing import Any, TypeAlias

import numpy as np

from benchmarks import simulated_dht
from benchmarks.allocators import Server
from benchmarks.allocators import optimum as best_placement
from benchmarks.crowd import Crowd, serves_on
from benchmarks.population import members
from benchmarks.simulated_traffic import routing, town, traffic
from benchmarks.whole_swarm import Answers, Records, WholeSwarm, whole_swarm
from swarm.net.virtual_time import run
from swarm.server.capacity import Layout
from swarm.server.placement import Holder, choose, plan
from swarm.spans import Span

Row: TypeAlias = dict[str, Any]

LOADS = (0.1, 0.3, 0.5, 0.7, 0.9)
SMALL = ((5, 8), (6, 10), (8, 12))
"""Servers and blocks of swarms of which the best placement is computed."""

ENOUGH = 1.2
"""How many times the model's blocks all servers of such a swarm can hold at least."""

DHT_BLOCKS = 30
"""The blocks of the model that the DHT is measured with: its calls grow with them."""

WHOLE_MOST, DHT_MOST = 100, 10
"""Servers up to which the whole stack is simulated, and up to which its records lie in the real DHT."""

DHT_SHARE = 0.06
"""The part of that time which is simulated with the real DHT, where it takes that much longer."""

SETTLED = 150.0
"""Seconds after which a swarm that nobody leaves has arranged itself."""

TALK_PERIOD = 15.0
"""Seconds between two sessions while servers come and go."""


@dataclass(frozen=True)
class Scale:
    """How much is simulated: `small` swarms of each size, and so many `hours` of others.

    Of the whole stack these are cut to `whole_minutes` of all servers.
    """

    servers: tuple[int, ...]
    hours: float
    seed: int
    small: int = 40
    whole_minutes: float = 400.0
    loads: tuple[float, ...] = LOADS


def blocks_of(servers: int) -> int:
    """A larger swarm runs a deeper model."""
    for most, blocks in ((10, 30), (100, 60)):
        if servers <= most:
            return blocks
    return 126


def optimum(scale: Scale) -> Iterator[Row]:
    """What our placement carries as a part of what the best carries, of `small` random swarms a size."""
    for count, num_blocks in SMALL:
        found, seed = [], scale.seed
        while len(found) < scale.small:
            seed += 1
            some = members(np.random.default_rng(seed), count, num_blocks, 0.0, churns=False)
            sizes = [one.size for one in some]
            if sum(sizes) < ENOUGH * num_blocks:
                continue
            holders: list[Holder] = []
            for one in some:
                mine = Holder(
                    one.name,
                    Span(0, one.size),
                    one.strength,
                    may_fill=True,
                    may_improve=True,
                    serves_on=serves_on(one.name),
                )
                holders.append(replace(mine, span=choose(holders, num_blocks, mine)))
            best = best_placement([Server(one.name, one.size, one.strength) for one in some], num_blocks)
            joined, moved = carried(holders, num_blocks), 0
            while moves := plan(holders, num_blocks):
                to = {move.peer: move.span for move in moves}
                holders = [replace(one, span=to.get(one.peer, one.span)) for one in holders]
                moved += len(moves)
            found.append((joined / best, carried(holders, num_blocks) / best, moved / count))
        joined_shares, shares, moves_each = zip(*found, strict=True)
        yield {
            "servers": count,
            "blocks": num_blocks,
            "swarms": len(found),
            "joined": fmean(joined_shares),
            "settled": fmean(shares),
            "settled_median": median(shares),
            "settled_least": min(shares),
            "shares": [round(share, 4) for share in shares],
            "moves_a_server": fmean(moves_each),
        }


def carried(holders: list[Holder], num_blocks: int) -> float:
    """Tokens a second; 0 where blocks are missing."""
    starts, ends = np.array([one.span for one in holders], np.int64).T
    return Layout(num_blocks, starts, ends, np.array([one.strength for one in holders])).tight().throughput


def whole(scale: Scale) -> Iterator[Row]:
    """Each size once under load without churn, and once with churn and a talk now and then."""
    for count in scale.servers:
        if count <= WHOLE_MOST:
            yield _whole(scale, count, "table")
        if count <= DHT_MOST:
            yield _whole(scale, count, "dht")


def _whole(scale: Scale, count: int, records: Records) -> Row:
    began, num_blocks = process_time(), blocks_of(count)
    longest = scale.whole_minutes if records == "table" else DHT_SHARE * scale.whole_minutes
    minutes = min(60 * scale.hours, longest / count)
    row: Row = {"servers": count, "blocks": num_blocks, "records": records, "minutes": minutes}
    row["loads"] = []

    async def under_load() -> None:
        some = members(np.random.default_rng(scale.seed), count, num_blocks, 0.0, churns=False)
        async with whole_swarm(some, num_blocks, scale.seed, records) as swarm:
            await asyncio.sleep(SETTLED)
            row["covered_s"] = swarm.coverage.covered_at
            loads = scale.loads if count <= DHT_MOST else scale.loads[::2]
            if swarm.coverage.covered_at is not None:
                row["loads"] = [await swarm.loaded(load) for load in loads]

    async def in_churn() -> None:
        some = members(np.random.default_rng(scale.seed), count, num_blocks, 60 * minutes)
        async with whole_swarm(some, num_blocks, scale.seed, records) as swarm:
            row.update(await _watched(swarm, 60 * minutes))

    if records == "table":
        run(under_load())
    run(in_churn())
    return row | {"processor_s": process_time() - began}


async def _watched(swarm: WholeSwarm, seconds: float) -> Row:
    loop, answers = asyncio.get_running_loop(), Answers()
    async with asyncio.TaskGroup() as tasks:
        while loop.time() < seconds:
            await asyncio.sleep(TALK_PERIOD)
            if swarm.coverage.covered_at is not None:
                client = swarm.clients[int(loop.time()) % len(swarm.clients)]
                tasks.create_task(swarm.talk(client, answers))
    coverage = swarm.coverage
    coverage.count()
    since = loop.time() - (coverage.covered_at or loop.time())
    return {
        "churn_covered_s": coverage.covered_at,
        "open": coverage.open / since if since else None,
        "unavoidable": coverage.unavoidable / since if since else None,
        "moves": coverage.moves,
        "server_hours": coverage.server_hours,
        "moves_a_server_hour": coverage.moves / coverage.server_hours,
        "talks": answers.done,
        "talks_failed": dict(answers.failed),
        "recoveries": answers.recoveries,
        "calls_a_server_second": swarm.post.calls.total() / (3600 * coverage.server_hours),
        "bytes_a_server_second": swarm.post.bytes / (3600 * coverage.server_hours),
    }


def crowd(scale: Scale) -> Iterator[Row]:
    for count in scale.servers:
        began, num_blocks = process_time(), blocks_of(count)
        seconds = int(3600 * scale.hours)
        some = members(np.random.default_rng(scale.seed), count, num_blocks, seconds)
        simulated = Crowd(some, num_blocks, scale.seed)
        seen = simulated.run(seconds)
        settled = town(simulated.whole, num_blocks, scale.seed) if simulated.whole else None
        yield {
            "servers": count,
            "blocks": num_blocks,
            "seconds": seconds,
            "there": fmean(seen.servers) if seen.servers else 0.0,
            "covered_s": seen.covered_at,
            "open": seen.open / max(seen.seconds, 1),
            "unavoidable": seen.unavoidable / max(seen.seconds, 1),
            "moves_a_server_hour": seen.moves / seen.server_hours,
            "urgent": seen.urgent,
            "moves": seen.moves,
            "carried": fmean(seen.carried) if seen.carried else 0.0,
            "placing_ms": median(seen.placing),
            "planning_ms": median(seen.planning),
            "routing": routing(settled) if settled else None,
            "loads": [row for load in scale.loads if settled and (row := traffic(settled, load, scale.seed))],
            "processor_s": process_time() - began,
        }


def dht(scale: Scale) -> Iterator[Row]:
    for count in scale.servers:
        yield simulated_dht.measure(count, DHT_BLOCKS, scale.seed)
