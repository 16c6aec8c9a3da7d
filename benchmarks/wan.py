"""Three servers far apart: what a token costs there, what pushing, speculating and pipelines save.

    python -m benchmarks.wan [--rtt-ms 5 50 100] [--mbit-s 100 1000] [--rounds 3] [--json FILE]

For each distance a swarm of its own comes up, and what is compared takes turns on it, round after round: hops
that the client drives against hops that push, in greedy and in sampled answers; without and with speculation,
on text that repeats its prompt and on text that does not; and a long prompt in one piece, so that one hop
works at a time, against one in chunks. Every answer must equal that of driven hops on loopback, where it is
also measured what of a decode step is neither computing nor waiting in a queue. Figures are medians over the
rounds, ratios are taken within one.
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
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
import uvloop

from benchmarks.far import Far, Way, can_be_apart, far_swarm
from benchmarks.processor_time import own_seconds, per_token, seconds_used
from benchmarks.servers import even_spans
from benchmarks.texts import other_prompts, repeating_prompts
from benchmarks.wan_report import (
    CONTENDERS,
    DRIVEN,
    OTHER,
    PUSHED,
    REPEATING,
    SAMPLED,
    TURNS,
    Asked,
    Runs,
    misses,
    row_of,
    show,
)
from swarm.blocks.head import Head
from swarm.blocks.models import Model, resolve
from swarm.client import relay
from swarm.client.decoding import MAX_ROUNDS
from swarm.client.facade import Swarm
from swarm.client.generation import Generation
from swarm.client.options import GenerationOptions, SamplingOptions
from swarm.client.sampling import Sampler

SERVERS = 3
WARM_UP_TOKENS = 12
SAMPLING = SamplingOptions(temperature=0.8, top_p=0.95, seed=1)
SHARES = {DRIVEN: (DRIVEN, OTHER), PUSHED: (PUSHED, OTHER), f"{PUSHED}, {SAMPLED}": (PUSHED, SAMPLED)}
"""Whose decode steps on loopback are taken apart, and of which kind of text."""

LINKING = 4
"""Steps after which all hops of a session are linked."""

LONGEST_STEP = 4096
"""Tokens of a step that no prompt here has: it goes in one piece."""


class Bench:
    """The model's client side and what it is asked, at every distance alike."""

    def __init__(self, model: Model, args: argparse.Namespace):
        self.model = model
        self.args = args
        self.head = Head.load(model, args.dtype, "cpu")
        tokenizer = self.head.tokenizer
        prompts = {OTHER: other_prompts(tokenizer), REPEATING: repeating_prompts(tokenizer)}
        self.asked = Asked({**prompts, SAMPLED: prompts[OTHER]}, {})
        text = (Path(__file__).parent.parent / "LICENSE").read_text()
        self.long_prompt: list[int] = tokenizer(text).input_ids[: args.long_prompt]

    @asynccontextmanager
    async def clients(self, far: Far) -> AsyncIterator[dict[str, Swarm]]:
        """Who asks for each contender, warm: two that speculate or not are one client."""
        async with far.connect(push=False) as driving, far.connect(push=True) as pushing:
            clients = {name: pushing if push else driving for name, (push, _) in CONTENDERS.items()}
            for name, kind in TURNS:
                await self.answer(clients, name, kind, 0, WARM_UP_TOKENS)
            yield clients

    async def answer(
        self, clients: Mapping[str, Swarm], contender: str, kind: str, number: int, tokens: int
    ) -> Generation:
        _, speculate = CONTENDERS[contender]
        sampling = SAMPLING if kind == SAMPLED else SamplingOptions()
        options = GenerationOptions(tokens, sampling, ignore_eos=True, speculate=speculate)
        return await clients[contender].stream_tokens(self.asked.prompts[kind][number], options).result()

    async def rounds(self, clients: dict[str, Swarm], name: str) -> Runs:
        runs = Runs()
        for round_ in range(self.args.rounds):
            shift = round_ % len(TURNS)
            for who, kind in (*TURNS[shift:], *TURNS[:shift]):
                number = round_ % len(self.asked.prompts[kind])
                answer = await self.answer(clients, who, kind, number, self.args.tokens)
                runs.answers.append((who, kind, number, answer))
            await self.prefill_both_ways(clients[PUSHED], runs)
            print(f"{name}: round {round_ + 1}", file=sys.stderr, flush=True)
        return runs

    async def prefill_both_ways(self, client: Swarm, runs: Runs) -> None:
        with mock.patch.object(relay, "PREFILL_CHUNK", LONGEST_STEP):
            whole, one = await self.prefill(client)
        pipelined, other = await self.prefill(client)
        runs.prefills.append((whole, pipelined))
        runs.same_prefills += torch.equal(one, other)

    async def prefill(self, client: Swarm) -> tuple[float, torch.Tensor]:
        """Seconds that the long prompt takes in an open session, and the last token's hidden state."""
        session = await client.open_session(self.long_prompt, needed=len(self.long_prompt) + 1)
        hidden = self.head.embed(torch.tensor(self.long_prompt))
        started = time.perf_counter()
        result = await session.step(self.long_prompt, 0, hidden)
        elapsed = time.perf_counter() - started
        await session.close()
        return elapsed, result[-1]

    async def shares(self, client: Swarm, far: Far, kind: str) -> dict[str, Any]:
        """Where the milliseconds of an answer's decode step go.

        If it is sampled, the client chooses each token in a thread of its own, while the hops go on.
        """
        prompt, count = self.asked.prompts[kind][0], self.args.steps
        session = await client.open_session(prompt, needed=len(prompt) + LINKING + count)
        sampler, tokens = Sampler(SAMPLING, first=len(prompt)), list(prompt)

        def chosen(hidden: torch.Tensor) -> int:
            return sampler.choose(tokens, self.head.logits(hidden)[0])

        async def step() -> None:
            begin = len(session.tokens)
            if kind != SAMPLED:
                tokens.extend(await session.next_tokens(tokens[begin:], begin, rounds=MAX_ROUNDS))
                return
            sampling = sampler.by_logits_alone
            hidden = await session.step(tokens[begin:], begin, rounds=MAX_ROUNDS, sampling=sampling)
            tokens.append(await asyncio.to_thread(chosen, hidden))

        for _ in range(1 + LINKING):
            await step()
        session.reset_times()
        pids = [server.pid for server in far.servers]
        before = {"servers": seconds_used(pids), "clients": own_seconds()}
        elapsed = []
        for _ in range(count):
            started = time.perf_counter()
            await step()
            elapsed.append(1000 * (time.perf_counter() - started))
        after = {"servers": seconds_used(pids), "clients": own_seconds()}
        hops = [times for _, times in session.times()]
        await session.close()
        step, compute = sum(elapsed) / count, sum(hop.compute_ms for hop in hops)
        queue = sum(hop.queue_ms for hop in hops)
        return {
            "step_ms": step,
            "compute_ms": compute,
            "queue_ms": queue,
            "transport_ms": step - compute - queue,
            "cpu_ms_a_step": per_token(before, after, count),
        }


