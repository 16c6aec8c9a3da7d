"""Hours of life in minutes: random sessions against three servers, and what must hold all the while.

    python -m benchmarks.soak [--minutes 30] [--seed N] [--json FILE]

Guests ask, converse, roll back, stop and leave, an intruder does what it should not, and the pool is small,
so that it is full now and then. Every answer must be that of the unsplit model in float32, to the token; each
refusal must be the right one; whenever all have left, every page must be free again; and the memory of the
servers must not grow. Ends with a summary in JSON, and exit code 1 if a rule was broken.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import asyncio
import json
import random
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import uvloop
from transformers import AutoTokenizer

import swarm
from benchmarks.guests import Guest, Intruder, Tally
from benchmarks.passages import Passage, draw_passages
from benchmarks.reference import Reference
from benchmarks.servers import Servers, even_spans, serving
from benchmarks.watch import FREE_TOKENS, Memory, growth, losses, memory_of, metrics_of
from swarm.blocks.models import Model, resolve
from swarm.processes import Launcher

SERVERS = 3
PATIENCE = 60.0
"""Seconds that a guest waits for room."""

SAMPLE_PERIOD = 2.0
WARM_UP = 1 / 6
"""The part of the time before memory is judged."""


@dataclass(frozen=True)
class Soak:
    """How long and how hard. Times in seconds; `growth` is the fraction by which memory may grow."""

    seconds: float = 1800.0
    seed: int = 0
    model: str = "smollm2-135m"
    guests: int = 4
    kv_tokens: int = 2048
    passages: int = 24
    answer_tokens: int = 48
    quiet_period: float = 60.0
    growth: float = 0.02


class Gate:
    """Lets visitors in while it is open; `emptied` closes it and waits until the last one is out."""

    def __init__(self) -> None:
        self._may_enter = asyncio.Event()
        self._may_enter.set()
        self._is_empty = asyncio.Event()
        self._is_empty.set()
        self._inside = 0

    @asynccontextmanager
    async def visit(self) -> AsyncIterator[None]:
        await self._may_enter.wait()
        self._inside += 1
        self._is_empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._is_empty.set()

    @asynccontextmanager
    async def emptied(self) -> AsyncIterator[None]:
        self._may_enter.clear()
        try:
            await self._is_empty.wait()
            yield
        finally:
            self._may_enter.set()


@dataclass
class Watch:
    """What was seen of the servers: memory all the time, losses at quiet moments."""

    servers: Servers
    room: list[float]
    memory: dict[str, list[Memory]] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    quiet_moments: int = 0

    async def sample(self) -> None:
        while True:
            for server in self.servers.processes:
                sample = await asyncio.to_thread(memory_of, server)
                self.memory.setdefault(server.name, []).append(sample)
            await asyncio.sleep(SAMPLE_PERIOD)

    async def look_for_losses(self) -> None:
        """To be called when nobody visits."""
        self.quiet_moments += 1
        for server, room in zip(self.servers.processes, self.room, strict=True):
            self.lost += await losses(server, room)


async def run(soak: Soak, logs: Path, launcher: Launcher | None = None) -> dict[str, Any]:
    """The summary of a whole run, with the rules that were `broken`; servers log to the folder `logs`."""
    model = await asyncio.to_thread(resolve, soak.model)
    passages = await asyncio.to_thread(_passages, model, soak)
    _say(f"{len(passages)} passages, seed {soak.seed}")
    options = ["--kv-tokens", str(soak.kv_tokens), "--metrics-port", "0"]
    spans = even_spans(model.num_blocks, SERVERS)
    async with serving(model.name, "float32", spans, logs, *options, launcher=launcher) as servers:
        said = [await asyncio.to_thread(metrics_of, server) for server in servers.processes]
        watch, tally = Watch(servers, [one[FREE_TOKENS] for one in said]), Tally()
        await _visit(model, passages, soak, watch, tally)
        refusals = [_refusals(await asyncio.to_thread(metrics_of, server)) for server in servers.processes]
    return _summary(soak, watch, tally, refusals)


async def _visit(model: Model, passages: list[Passage], soak: Soak, watch: Watch, tally: Tally) -> None:
    """Let everybody come and go for the time given, with quiet moments in between."""
    addresses, gate = watch.servers.addresses, Gate()
    until = asyncio.get_running_loop().time() + soak.seconds
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(
                swarm.connect(addresses, model.name, dtype="float32", timeout=PATIENCE)
            )
            for _ in range(soak.guests)
        ]
        visitors: list[Guest | Intruder] = [
            Guest(f"guest {number}", client, passages, tally, str(soak.seed))
            for number, client in enumerate(clients)
        ]
        visitors.append(
            Intruder(
                addresses,
                model.hidden_size,
                int(min(watch.room)),
                lambda: clients[0].directory.announcements,
                tally,
                str(soak.seed),
            )
        )
        async with asyncio.TaskGroup() as tasks:
            sampling = tasks.create_task(watch.sample(), name="sample memory")
            lives = [
                tasks.create_task(_live(visitor.act, gate, random.Random(f"{soak.seed} {number}"), until))
                for number, visitor in enumerate(visitors)
            ]
            while not all(life.done() for life in lives):
                await asyncio.wait(lives, timeout=soak.quiet_period)
                async with gate.emptied():
                    await watch.look_for_losses()
                _say(f"{dict(tally.counts)}, lost: {watch.lost}")
            sampling.cancel()


async def _live(act: Callable[[], Awaitable[None]], gate: Gate, rng: random.Random, until: float) -> None:
    """Visit again and again until the loop's time `until`, most often soon, sometimes after a long while."""
    loop = asyncio.get_running_loop()
    while loop.time() < until:
        async with gate.visit():
            if loop.time() < until:
                await act()
        await asyncio.sleep(rng.choice((0.0, 0.0, 0.2, 1.0, 5.0)))


