"""What each dtype and quantisation loses against float32: the real chat model on a text, in one process.

    python -m benchmarks.precision [--tokens 1024]

Prints the mean Kullback-Leibler divergence of the next token's distribution from that in float32, in
nats, and how often both put the same token first. nf4 is left out where bitsandbytes is not installed.
"""

import argparse
import asyncio
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from swarm.blocks.engine import Engine, EngineConfig
from swarm.blocks.head import Head
from swarm.blocks.models import Model, resolve
from swarm.kernels.codecs import from_wire, to_wire
from swarm.kernels.quantised import has_bitsandbytes
from swarm.spans import Span

EXACT = "float32"
STEP = 16
"""Tokens a step: few enough for the native loops, which decoding uses."""


async def log_probabilities(model: Model, dtype: str, quantize: str, tokens: list[int]) -> Tensor:
    """Of every next token after each of `tokens`: [tokens, vocabulary]. The two ends are not quantised."""
    config = EngineConfig(dtype=dtype, device="cpu", quantize=quantize, kv_tokens=len(tokens))
    engine = await Engine.load(model, Span(0, model.num_blocks), config)
    head, wire = Head.load(model, dtype, "cpu"), engine.precision.wire_dtype
    engine.open_session("precision", engine.span, len(tokens))
    rows = []
    for start in range(0, len(tokens), STEP):
        hidden = head.embed(torch.tensor(tokens[start : start + STEP]))
        data = to_wire(hidden, wire)
        result = await engine.step("precision", start, data, tuple(hidden.shape), wire, "raw")
        out = from_wire(result.data, result.shape, result.dtype, result.codec)
        rows.append(head.logits(out).log_softmax(-1))
    engine.close()
    return torch.cat(rows)


async def measure(name: str, count: int) -> None:
    model = resolve(name)
    text = (Path(__file__).parent.parent / "LICENSE").read_text()
    tokens = Head.load(model, EXACT, "cpu").tokenizer(text).input_ids[:count]
    exact = await log_probabilities(model, EXACT, "none", tokens)
    table = Table(
        "weights", "mean divergence", "same first", title=f"{name}, {len(tokens)} tokens, against {EXACT}"
    )
    lossy = [("float16", "none"), ("bfloat16", "none"), (EXACT, "int8")]
    for dtype, quantize in [*lossy, (EXACT, "nf4")] if has_bitsandbytes() else lossy:
        other = await log_probabilities(model, dtype, quantize, tokens)
        divergence = torch.nn.functional.kl_div(other, exact, log_target=True, reduction="batchmean")
        same = (other.argmax(-1) == exact.argmax(-1)).float().mean()
        table.add_row(dtype if quantize == "none" else quantize, f"{divergence:.1e}", f"{100 * same:.1f} %")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=1024)
    args = parser.parse_args()
    asyncio.run(measure(args.model, args.tokens))


if __name__ == "__main__":
    main()