async def measure_loopback(bench: Bench, folder: Path) -> dict[str, Any]:
    """The answers that all others must equal, and the transport's share of a step."""
    args = bench.args
    async with (
        far_swarm(bench.model, args.dtype, spans_of(bench.model), None, folder) as far,
        bench.clients(far) as clients,
    ):
        for kind, prompts in bench.asked.prompts.items():
            for number in range(len(prompts)):
                answer = await bench.answer(clients, DRIVEN, kind, number, args.tokens)
                bench.asked.expected[kind, number] = answer.token_ids
        shares: dict[str, list[dict[str, Any]]] = {name: [] for name in SHARES}
        for _ in range(args.rounds):
            for name, found in shares.items():
                who, kind = SHARES[name]
                found.append(await bench.shares(clients[who], far, kind))
        runs = await bench.rounds(clients, "loopback")
    row = row_of(None, far.network, bench.asked, runs, 0.0)
    row["step"] = {name: min(found, key=lambda one: one["step_ms"]) for name, found in shares.items()}
    return row


async def measure_way(bench: Bench, way: Way, folder: Path, in_process: bool) -> dict[str, Any]:
    spans = spans_of(bench.model)
    async with (
        far_swarm(bench.model, bench.args.dtype, spans, way, folder, in_process=in_process) as far,
        bench.clients(far) as clients,
    ):
        runs = await bench.rounds(clients, f"{way.rtt_ms:g} ms, {way.mbit_s:g} Mbit/s")
        found = [clients[PUSHED].directory.rtt(hop.peer) for hop in clients[PUSHED].route().hops]
    return row_of(way, far.network, bench.asked, runs, median(rtt for rtt in found if rtt is not None))


def spans_of(model: Model) -> Any:
    return even_spans(model.num_blocks, SERVERS)


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    bench = Bench(resolve(args.model), args)
    reason = "it was asked for" if args.in_process else await can_be_apart()
    if reason:
        print(f"All run in one process, on the in-process network: {reason}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        rows = [await measure_loopback(bench, Path(folder))]
        for rtt_ms in args.rtt_ms:
            for mbit_s in args.mbit_s:
                rows.append(await measure_way(bench, Way(rtt_ms, mbit_s), Path(folder), bool(reason)))
    return {
        "model": bench.model.name,
        "dtype": args.dtype,
        "rounds": args.rounds,
        "answer_tokens": args.tokens,
        "long_prompt_tokens": len(bench.long_prompt),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "cores": os.cpu_count(),
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float16", help="of servers and client; default: %(default)s")
    parser.add_argument("--rtt-ms", nargs="*", type=float, default=[5.0, 50.0, 100.0])
    parser.add_argument(
        "--mbit-s", nargs="+", type=float, default=[100.0, 1000.0], help="of each peer's line"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=48, help="tokens of each answer")
    parser.add_argument("--steps", type=int, default=64, help="decode steps whose shares are measured")
    parser.add_argument("--long-prompt", type=int, default=512, help="tokens of the prefill")
    parser.add_argument("--in-process", action="store_true", help="use the in-process network all the same")
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
