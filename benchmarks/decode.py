"""Prefill and decode of the real chat model: in one process, through servers, and by transformers.

    python -m benchmarks.decode [--rounds 5] [--dtypes float32 float16] [--json FILE]

All stand up at the same time and take turns, round after round, so that a machine that slows down slows
all alike; figures are medians over the rounds, ratios are to `transformers.generate` in float32 in the
same run. Every process computes with one thread.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
import uvloop
from rich.console import Console
from rich.table import Table

import swarm
from benchmarks.reference import REFERENCE, Reference
from benchmarks.servers import even_spans, serving
from swarm.blocks.engine import Engine, EngineConfig
from swarm.blocks.head import Head
from swarm.blocks.models import Model, resolve
from swarm.client.api import Swarm
from swarm.client.generation import Generation
from swarm.client.options import GenerationOptions
from swarm.kernels.codecs import from_wire, to_wire
from swarm.processes import ServerProcess
from swarm.spans import Span


@dataclass(frozen=True)
class Load:
    """How much is asked: tokens of the short prompt and of the answer to it, tokens of the long prompt."""

    prompt: list[int]
    long_prompt: list[int]
    answer: int


@dataclass(frozen=True)
class Run:
    """One answer: seconds to the first token of the long prompt, decoded tokens a second, and their ids."""

    ttft: float
    tokens_per_s: float
    tokens: tuple[int, ...]
    answer: Generation | None = None


@dataclass
class Contender:
    name: str
    run: Callable[[Load], Awaitable[Run]]
    servers: list[ServerProcess] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        return median(run.tokens_per_s for run in self.runs)

    @property
    def ttft(self) -> float:
        return median(run.ttft for run in self.runs)


def by_transformers(model: Model) -> Contender:
    """The whole model in float32, as transformers itself generates."""
    reference = Reference(model)

    async def run(load: Load) -> Run:
        ttft, _ = reference.generate(load.long_prompt, 1)
        rate, tokens = reference.decode_rate(load.prompt, load.answer)
        return Run(ttft, rate, tuple(tokens))

    return Contender(REFERENCE, run)


async def in_one_process(model: Model, dtype: str) -> Contender:
    """Our engine and head, called directly: no network, no scheduling but the compute thread."""
    engine = await Engine.load(
        model, Span(0, model.num_blocks), EngineConfig(dtype=dtype, device="cpu", kv_tokens=2048, threads=1)
    )
    head = Head.load(model, dtype, "cpu")
    wire = engine.precision.wire_dtype

    async def step(seq_pos: int, tokens: Sequence[int]) -> int:
        hidden = head.embed(torch.tensor(tokens))
        result = await engine.step("bench", seq_pos, to_wire(hidden, wire), tuple(hidden.shape), wire, "raw")
        last = from_wire(result.data, result.shape, result.dtype, result.codec)[-1:]
        return int(head.logits(last)[0].argmax())

    async def run(load: Load) -> Run:
        engine.open_session("bench", engine.span, len(load.long_prompt) + len(load.prompt) + load.answer)
        started = time.perf_counter()
        await step(0, load.long_prompt)
        ttft = time.perf_counter() - started
        tokens = [await step(0, load.prompt)]
        started = time.perf_counter()
        while len(tokens) < load.answer:
            tokens.append(await step(len(load.prompt) + len(tokens) - 1, tokens[-1:]))
        elapsed = time.perf_counter() - started
        engine.close_session("bench")
        return Run(ttft, (load.answer - 1) / elapsed, tuple(tokens))

    return Contender(f"one process, {dtype}", run)


async def through_servers(
    stack: AsyncExitStack, model: Model, dtype: str, count: int, folder: Path
) -> Contender:
    """Servers as processes of their own on loopback, and a client that joins them."""
    spans = even_spans(model.num_blocks, count)
    servers = await stack.enter_async_context(
        serving(model.name, dtype, spans, folder, "--kv-tokens", "4096", "--no-prefix-cache")
    )
    client: Swarm = await stack.enter_async_context(swarm.connect(servers.addresses, model.name, dtype=dtype))

    async def answer(prompt: list[int], tokens: int) -> Generation:
        options = GenerationOptions(max_new_tokens=tokens, ignore_eos=True)
        return await client.stream_tokens(prompt, options).result()

    async def run(load: Load) -> Run:
        ttft = (await answer(load.long_prompt, 1)).ttft_ms / 1000
        whole = await answer(load.prompt, load.answer)
        return Run(ttft, whole.tokens_per_s, whole.token_ids, whole)

    return Contender(f"{count} server{'s' * (count > 1)}, {dtype}", run, servers.processes)


def own_memory(server: ServerProcess) -> tuple[float, float]:
    """Proportional set size of the server's process and of its daemon, in MiB."""
    parent = psutil.Process(server.pid)
    return tuple(  # type: ignore[return-value]
        sum(process.memory_full_info().pss for process in group) / 2**20
        for group in ([parent], parent.children(recursive=True))
    )


