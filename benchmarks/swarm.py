"""Many clients of three servers: tokens a second all together, waits, and where processor time goes.

    python -m benchmarks.swarm [--clients 1 8 16] [--rounds 5] [--dtype float16 float32] [--json FILE]

Each server has a third of the model and one thread; each client is a process of its own with a prompt of
its own. In a round each number of clients takes its turn, and transformers.generate in float32 with one
thread and one stream takes its own. Clients prefill at the same time, wait for each other, and then
decode at the same time. Tokens a second are those after each client's first, over the time from the
moment they go on together until the last client has its last token. Figures are medians over the rounds.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import asyncio
import json
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import uvloop
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from benchmarks.clients import Answer, ClientProcess, joined_clients
from benchmarks.processor_time import DAEMON, MAIN, OTHERS, per_token, seconds_used
from benchmarks.reference import REFERENCE, Reference
from benchmarks.servers import Servers, even_spans, serving
from benchmarks.watch import metrics_of
from swarm.blocks.models import Model, resolve

SERVERS = 3
BATCH_STEPS, BATCHES = "swarm_batch_steps_sum", "swarm_batch_steps_count"
SHORTEST, LONGEST = 64, 128
"""Tokens of a prompt."""

ROOM = 64
"""Tokens of KV memory that each session may need beyond its prompt and answer: pages are whole."""

AIMS = {"speedup": 3.5, "ratio": 7.0}
AIMED_AT = 8
"""Clients for which the aims are set: times one client's tokens a second, and times transformers'."""


@dataclass(frozen=True)
class Run:
    """One turn of some clients.

    `batch` is how many sessions' steps a server took up at once, `cores` how many processor cores all
    processes together kept busy, `cpu_ms` processor time a token, and `reference` the tokens a second of
    transformers in the same round.
    """

    answers: list[Answer]
    tokens_per_s: float
    batch: float
    cores: float
    cpu_ms: dict[str, dict[str, float]]
    reference: float


async def run_clients(
    clients: Sequence[ClientProcess],
    servers: Servers,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    reference: float = 0.0,
) -> Run:
    """Let `clients` prefill one prompt each, and then decode at the same time."""
    await asyncio.gather(
        *(client.prefill(prompt, tokens) for client, prompt in zip(clients, prompts, strict=True))
    )
    pids = {
        "servers": [process.pid for process in servers.processes],
        "clients": [client.pid for client in clients],
    }
    before, batches = {kind: seconds_used(of) for kind, of in pids.items()}, await _batches(servers)
    started = time.monotonic()
    answers = await asyncio.gather(*(client.decode() for client in clients))
    elapsed = max(answer.moments[-1] for answer in answers) - started
    after = {kind: seconds_used(of) for kind, of in pids.items()}
    decoded = sum(len(answer.token_ids) - 1 for answer in answers)
    steps, iterations = (end - begin for begin, end in zip(batches, await _batches(servers), strict=True))
    spent = per_token(before, after, decoded)
    return Run(
        answers=answers,
        tokens_per_s=decoded / elapsed,
        batch=steps / iterations,
        cores=sum(sum(parts.values()) for parts in spent.values()) * decoded / elapsed / 1000,
        cpu_ms=spent,
        reference=reference,
    )


async def _batches(servers: Servers) -> tuple[float, float]:
    """Steps that all servers took up so far, and iterations in which they did."""
    said = [await asyncio.to_thread(metrics_of, process) for process in servers.processes]
    return sum(one[BATCH_STEPS] for one in said), sum(one[BATCHES] for one in said)


async def measure_dtype(
    model: Model, dtype: str, reference: Reference, prompts: list[list[int]], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row for each number of clients."""
    most = max(args.clients)
    kv_tokens = str(most * (LONGEST + args.tokens + ROOM))
    runs: dict[int, list[Run]] = {count: [] for count in args.clients}
    options = ["--kv-tokens", kv_tokens, "--metrics-port", "0", *args.server_options]
    spans = even_spans(model.num_blocks, SERVERS)
    with tempfile.TemporaryDirectory() as folder:
        async with (
            serving(model.name, dtype, spans, Path(folder), *options) as servers,
            joined_clients(servers.addresses, model.name, dtype, most) as clients,
        ):
            await run_clients(clients, servers, prompts[:most], 4)
            for number in range(args.rounds):
                base, _ = reference.decode_rate(prompts[0], args.tokens)
                for count in args.clients:
                    done = await run_clients(clients[:count], servers, prompts[:count], args.tokens, base)
                    runs[count].append(done)
                    progress = f"{dtype}, round {number + 1}: {count} clients, {done.tokens_per_s:.1f}"
                    print(f"{progress} tokens/s, transformers {base:.1f}", file=sys.stderr)
    return [row(dtype, runs[count], runs.get(1), prompts, reference) for count in args.clients]


