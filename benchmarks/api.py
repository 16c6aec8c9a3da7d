"""What the HTTP API costs: the same clients ask it and the library behind it, in turns.

    python -m benchmarks.api [--clients 1 4 16 32] [--rounds 3] [--dtype float16] [--json FILE]

Each of three servers has a third of the model and one thread. `serve` is a process of its own, which streams
over HTTP to as many connections as there are clients; the library is used by as many tasks in this process.
In a round each number of clients asks both, one after the other, every other round the other way about. Each
client asks some questions, one after the other. Tokens a second are those of all answers over the time from
the first question to the last token; times between tokens are those between pieces of text as they come.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import asyncio
import json
import platform
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any, TypeAlias

import torch
import uvloop
from rich.console import Console
from rich.table import Table

import swarm
from benchmarks.doors import Door, Library, Messages, Told, http_door
from benchmarks.processor_time import own_seconds, seconds_used
from benchmarks.servers import STARTING, Servers, even_spans, serving
from swarm.blocks.models import Model, resolve
from swarm.client.facade import Swarm
from swarm.processes import ServerProcess

SERVERS = 3
QUESTIONS = {1: 4, 4: 2}
"""Questions of each client, by how many clients there are; one where nothing is said."""

WORDS = 64
"""Words of a question, some 90 tokens."""

ROOM = 256
"""Tokens of KV memory that a question may need beyond its answer."""

AIM = 0.05
"""Share of the tokens a second that the API may cost."""

HTTP, LIBRARY = "HTTP", "library"

Used: TypeAlias = Callable[[], Counter[str]]
"""Processor seconds of a process so far, by part."""


@dataclass(frozen=True)
class Turn:
    """The answers of some clients by one door.

    `cpu_ms` is the processor time a token of the process that answers by it.
    """

    clients: int
    answers: list[Told]
    tokens: int
    cpu_ms: float

    @property
    def seconds(self) -> float:
        return max(one.moments[-1] for one in self.answers) - min(one.asked for one in self.answers)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def requests_per_s(self) -> float:
        return len(self.answers) / self.seconds


async def take_turn(doors: Sequence[Door], questions: Sequence[Messages], tokens: int, used: Used) -> Turn:
    """Let each door's client ask its share of the `questions`."""
    each = len(questions) // len(doors)
    before = used()

    async def ask(at: int, door: Door) -> list[Told]:
        return [await door.ask(one, tokens) for one in questions[at * each : (at + 1) * each]]

    told = await asyncio.gather(*(ask(at, door) for at, door in enumerate(doors)))
    spent = used().total() - before.total()
    answers = [one for some in told for one in some]
    written = tokens * len(answers)
    return Turn(len(doors), answers, written, 1000 * spent / written)


async def measure_clients(
    count: int, url: str, model: Model, api: ServerProcess, library: Swarm, args: argparse.Namespace
) -> dict[str, list[Turn]]:
    """Turns of so many clients by both doors."""
    turns: dict[str, list[Turn]] = {HTTP: [], LIBRARY: []}
    asked = questions(count * QUESTIONS.get(count, 1))

    async def take(door: str, tokens: int) -> Turn:
        if door == LIBRARY:
            return await take_turn([Library(library)] * count, asked, tokens, own_seconds)
        async with AsyncExitStack() as stack:
            doors = [await stack.enter_async_context(http_door(url, model.name)) for _ in range(count)]
            return await take_turn(doors, asked, tokens, lambda: seconds_used([api.pid]))

    for door in turns:
        await take(door, 2)
    for number in range(args.rounds):
        for door in (HTTP, LIBRARY) if number % 2 == 0 else (LIBRARY, HTTP):
            turns[door].append(await take(door, args.tokens))
            said = f"{count} clients, round {number + 1}, {door}"
            print(f"{said}: {turns[door][-1].tokens_per_s:.1f} tokens/s", file=sys.stderr)
    return turns


def questions(count: int) -> list[Messages]:
    """Different questions, each of `WORDS` words cut from one text."""
    words = (Path(__file__).parent.parent / "LICENSE").read_text().split()
    step = (len(words) - WORDS) // count
    cut = [" ".join(words[number * step : number * step + WORDS]) for number in range(count)]
    return [[{"role": "user", "content": f"Explain: {text}"}] for text in cut]


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    model = resolve(args.model)
    most = max(args.clients)
    options = ["--kv-tokens", str(most * (ROOM + args.tokens)), "--no-prefix-cache"]
    spans = even_spans(model.num_blocks, SERVERS)
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(folder)
        async with serving(model.name, args.dtype, spans, logs, *options) as servers:
            rows = await measure_api(model, servers, logs, args)
    return {
        "model": model.name,
        "dtype": args.dtype,
        "answer_tokens": args.tokens,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "rows": rows,
    }