def _passages(model: Model, soak: Soak) -> list[Passage]:
    text = (Path(__file__).parent.parent / "LICENSE").read_text()
    ids = AutoTokenizer.from_pretrained(model.path)(text).input_ids
    rng = random.Random(f"{soak.seed} passages")
    return draw_passages(Reference(model), ids, rng, soak.passages, soak.answer_tokens)


def _refusals(said: dict[str, float]) -> dict[str, float]:
    """What a server counted as refused, what it never refused left out."""
    return {name: count for name, count in said.items() if name.startswith("swarm_refusals_total") and count}


def _summary(soak: Soak, watch: Watch, tally: Tally, refusals: list[dict[str, float]]) -> dict[str, Any]:
    memory = {}
    for name, samples in watch.memory.items():
        judged = [sample for sample in samples if sample.at >= samples[0].at + soak.seconds * WARM_UP]
        memory[name] = {kind: growth(judged, kind) for kind in ("rss", "pss", "daemon_rss")}
    return {
        "seed": soak.seed,
        "seconds": soak.seconds,
        "counts": dict(sorted(tally.counts.items())),
        "quiet_moments": watch.quiet_moments,
        "memory": memory,
        "refusals": refusals,
        "broken": [*tally.faults, *watch.lost, *_grown(memory, soak.growth)],
    }


def _grown(memory: dict[str, dict[str, dict[str, Any]]], allowed: float) -> list[str]:
    """Resident memory alone is judged: the proportional one changes with what other processes share."""
    return [
        f"{kind} of {name} grew: {figure} {sizes[figure]:.1%} of {sizes['mean_mib']:.0f} MiB"
        for name, kinds in memory.items()
        for kind, sizes in kinds.items()
        for figure in ("fitted", "highest")
        if kind == "rss" and sizes[figure] > allowed
    ]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="default: a random one")
    parser.add_argument("--guests", type=int, default=Soak.guests, help="well-behaved clients")
    parser.add_argument("--kv-tokens", type=int, default=Soak.kv_tokens, help="room of each server")
    parser.add_argument("--passages", type=int, default=Soak.passages, help="prompts to choose from")
    parser.add_argument("--json", type=Path, help="also write the summary here")
    parser.add_argument("--logs", type=Path, default=Path("build/soak"), help="folder for the servers' logs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    soak = Soak(
        seconds=60 * args.minutes,
        seed=args.seed,
        guests=args.guests,
        kv_tokens=args.kv_tokens,
        passages=args.passages,
    )
    args.logs.mkdir(parents=True, exist_ok=True)
    summary = uvloop.run(run(soak, args.logs))
    text = json.dumps(summary, indent=1)
    print(text)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(text + "\n")
    return 1 if summary["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