def row(
    dtype: str,
    runs: Sequence[Run],
    single: Sequence[Run] | None,
    prompts: list[list[int]],
    reference: Reference,
) -> dict[str, Any]:
    """Medians over the runs; `single` are those of one client in the same rounds, if there are."""
    answers = [answer for run in runs for answer in run.answers]
    gaps = [gap for answer in answers for gap in answer.gaps]
    same = sum(
        reference.gives(prompt, answer.token_ids)
        for run in runs
        for prompt, answer in zip(prompts, run.answers, strict=False)
    )
    return {
        "dtype": dtype,
        "clients": len(runs[0].answers),
        "tokens_per_s": median(run.tokens_per_s for run in runs),
        "speedup": single
        and median(run.tokens_per_s / alone.tokens_per_s for run, alone in zip(runs, single, strict=True)),
        "ratio": median(run.tokens_per_s / run.reference for run in runs),
        "batch": median(run.batch for run in runs),
        "cores": median(run.cores for run in runs),
        "token_ms": 1000 * median(gaps),
        "token_p95_ms": 1000 * quantiles(gaps, n=20)[-1],
        "ttft_ms": median(answer.ttft_ms for answer in answers),
        "ttft_max_ms": max(answer.ttft_ms for answer in answers),
        "answers": len(answers),
        "same_tokens": same,
        "cpu_ms_a_token": {
            kind: {part: median(run.cpu_ms[kind][part] for run in runs) for part in parts}
            for kind, parts in runs[0].cpu_ms.items()
        },
    }


def prompts_from(model: Model, count: int) -> list[list[int]]:
    """Different prompts of `SHORTEST` to `LONGEST` tokens, cut from one text."""
    text = (Path(__file__).parent.parent / "LICENSE").read_text()
    ids = AutoTokenizer.from_pretrained(model.path)(text).input_ids
    lengths = [SHORTEST + 37 * number % (LONGEST - SHORTEST + 1) for number in range(count)]
    step = (len(ids) - LONGEST) // count
    return [ids[number * step : number * step + length] for number, length in enumerate(lengths)]


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    model = resolve(args.model)
    reference = Reference(model)
    prompts = prompts_from(model, max(args.clients))
    rows = [
        row for dtype in args.dtype for row in await measure_dtype(model, dtype, reference, prompts, args)
    ]
    return {
        "model": model.name,
        "rounds": args.rounds,
        "answer_tokens": args.tokens,
        "prompt_tokens": sorted(map(len, prompts)),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "rows": rows,
    }


def show(result: dict[str, Any]) -> None:
    table = Table(title=f"{result['model']}: medians of {result['rounds']} rounds, ratios to {REFERENCE}")
    headings = (
        "clients",
        "tokens/s",
        "x one",
        "ratio",
        "a token (ms)",
        "p95",
        "first (ms)",
        "longest",
        "batch",
        "cores",
        "same",
    )
    table.add_column("")
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in result["rows"]:
        table.add_row(
            row["dtype"],
            str(row["clients"]),
            f"{row['tokens_per_s']:.1f}",
            f"{row['speedup']:.2f}" if row["speedup"] else "",
            f"{row['ratio']:.2f}",
            f"{row['token_ms']:.1f}",
            f"{row['token_p95_ms']:.1f}",
            f"{row['ttft_ms']:.0f}",
            f"{row['ttft_max_ms']:.0f}",
            f"{row['batch']:.1f}",
            f"{row['cores']:.2f}",
            f"{row['same_tokens']} of {row['answers']}",
        )
    console = Console(width=120)
    console.print(table)
    console.print(processor_table(result["rows"]))


def processor_table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="processor time: milliseconds a token, summed over processes")
    table.add_column("")
    table.add_column("clients", justify="right")
    parts = [(kind, part) for kind in ("servers", "clients") for part in (MAIN, OTHERS, DAEMON)]
    for kind, part in parts:
        table.add_column(f"{kind}: {part}", justify="right")
    table.add_column("all", justify="right")
    for row in rows:
        spent = [row["cpu_ms_a_token"][kind][part] for kind, part in parts]
        table.add_row(row["dtype"], str(row["clients"]), *(f"{ms:.2f}" for ms in spent), f"{sum(spent):.2f}")
    return table


def misses(result: dict[str, Any]) -> list[str]:
    """Where the figures fall short of the aims, and where float32 answers are not the reference's."""
    said = []
    for row in result["rows"]:
        name = f"{row['dtype']}, {row['clients']} clients"
        if row["dtype"] == "float32" and row["same_tokens"] < row["answers"]:
            said.append(f"{name}: {row['answers'] - row['same_tokens']} answers differ from the reference's")
        if row["clients"] == AIMED_AT:
            said += [
                f"{name}: {figure} is {row[figure]:.2f}, the aim is {aim}"
                for figure, aim in AIMS.items()
                if row[figure] is not None and row[figure] < aim
            ]
    return said


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 16], help="how many at a time")
    parser.add_argument("--dtype", nargs="+", default=["float16", "float32"], help="of servers and clients")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument(
        "--server-options",
        nargs=argparse.REMAINDER,
        default=["--no-prefix-cache"],
        help="given to each server; default: %(default)s, since every round asks the same",
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = uvloop.run(measure(args))
    result["misses"] = misses(result)
    show(result)
    for miss in result["misses"]:
        print(miss)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
