"""The engine on a GPU: whether its answers are exact, and how fast many sessions decode.

    python -m benchmarks.gpu [--model NAME] [--blocks 32] [--sessions 1 4 8 16 32 64] [--json FILE]

Exactness is measured on a real model. Speed is measured on random weights in the shape of an 8B Llama, in
bfloat16, which are made on the GPU; its vocabulary is small, so that blocks are what takes the time. Ratios
are to `transformers.generate` with a batch of as many sequences, in the same run, and to the limit that
memory sets: the bytes of weights and KV that a step must read, at the speed of a measured copy.
"""

import argparse
import asyncio
import json
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
import uvloop
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedConfig

from swarm.blocks.architecture import span_model
from swarm.blocks.engine import Engine, EngineConfig
from swarm.blocks.families import KVShape, kv_shapes
from swarm.blocks.flat import ATTENTION
from swarm.blocks.forward import forward_of
from swarm.blocks.head import Head
from swarm.blocks.kv import pages_of
from swarm.blocks.loading import LoadedSpan
from swarm.blocks.models import Model, resolve
from swarm.blocks.precision import choose_precision
from swarm.errors import SwarmError
from swarm.kernels.codecs import from_wire, to_wire
from swarm.kernels.pages import Pages, Segment, Segments, attend_pages
from swarm.spans import Span

RESULTS = Path(__file__).parent / "results" / "gpu.json"
PROMPTS = (17, 64, 200, 333)
"""Tokens of the prompts that are continued at the same time to see whether they stay exact."""

CONTEXTS = (1024, 8192, 32768)
"""Positions that each session holds where attention is measured alone."""


class Bench:
    """One engine and how to talk to it: random hidden states in, of no meaning, or a real model's."""

    def __init__(self, engine: Engine, hidden_size: int):
        self.engine = engine
        self._hidden_size = hidden_size
        self._wire = engine.precision.wire_dtype, engine.precision.codec
        self._rng = torch.Generator().manual_seed(0)

    async def step(self, session: str, seq_pos: int, hidden: Tensor) -> Tensor:
        """Hidden states [tokens, hidden] after the span."""
        data, shape = to_wire(hidden, *self._wire), (hidden.shape[0], self._hidden_size)
        done = await self.engine.step(session, seq_pos, data, shape, *self._wire)
        return from_wire(done.data, done.shape, done.dtype, done.codec)

    def random(self, tokens: int) -> Tensor:
        hidden = torch.randn(tokens, self._hidden_size, generator=self._rng)
        return hidden.to(self.engine.precision.dtype)

    async def decode_together(self, sessions: int, prompt: int, decoded: int) -> dict[str, float]:
        """Tokens a second of all, and the milliseconds of a step, of which the forward pass takes some."""
        names, reports = [f"session {number}" for number in range(sessions)], []

        async def run(name: str) -> None:
            for at in range(decoded):
                await self.step(name, prompt + at, self.random(1))

        started = time.perf_counter()
        for name in names:
            self.engine.open_session(name, self.engine.span, prompt + decoded, client=name)
            await self.step(name, 0, self.random(prompt))
        prefilled = time.perf_counter()
        self.engine.on_batch = reports.append
        await asyncio.gather(*map(run, names))
        seconds = time.perf_counter() - prefilled
        self.engine.on_batch = None
        for name in names:
            self.engine.close_session(name)
        return {
            "tokens_per_s": sessions * decoded / seconds,
            "step_ms": 1000 * seconds / decoded,
            "iteration_ms": 1000 * median(report.seconds for report in reports),
            "batch": sum(report.decode_tokens for report in reports) / len(reports),
            "prefill_tokens_per_s": sessions * prompt / (prefilled - started),
        }


def eight_billion(blocks: int) -> PreTrainedConfig:
    """Llama 3.1 8B, but for its number of blocks and its vocabulary."""
    return LlamaConfig(
        vocab_size=1024,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=blocks,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )


def random_engine(config: PreTrainedConfig, device: torch.device, kv_tokens: int) -> tuple[Engine, int]:
    """An engine in bfloat16 for a model with such a config and random weights, and the bytes of these."""
    config._attn_implementation = ATTENTION
    span = Span(0, config.num_hidden_layers)
    module = span_model(config, span, torch.bfloat16)
    module.layers.to_empty(device=device)
    fill(module)
    module = module.to(device).requires_grad_(False)
    precision = choose_precision("bfloat16", device, torch.bfloat16)
    weights = sum(weight.nbytes for weight in module.layers.parameters())
    loaded = LoadedSpan(
        forward=forward_of(module, kv_shapes(config, span), pages_of(kv_tokens), precision.dtype, device),
        span=span,
        precision=precision,
        hidden_size=config.hidden_size,
        pages=pages_of(kv_tokens),
        shard_bytes=weights,
    )
    return Engine(loaded, prefix_cache=False), weights


@torch.no_grad()
def fill(module: torch.nn.Module) -> None:
    """Small random weights, and norms that do nothing."""
    for weight in module.parameters():
        if weight.dim() == 1:
            weight.fill_(1.0)
        else:
            weight.normal_(std=0.02)


