"""One engine that holds the whole real chat model: many sessions at once, prefixes, a long prefill, memory.

    python -m benchmarks.engine [--rounds 3] [--threads 2] [--dtypes float16 float32] [--json FILE]

Hidden states go in and come out as wire bytes; embeddings, head and network are not part of it. Each round
measures everything once, so that a machine that slows down slows all alike; figures are medians.
"""

import argparse
import asyncio
import json
import os
import platform
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from typing import Any
from urllib.request import urlopen

import psutil
import torch
import uvloop
from rich.console import Console
from rich.table import Table

import swarm
from benchmarks.servers import STARTING, serving
from swarm.blocks.engine import Engine, EngineConfig
from swarm.blocks.models import Model, resolve
from swarm.kernels.codecs import to_wire
from swarm.page_keys import page_keys
from swarm.spans import Span

SESSIONS = (1, 4, 8, 16, 32)
PROMPT, DECODED = 128, 32
SHARED, OWN = 512, 57
"""Tokens of a prompt that many have in common, and those that are its own: 90 and 10 per cent."""

DECODERS, LONG = 8, 2048
DECODING_SECONDS = 3.0
KV_TOKENS = 16_384


class Bench:
    """One engine, and what is done to it."""

    def __init__(self, model: Model, engine: Engine):
        self.engine = engine
        self.span = engine.span
        self._hidden = model.hidden_size
        self._wire = engine.precision.wire_dtype, engine.precision.codec
        self._rng = torch.Generator().manual_seed(0)
        self._vocabulary = model.vocab_size

    async def step(self, session: str, seq_pos: int, tokens: int) -> float:
        """Seconds that a step of random hidden states takes."""
        hidden = torch.randn(tokens, self._hidden, generator=self._rng)
        data = to_wire(hidden.to(self.engine.precision.dtype), *self._wire)
        started = time.perf_counter()
        await self.engine.step(session, seq_pos, data, (tokens, self._hidden), *self._wire)
        return time.perf_counter() - started

    async def step_ids(self, session: str, seq_pos: int, ids: list[int]) -> None:
        data = torch.tensor(ids, dtype=torch.int32).numpy().tobytes()
        await self.engine.step(session, seq_pos, data, (len(ids),), "uint32", "raw")

    @asynccontextmanager
    async def sessions(self, count: int, room: int) -> AsyncIterator[list[str]]:
        """So many sessions that hold a prompt, each of another client."""
        names = [f"session {i}" for i in range(count)]
        for name in names:
            self.engine.open_session(name, self.span, room, client=name)
            await self.step(name, 0, PROMPT)
        try:
            yield names
        finally:
            for name in names:
                self.engine.close_session(name)

    async def decode(self, name: str, count: int) -> list[float]:
        return [await self.step(name, PROMPT + at, 1) for at in range(count)]

    async def decode_for(self, name: str, seconds: float, room: int) -> list[float]:
        """Seconds of each of the steps that fit; the session goes round within its room."""
        times: list[float] = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            times.append(await self.step(name, PROMPT + len(times) % (room - PROMPT), 1))
        return times

    async def tokens_per_s(self, count: int) -> float:
        """All sessions' decoded tokens a second."""
        async with self.sessions(count, PROMPT + DECODED) as names:
            started = time.perf_counter()
            await asyncio.gather(*(self.decode(name, DECODED) for name in names))
            return count * DECODED / (time.perf_counter() - started)

    async def first_token(self, ids: list[int]) -> float:
        """Seconds from opening a session on a prompt of token ids to its last hidden state."""
        started = time.perf_counter()
        keys = page_keys(ids)
        held = self.engine.open_session("prompt", self.span, len(ids), client="any", page_keys=keys)
        start = min(held, len(ids) - 1)
        await self.step_ids("prompt", start, ids[start:])
        elapsed = time.perf_counter() - started
        self.engine.close_session("prompt")
        return elapsed

    def prompt(self, shared: list[int], own: int) -> list[int]:
        return [*shared, *torch.randint(self._vocabulary, (own,), generator=self._rng).tolist()]

    async def prefixes(self) -> dict[str, float]:
        """Seconds to the first token of prompts of which nothing, 90 per cent, and all but one are held."""
        shared = self.prompt([], SHARED)
        cold = await self.first_token(self.prompt(shared, OWN))
        warm = await self.first_token(self.prompt(shared, OWN))
        whole_cold = await self.first_token(other := self.prompt([], SHARED))
        whole_warm = await self.first_token(other)
        return {"cold_s": cold, "warm_s": warm, "whole_cold_s": whole_cold, "whole_warm_s": whole_warm}

    async def beside_a_prefill(self) -> dict[str, Any]:
        """Inter-token times of eight sessions, undisturbed and while a long prompt is read."""
        room = PROMPT + 512
        async with self.sessions(DECODERS, room) as names:
            calm = await self._together(names, DECODING_SECONDS, room)
            self.engine.open_session("long", self.span, LONG, client="long")
            prefill = asyncio.create_task(self.step("long", 0, LONG))
            stalled: list[float] = []
            while not prefill.done():
                stalled += await self._together(names, 0.3, room)
            prefill_s = await prefill
            self.engine.close_session("long")
            self.engine.open_session("long", self.span, LONG, client="long")
        await asyncio.sleep(1.0)  # until nobody counts as decoding any more
        alone_s = await self.step("long", 0, LONG)
        self.engine.close_session("long")
        return {
            "calm_ms": 1000 * median(calm),
            "beside_ms": 1000 * median(stalled),
            "beside_p95_ms": 1000 * quantiles(stalled, n=20)[-1],
            "prefill_s": prefill_s,
            "prefill_alone_s": alone_s,
        }

    async def _together(self, names: list[str], seconds: float, room: int) -> list[float]:
        times = await asyncio.gather(*(self.decode_for(name, seconds, room) for name in names))
        return [one for some in times for one in some]

    async def loop_delay(self) -> dict[str, float]:
        """Milliseconds by which the event loop is late while sixteen sessions decode."""
        async with self.sessions(16, PROMPT + DECODED) as names:
            running = asyncio.gather(*(self.decode(name, DECODED) for name in names))
            late = []
            while not running.done():
                started = time.perf_counter()
                await asyncio.sleep(0.001)
                late.append(1000 * (time.perf_counter() - started - 0.001))
            await running
        return {"median_ms": median(late), "p99_ms": quantiles(late, n=100)[-1], "most_ms": max(late)}


