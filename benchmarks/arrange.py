"""Servers that arrange themselves: they join in random order, a third of them is killed, and a chat goes on.

    python -m benchmarks.arrange [--servers 12] [--seed N] [--model smollm2-135m] [--json FILE]

Each server serves a number of blocks of its own, chosen by itself (`--num-blocks`), as a process of its own
on loopback; they start in random order, as many at a time as there are cores. Once all of them serve, a
client asks the same again and again, greedily. Then a third of the servers is killed with SIGKILL, their
libp2p daemons too: drawn at random, but such that the others can hold all blocks, and have to move for that
if there are any whose loss leaves a hole. What is served is what servers say of themselves while they run.
Prints how long it took until all blocks were served, at first and again, who moved, and how the chat fared;
exit code 1 if it took longer than the aims, or an answer failed or differed.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import uvloop

import swarm
from benchmarks.servers import LOOPBACK, STARTING, kill
from swarm.blocks.models import Model, resolve
from swarm.client.facade import Swarm
from swarm.errors import SwarmError
from swarm.processes import Event, Launcher, ServerProcess, stop_all
from swarm.spans import Span

AIMS = {"covered_s": 30.0, "covered_again_s": 60.0}
PATIENCE = 180.0
"""Seconds to wait for all blocks to be served, and for an answer."""

COMMON = (
    f"--kv-tokens 4096 --threads 1 --device cpu --host-maddrs {LOOPBACK} --no-remembered-peers"
    " --exit-with-stdin"
).split()

DRAWS = 200
"""How often those to kill are drawn, to find some that leave a hole which the others can fill."""

STARTING_UP = ("listening", "joining", "serving")
PROMPT = "Tell me a story about a lighthouse."


@dataclass(frozen=True)
class Plan:
    """`sizes` are how many blocks each server serves. Times in seconds."""

    model: str
    sizes: tuple[int, ...]
    seed: int = 0
    dtype: str = "float16"
    killed: int = 0
    tokens: int = 48
    before: float = 5.0


class Arranged:
    """A server that chooses its blocks. `serves` are those that it serves now, as it says itself."""

    def __init__(
        self, name: str, plan: Plan, size: int, log: Path, news: asyncio.Event, launcher: Launcher | None
    ):
        """`news` is set whenever something has changed."""
        self.size = size
        self._news = news
        self.serves: Span | None = None
        self.moves: list[tuple[Span, Span]] = []
        self.times: dict[str, float] = {}
        """When each kind of event came first."""
        options = f"--model {plan.model} --dtype {plan.dtype} --num-blocks {size} --public-name {name}"
        self.process = ServerProcess(
            [*options.split(), *COMMON], name=name, log=log, on_event=self._on_event, launcher=launcher
        )

    def kill(self) -> None:
        self.serves = None
        kill(self.process)

    def _on_event(self, event: Event) -> None:
        self.times.setdefault(event["event"], time.monotonic())
        match event["event"]:
            case "serving":
                self.serves = Span(*event["blocks"])
            case "draining" | "left":
                self.serves = None
            case "moving":
                self.moves.append((Span(*event["blocks"]), Span(*event["to"])))
        self._news.set()


@dataclass
class Chatter:
    """Asks one thing again and again, and must get one answer."""

    client: Swarm
    tokens: int
    expected: tuple[int, ...] = ()
    answers: int = 0
    turn: asyncio.Event = field(default_factory=asyncio.Event)
    broken: list[str] = field(default_factory=list)
    moments: list[float] = field(default_factory=list)

    async def ask(self) -> tuple[int, ...]:
        async with asyncio.timeout(PATIENCE):
            answer = self.client.stream(PROMPT, max_new_tokens=self.tokens, temperature=0, ignore_eos=True)
            async for _ in answer:
                self.moments.append(time.monotonic())
            return (await answer.result()).token_ids

    async def talk(self) -> None:
        """Until cancelled."""
        while True:
            try:
                found = await self.ask()
                if found != self.expected:
                    self.broken.append(f"another answer: {found}")
            except (SwarmError, TimeoutError) as error:
                self.broken.append(repr(error))
            self.answers += 1
            self.turn.set()

    async def wait_answers(self, count: int) -> None:
        """Return after `count` more ends of answers."""
        until = self.answers + count
        while self.answers < until:
            self.turn.clear()
            await self.turn.wait()

    def longest_pause(self) -> float:
        waits = zip(self.moments, self.moments[1:], strict=False)
        return max((end - start for start, end in waits), default=0.0)


async def run(plan: Plan, logs: Path, launcher: Launcher | None = None) -> dict[str, Any]:
    """What was seen; `broken` is what must not have happened."""
    model = await asyncio.to_thread(resolve, plan.model)
    rng = random.Random(plan.seed)
    sizes = list(plan.sizes)
    rng.shuffle(sizes)
    news = asyncio.Event()
    servers = [
        Arranged(f"server-{number}", plan, size, logs / f"server-{number}.log", news, launcher)
        for number, size in enumerate(sizes)
    ]
    started = time.monotonic()
    async with joining(servers) as addresses:
        await until_covered(servers, model, news)
        covered_at = time.monotonic()
        covered = covered_at - started
        _say(f"all blocks are served after {covered:.1f} s: {spans_of(servers)}")
        for server in servers:
            await server.process.wait_for("serving", STARTING)
        _say(f"all servers serve after {time.monotonic() - started:.1f} s: {spans_of(servers)}")
        async with swarm.connect(addresses, plan.model, dtype=plan.dtype, timeout=PATIENCE) as client:
            chatter = Chatter(client, plan.tokens)
            chatter.expected = await chatter.ask()
            talking = asyncio.create_task(chatter.talk(), name="chat")
            await asyncio.sleep(plan.before)
            doomed = to_kill(servers, plan.killed, model, rng)
            for server in doomed:
                server.kill()
            killed_at = time.monotonic()
            hole = sorted(missing(servers, model))
            _say(f"killed {[server.process.name for server in doomed]}, which leaves {hole} uncovered")
            await until_covered(servers, model, news)
            covered_again = time.monotonic() - killed_at
            _say(f"all blocks are served again after {covered_again:.1f} s: {spans_of(servers)}")
            await chatter.wait_answers(2)
            talking.cancel()
            await asyncio.gather(talking, return_exceptions=True)
        starts = [
            [round(at - started, 1) for name, at in server.times.items() if name in STARTING_UP]
            for server in servers
        ]
        last_joined_at = max(server.times["listening"] for server in servers)
        moves = [(server.process.name, *move) for server in servers for move in server.moves]
    return {
        **asdict(plan),
        "covered_s": covered,
        "covered_since_last_joined_s": max(covered_at - last_joined_at, 0.0),
        "listening_joining_serving_s": starts,
        "hole": hole,
        "covered_again_s": covered_again,
        "moves": [f"{name}: {before} to {after}" for name, before, after in moves],
        "answers": chatter.answers,
        "longest_pause_s": chatter.longest_pause(),
        "broken": chatter.broken,
    }


@asynccontextmanager
async def joining(servers: Sequence[Arranged]) -> AsyncIterator[list[str]]:
    """Servers that start by the first one, as many at a time as there are cores; the addresses to join by."""
    turn = asyncio.Semaphore(os.cpu_count() or 1)

    async def join(server: Arranged, peers: Sequence[str]) -> None:
        async with turn:
            if peers:
                await server.process.start(["--initial-peers", *peers])
            await server.process.wait_for("serving", STARTING)

    try:
        first, *others = servers
        await first.process.start()
        addresses = (await first.process.wait_for("listening", STARTING))["addresses"]
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(join(first, ()))
            for server in others:
                tasks.create_task(join(server, addresses))
            yield addresses
    finally:
        await stop_all(server.process for server in servers)


def to_kill(servers: Sequence[Arranged], count: int, model: Model, rng: random.Random) -> list[Arranged]:
    """So many at random, but not the first, by whom the swarm was joined."""
    draws = [rng.sample(servers[1:], count) for _ in range(DRAWS)]
    rests = [[server for server in servers if server not in doomed] for doomed in draws]
    can_hold_all = [sum(server.size for server in rest) >= model.num_blocks for rest in rests]
    leaves_hole = [bool(missing(rest, model)) for rest in rests]
    return max(zip(can_hold_all, leaves_hole, range(DRAWS), draws, strict=True))[-1]


def missing(servers: Sequence[Arranged], model: Model) -> set[int]:
    held = {block for server in servers if server.serves for block in server.serves.blocks}
    return set(range(model.num_blocks)) - held


async def until_covered(servers: Sequence[Arranged], model: Model, news: asyncio.Event) -> None:
    async with asyncio.timeout(PATIENCE):
        while missing(servers, model):
            news.clear()
            await news.wait()


def spans_of(servers: Sequence[Arranged]) -> str:
    return ", ".join(str(server.serves or "-") for server in servers)


def uneven(count: int, num_blocks: int, rng: random.Random) -> tuple[int, ...]:
    """Sizes from a tenth of the model to two fifths, together at least two and a half times the model."""
    while True:
        sizes = tuple(round(num_blocks * rng.uniform(0.1, 0.4)) for _ in range(count))
        if sum(sizes) >= 2.5 * num_blocks:
            return sizes


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--servers", type=int, default=12)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="default: a random one")
    parser.add_argument("--json", type=Path, help="also write what was seen here")
    parser.add_argument("--logs", type=Path, default=Path("build/arrange"), help="folder for the logs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.logs.mkdir(parents=True, exist_ok=True)
    num_blocks = resolve(args.model).num_blocks
    plan = Plan(
        model=args.model,
        sizes=uneven(args.servers, num_blocks, random.Random(args.seed)),
        seed=args.seed,
        killed=args.servers // 3,
    )
    found = uvloop.run(run(plan, args.logs))
    text = json.dumps(found, indent=1)
    print(text)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(text + "\n")
    is_late = any(found[name] > aim for name, aim in AIMS.items())
    return 1 if found["broken"] or is_late else 0


if __name__ == "__main__":
    sys.exit(main())