@torch.inference_mode()
def generate(model: Any, ids: Tensor, count: int) -> tuple[float, Tensor]:
    """Seconds that `count` greedy tokens after `ids` [sequences, tokens] took, and these tokens."""
    model.generation_config.eos_token_id = None
    wait(ids.device)
    started = time.perf_counter()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )
    wait(ids.device)
    return time.perf_counter() - started, out[:, ids.shape[1] :]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


async def greedy(bench: Bench, head: Head, name: str, prompt: Sequence[int], count: int) -> list[int]:
    """Greedy tokens after `prompt`, by the engine and the head."""
    bench.engine.open_session(name, bench.engine.span, len(prompt) + count, client=name)
    tokens, seq_pos, ids = [], 0, list(prompt)
    for _ in range(count):
        hidden = await bench.step(name, seq_pos, head.embed(torch.tensor(ids)))
        seq_pos, ids = seq_pos + len(ids), [int(head.logits(hidden[-1:])[0].argmax())]
        tokens += ids
    bench.engine.close_session(name)
    return tokens


async def exactness(model: Model, device: torch.device, count: int) -> dict[str, Any]:
    """Greedy tokens in float32, several sessions at once; the error of bfloat16 logits against float32's."""
    head = Head.load(model, "float32", str(device))
    text = (Path(__file__).parent.parent / "LICENSE").read_text()
    ids = head.tokenizer(text).input_ids
    prompts = [ids[100 * number :][:length] for number, length in enumerate(PROMPTS)]
    whole = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32).to(device).eval()
    wanted = [
        generate(whole, torch.tensor([prompt], device=device), count)[1][0].tolist() for prompt in prompts
    ]
    bench = await load(model, "float32", device)
    found = await asyncio.gather(
        *(greedy(bench, head, str(number), prompt, count) for number, prompt in enumerate(prompts))
    )
    bench.engine.close()
    longest = prompts[-1]
    exact = reference_logits(whole, longest, device)
    theirs = reference_logits(whole.to(torch.bfloat16), longest, device)
    head, bench = Head.load(model, "bfloat16", str(device)), await load(model, "bfloat16", device)
    bench.engine.open_session("prompt", bench.engine.span, len(longest))
    ours = head.logits(await bench.step("prompt", 0, head.embed(torch.tensor(longest))))
    bench.engine.close()
    return {
        "model": model.name,
        "float32_tokens": len(prompts) * count,
        "float32_equal": sum(
            a == b for x, y in zip(found, wanted, strict=True) for a, b in zip(x, y, strict=True)
        ),
        "bfloat16_ours": distance(ours, exact),
        "bfloat16_transformers": distance(theirs, exact),
    }


async def load(model: Model, dtype: str, device: torch.device) -> Bench:
    config = EngineConfig(dtype=dtype, device=str(device), kv_tokens=8192)
    engine = await Engine.load(model, Span(0, model.num_blocks), config)
    return Bench(engine, model.hidden_size)


@torch.inference_mode()
def reference_logits(whole: Any, ids: Sequence[int], device: torch.device) -> Tensor:
    logits: Tensor = whole(torch.tensor([list(ids)], device=device), use_cache=False).logits[0]
    return logits.float().cpu()


def distance(logits: Tensor, exact: Tensor) -> dict[str, float]:
    """How far logits [tokens, vocabulary] are from the exact ones."""
    wanted, found = exact.log_softmax(-1), logits.log_softmax(-1)
    return {
        "largest_error": float((logits - exact).abs().max()),
        "mean_kl": float((wanted.exp() * (wanted - found)).sum(-1).mean()),
        "same_first": float((logits.argmax(-1) == exact.argmax(-1)).float().mean()),
    }


def copy_bandwidth(device: torch.device, count: int = 2**30) -> float:
    """Bytes a second, read and written, of copying `count` bytes."""
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * count / seconds_of(lambda: target.copy_(source), device)


def seconds_of(run: Any, device: torch.device, repeats: int = 10) -> float:
    """Median over rounds of a few runs each, so that starting them is not what is timed."""
    times = []
    for _ in range(repeats):
        wait(device)
        started = time.perf_counter()
        for _ in range(5):
            run()
        wait(device)
        times.append((time.perf_counter() - started) / 5)
    return median(times[1:])


def attention_bandwidth(
    shape: KVShape, heads: int, sessions: int, context: int, device: torch.device
) -> float:
    """Bytes of keys and values a second that one decode step's attention reads on one block."""
    count = pages_of(context)
    pages = Pages.empty(sessions * count, shape.heads, shape.key_dim, shape.value_dim, torch.bfloat16, device)
    pages.keys.normal_()
    pages.values.normal_()
    order = torch.randperm(sessions * count).view(sessions, count).tolist()
    segments = Segments.of([Segment(1, context - 1, table) for table in order], device)
    query = torch.randn(sessions, heads, shape.key_dim, device=device, dtype=torch.bfloat16)

    def run() -> Tensor:
        return attend_pages(query, pages, segments, scale=shape.key_dim**-0.5)

    read = sessions * context * shape.heads * (shape.key_dim + shape.value_dim) * 2
    return read / seconds_of(run, device)