def shard_mib(model: Model, span: Span, dtype: str) -> float:
    """What the weights of a span take when they are loaded."""
    entries = [
        model.checkpoint.entry(name)
        for names in model.checkpoint.block_tensors(span).values()
        for name in names
    ]
    return sum(entry.nbytes for entry in entries) * (2 if dtype == "float32" else 1) / 2**20


def budget(contender: Contender) -> dict[str, Any]:
    """Where the milliseconds of a decoded token go, medians over the rounds."""
    answers = [run.answer for run in contender.runs if run.answer is not None]
    hops = [
        {
            "blocks": str(hop.blocks),
            "compute_ms": median(answer.route[index].compute_ms for answer in answers),
            "queue_ms": median(answer.route[index].queue_ms for answer in answers),
            "stack_ms": median(answer.route[index].rtt_ms for answer in answers),
        }
        for index, hop in enumerate(answers[0].route)
    ]
    token = 1000 / contender.tokens_per_s
    on_hops = sum(hop["compute_ms"] + hop["queue_ms"] + hop["stack_ms"] for hop in hops)
    return {"token_ms": token, "hops": hops, "client_ms": token - on_hops}


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    model = resolve(args.model)
    tokenizer = Head.load(model, "float32", "cpu").tokenizer
    text = (Path(__file__).parent.parent / "LICENSE").read_text()
    ids = tokenizer(text).input_ids
    load = Load(ids[: args.prompt], ids[: args.long_prompt], args.tokens)
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        contenders = [by_transformers(model)]
        for dtype in args.dtypes:
            contenders.append(await in_one_process(model, dtype))
            for count in (1, 3):
                contenders.append(await through_servers(stack, model, dtype, count, folder))
        warm = Load(load.prompt[:16], load.prompt[:16], 4)
        for contender in contenders:
            await contender.run(warm)
        for number in range(args.rounds):
            for contender in contenders:
                contender.runs.append(await contender.run(load))
                print(f"round {number + 1}: {contender.name}", file=sys.stderr)
        return report(model, contenders, args)


def report(model: Model, contenders: list[Contender], args: argparse.Namespace) -> dict[str, Any]:
    reference = contenders[0]
    rows = []
    for contender in contenders:
        row: dict[str, Any] = {
            "name": contender.name,
            "tokens_per_s": contender.tokens_per_s,
            "ratio": median(
                run.tokens_per_s / base.tokens_per_s
                for run, base in zip(contender.runs, reference.runs, strict=True)
            ),
            "ttft_s": contender.ttft,
            "ttft_ratio": median(
                run.ttft / base.ttft for run, base in zip(contender.runs, reference.runs, strict=True)
            ),
            "same_tokens": all(run.tokens == reference.runs[0].tokens for run in contender.runs),
        }
        if contender.servers:
            dtype = contender.name.split(", ")[1]
            span = Span(0, model.num_blocks // len(contender.servers))
            process, daemon = own_memory(contender.servers[0])
            shard = shard_mib(model, span, dtype)
            row["budget"] = budget(contender)
            row["memory_mib"] = {
                "process_pss": process,
                "daemon_pss": daemon,
                "shard": shard,
                "own": process + daemon - shard,
            }
        rows.append(row)
    return {
        "model": model.name,
        "rounds": args.rounds,
        "prompt_tokens": args.prompt,
        "answer_tokens": args.tokens,
        "long_prompt_tokens": args.long_prompt,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "contenders": rows,
    }


def show(result: dict[str, Any]) -> None:
    console = Console()
    table = Table(title=f"{result['model']}: medians of {result['rounds']} rounds, ratios to {REFERENCE}")
    for heading in (
        "",
        "tokens/s",
        "ratio",
        f"first of {result['long_prompt_tokens']} (s)",
        "ratio",
        "same tokens",
    ):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in result["contenders"]:
        table.add_row(
            row["name"],
            f"{row['tokens_per_s']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['ttft_s']:.2f}",
            f"{row['ttft_ratio']:.2f}",
            "yes" if row["same_tokens"] else "no",
        )
    console.print(table)
    for row in result["contenders"]:
        if "budget" not in row:
            continue
        spent = row["budget"]
        console.print(f"\n{row['name']}: {spent['token_ms']:.1f} ms a token")
        for hop in spent["hops"]:
            console.print(
                f"  blocks {hop['blocks']:>6}  compute {hop['compute_ms']:6.2f}  queue {hop['queue_ms']:5.2f}"
                f"  sockets, framing, scheduling {hop['stack_ms']:5.2f} ms"
            )
        console.print(f"  client: head, sampling, embedding {spent['client_ms']:.2f} ms")
        memory = row["memory_mib"]
        console.print(
            f"  memory of the first server: {memory['process_pss']:.0f} MiB, its daemon's"
            f" {memory['daemon_pss']:.0f}, less the shard's {memory['shard']:.0f}: {memory['own']:.0f} MiB"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt that is answered")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of the answer")
    parser.add_argument(
        "--long-prompt", type=int, default=512, help="tokens of the prompt timed to its first token"
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = uvloop.run(measure(args))
    show(result)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