async def measure_api(
    model: Model, servers: Servers, logs: Path, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row for each number of clients."""
    serve = ["serve", "--model", model.name, "--port", "0", "--initial-peers", *servers.addresses]
    async with (
        ServerProcess(serve, name="the API", log=logs / "api.log", module="swarm.client") as api,
        swarm.connect(servers.addresses, model.name) as library,
    ):
        url = (await api.wait_for("listening", STARTING))["url"]
        return [row(await measure_clients(count, url, model, api, library, args)) for count in args.clients]


def row(turns: dict[str, list[Turn]]) -> dict[str, Any]:
    """Medians over the turns; times of all of them together, as percentiles in milliseconds."""
    pairs = list(zip(turns[HTTP], turns[LIBRARY], strict=True))
    answers = [[one.text for one in turn.answers] for turn in (*turns[HTTP], *turns[LIBRARY])]
    return {
        "clients": turns[HTTP][0].clients,
        "rounds": len(pairs),
        "requests": len(answers[0]),
        "cost": 1 - median(http.tokens_per_s / library.tokens_per_s for http, library in pairs),
        "same_answers": all(texts == answers[0] for texts in answers),
        "doors": {
            door: {
                "tokens_per_s": median(turn.tokens_per_s for turn in some),
                "requests_per_s": median(turn.requests_per_s for turn in some),
                "cpu_ms_a_token": median(turn.cpu_ms for turn in some),
                "first_token_ms": percentiles([one.wait for turn in some for one in turn.answers]),
                "between_tokens_ms": percentiles(
                    [gap for turn in some for one in turn.answers for gap in one.gaps]
                ),
            }
            for door, some in turns.items()
        },
    }


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    hundredths = quantiles(seconds, n=100, method="inclusive")
    return {f"p{at}": 1000 * hundredths[at - 1] for at in (50, 95, 99)}


def show(result: dict[str, Any]) -> None:
    table = Table(title=f"{result['model']}, {result['dtype']}: times in ms")
    for heading in (
        "clients",
        "",
        "tokens/s",
        "requests/s",
        "first token",
        "between tokens",
        "CPU a token",
        "cost",
    ):
        table.add_column(heading, justify="left" if heading == "" else "right")
    for row in result["rows"]:
        for door, figures in row["doors"].items():
            table.add_row(
                str(row["clients"]),
                door,
                f"{figures['tokens_per_s']:.1f}",
                f"{figures['requests_per_s']:.2f}",
                *(
                    " / ".join(f"{ms:.0f}" for ms in figures[times].values())
                    for times in ("first_token_ms", "between_tokens_ms")
                ),
                f"{figures['cpu_ms_a_token']:.2f}",
                f"{row['cost']:.1%}" if door == HTTP else "",
            )
    console = Console(width=120)
    console.print(table)
    console.print(
        "Times are percentiles: 50 / 95 / 99. CPU is the processor time of the process behind the door."
    )


def misses(result: dict[str, Any]) -> list[str]:
    """Where the API costs more than it may, and where its answers are not the library's."""
    said = []
    for row in result["rows"]:
        if row["cost"] > AIM:
            said.append(
                f"{row['clients']} clients: {row['cost']:.1%} of the tokens are lost, the aim is {AIM:.0%}"
            )
        if not row["same_answers"]:
            said.append(f"{row['clients']} clients: answers differ")
    return said


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 4, 16, 32], help="how many at a time")
    parser.add_argument("--dtype", default="float16", help="of the servers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = uvloop.run(measure(args))
    show(result)
    for miss in misses(result):
        print(miss)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(with_others(result, args.json), indent=1) + "\n")


def with_others(result: dict[str, Any], file: Path) -> dict[str, Any]:
    """`result` with the rows of other numbers of clients that stand in `file` from a run of the same kind."""
    known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if any(known.get(name) != result[name] for name in ("model", "dtype", "answer_tokens", "machine")):
        return result
    measured = {row["clients"] for row in result["rows"]}
    rows = [*result["rows"], *(row for row in known["rows"] if row["clients"] not in measured)]
    return {**result, "rows": sorted(rows, key=lambda row: row["clients"])}


if __name__ == "__main__":
    main()