async def decoding(
    config: PreTrainedConfig, sessions: Sequence[int], prompt: int, decoded: int, device: torch.device
) -> list[dict[str, Any]]:
    """The engine's rates for each number of sessions, then transformers' own, and the limit."""
    engine, weights = random_engine(config, device, max(sessions) * (prompt + decoded + 32))
    bench, bandwidth, rows = Bench(engine, config.hidden_size), copy_bandwidth(device), []
    for count in sessions:
        await bench.decode_together(count, prompt, 4)  # compiles what is not compiled yet
        rows.append({"sessions": count, **await bench.decode_together(count, prompt, decoded)})
    engine.close()
    del bench, engine
    if device.type == "cuda":
        torch.cuda.empty_cache()
    config._attn_implementation = "sdpa"
    with torch.device(device):
        whole = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    [shape] = {kv for kv in kv_shapes(config, Span(0, config.num_hidden_layers)) if kv is not None}
    token_bytes = 2 * config.num_hidden_layers * shape.heads * (shape.key_dim + shape.value_dim)
    for row in rows:
        ids = torch.randint(0, config.vocab_size, (row["sessions"], prompt), device=device)
        generate(whole, ids, 4)
        first, _ = generate(whole, ids, 1)
        all_of_it, _ = generate(whole, ids, decoded)
        theirs = row["sessions"] * (decoded - 1) / (all_of_it - first)
        read = weights + row["sessions"] * (prompt + decoded / 2) * token_bytes
        limit = row["sessions"] * bandwidth / read
        row |= {"transformers_tokens_per_s": theirs, "limit_tokens_per_s": limit}
        row |= {"to_transformers": row["tokens_per_s"] / theirs, "to_limit": row["tokens_per_s"] / limit}
    return rows


def attention(
    config: PreTrainedConfig, sessions: Sequence[int], device: torch.device
) -> list[dict[str, Any]]:
    [shape] = {kv for kv in kv_shapes(config, Span(0, 1)) if kv is not None}
    heads = config.num_attention_heads
    return [
        {
            "sessions": count,
            "context": context,
            "gb_per_s": attention_bandwidth(shape, heads, count, context, device) / 1e9,
        }
        for context in CONTEXTS
        for count in (min(sessions), max(sessions))
        if count * context <= 2**20
    ]


async def measure(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    config = eight_billion(args.blocks)
    properties = torch.cuda.get_device_properties(device)
    return {
        "machine": f"{properties.name}, {platform.machine()}",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "exactness": await exactness(resolve(args.model), device, args.tokens),
        "copy_gb_per_s": copy_bandwidth(device) / 1e9,
        "attention": attention(config, args.sessions, device),
        "blocks": args.blocks,
        "prompt_tokens": args.prompt,
        "decoded_tokens": args.tokens,
        "decode": await decoding(config, args.sessions, args.prompt, args.tokens, device),
        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30,
    }


def show(result: dict[str, Any]) -> None:
    console, exact = Console(), result["exactness"]
    console.print(
        f"{exact['model']}: {exact['float32_equal']} of {exact['float32_tokens']} greedy tokens equal"
        " in float32;"
        f" mean KL of bfloat16 {exact['bfloat16_ours']['mean_kl']:.1e},"
        f" transformers' own {exact['bfloat16_transformers']['mean_kl']:.1e}"
    )
    for row in result["attention"]:
        share = row["gb_per_s"] / result["copy_gb_per_s"]
        console.print(
            f"attention, {row['sessions']} sessions of {row['context']}: {row['gb_per_s']:.0f} GB/s,"
            f" {share:.0%} of a copy"
        )
    table = Table(title=f"{result['machine']}: {result['blocks']} blocks of an 8B Llama, bfloat16, decode")
    for heading in ("sessions", "tokens/s", "ms a step", "transformers", "ratio", "of the limit"):
        table.add_column(heading, justify="right")
    for row in result["decode"]:
        table.add_row(
            str(row["sessions"]),
            f"{row['tokens_per_s']:.0f}",
            f"{row['step_ms']:.1f}",
            f"{row['transformers_tokens_per_s']:.0f}",
            f"{row['to_transformers']:.2f}",
            f"{row['to_limit']:.0%}",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", help="the real model whose answers are compared")
    parser.add_argument("--blocks", type=int, default=32, help="blocks of the random model")
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 4, 8, 16, 32, 64])
    parser.add_argument("--prompt", type=int, default=512, help="tokens that each session begins with")
    parser.add_argument("--tokens", type=int, default=128, help="tokens that each session decodes")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the figures are written")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("This benchmark needs an NVIDIA GPU that torch can use, and there is none here.")
    try:
        result = uvloop.run(measure(args, torch.device("cuda", torch.cuda.current_device())))
    except SwarmError as error:
        sys.exit(str(error))
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=1) + "\n")
    show(result)


if __name__ == "__main__":
    main()