async def measure_dtype(model: Model, dtype: str, rounds: int, threads: int) -> dict[str, Any]:
    config = EngineConfig(dtype=dtype, device="cpu", threads=threads, kv_tokens=KV_TOKENS)
    engine = await Engine.load(model, Span(0, model.num_blocks), config)
    bench = Bench(model, engine)
    rows: list[dict[str, Any]] = []
    for _ in range(rounds + 1):
        rows.append(
            {
                "decode": {count: await bench.tokens_per_s(count) for count in SESSIONS},
                "prefix": await bench.prefixes(),
                "stall": await bench.beside_a_prefill(),
                "loop": await bench.loop_delay(),
            }
        )
    engine.check_integrity()
    engine.close()
    return _medians(rows[1:])  # the first round warms up


def _medians(rows: list[Any]) -> Any:
    if isinstance(rows[0], dict):
        return {key: _medians([row[key] for row in rows]) for key in rows[0]}
    return median(rows)


def show(result: dict[str, Any]) -> None:
    console = Console()
    title = (
        f"Decoded tokens a second of all sessions, {result['threads']} threads, medians of {result['rounds']}"
    )
    table = Table(title=title)
    table.add_column("dtype")
    for count in SESSIONS:
        table.add_column(f"{count} session{'s' if count > 1 else ''}", justify="right")
    for dtype, found in result["dtypes"].items():
        one = found["decode"][1]
        table.add_row(dtype, *(f"{rate:.0f} ({rate / one:.1f}x)" for rate in found["decode"].values()))
    console.print(table)
    for dtype, found in result["dtypes"].items():
        prefix, stall, late = found["prefix"], found["stall"], found["loop"]
        console.print(
            f"{dtype}: first token of {SHARED + OWN}, {SHARED} of them shared: {prefix['cold_s']:.3f} s,"
            f" held {prefix['warm_s']:.3f} s ({prefix['cold_s'] / prefix['warm_s']:.1f}x);"
            f" all {SHARED} shared: {prefix['whole_cold_s'] / prefix['whole_warm_s']:.1f}x"
        )
        console.print(
            f"  {DECODERS} sessions decode in {stall['calm_ms']:.1f} ms, beside a prefill of {LONG} in"
            f" {stall['beside_ms']:.1f} ms ({stall['beside_ms'] / stall['calm_ms']:.2f}x, p95"
            f" {stall['beside_p95_ms']:.1f}); it takes {stall['prefill_s']:.1f} s, alone"
            f" {stall['prefill_alone_s']:.1f} s"
        )
        console.print(
            f"  the event loop is late by {late['median_ms']:.2f} ms, p99 {late['p99_ms']:.2f},"
            f" at most {late['most_ms']:.2f}"
        )
        own, weights = found["memory"]["own_mib"], found["memory"]["weights_mib"]
        console.print(f"  a server of it takes {own:.0f} MiB beside {weights:.0f} MiB of weights")


async def server_memory(model: str, dtype: str) -> dict[str, float]:
    """MiB of a server of the whole model, alone on its machine, after eight answers at once.

    `own` is what its process and its daemon hold (proportional set size) beyond the weights; KV included.
    """
    with TemporaryDirectory() as folder:
        span, options = Span(0, resolve(model).num_blocks), ("--kv-tokens", "1024", "--metrics-port", "0")
        async with serving(model, dtype, [span], Path(folder), *options) as servers:
            (server,) = servers.processes
            async with swarm.connect(servers.addresses, model=model) as client:
                await asyncio.gather(*(client.generate(f"Say {i}.", max_new_tokens=32) for i in range(8)))
            url = (await server.wait_for("metrics", STARTING))["url"]
            weights = await asyncio.to_thread(_weights_mib, url.replace("/metrics", "/shard"))
            group = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
            held = sum(process.memory_full_info().pss for process in group) / 2**20
    return {"weights_mib": weights, "own_mib": held - weights}


def _weights_mib(url: str) -> float:
    with urlopen(url, timeout=5.0) as answer:
        return float(json.load(answer)["bytes"]) / 2**20


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    model = resolve(args.model)
    return {
        "model": model.name,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "load": psutil.getloadavg()[0],
        "rounds": args.rounds,
        "threads": args.threads,
        "dtypes": {
            dtype: await measure_dtype(model, dtype, args.rounds, args.threads)
            | {"memory": await server_memory(args.model, dtype)}
            for dtype in args.dtypes
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtypes", nargs="+", default=["float16", "float32"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = uvloop.run(measure(args))
    show(result)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
