"""What each dtype, quantisation and form of travelling loses against float32: the real chat model on a text,
in one process.

    python -m benchmarks.precision [--tokens 1024] [--json FILE]

Prints the mean Kullback-Leibler divergence of the next token's distribution from that in float32, in nats,
and how often both put the same token first. For activations that travel as fewer bits between hops in
float32 also how many greedy answers stay the same, and after how many tokens the others go another way.
nf4 is left out where bitsandbytes is not installed.
"""

import argparse
import asyncio
import json
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from swarm.blocks.engine import Engine, EngineConfig
from swarm.blocks.head import Head
from swarm.blocks.models import Model, resolve
from swarm.blocks.precision import WireForm
from swarm.kernels.codecs import from_wire, to_wire
from swarm.kernels.quantised import has_bitsandbytes
from swarm.net.forms import Wire
from swarm.page_keys import PAGE_TOKENS
from swarm.spans import Span

EXACT = "float32"
STEP = 16
"""Tokens a step: few enough for the native loops, which decoding uses."""

WIRES: tuple[Wire, ...] = ("half", "int8")
HOPS = 3
PROMPTS = 24
PROMPT = ANSWER = 64
"""Tokens of each prompt, and of the greedy answer to it."""


@dataclass(frozen=True)
class Loss:
    """`divergence` in nats; `same_first` is a share of all tokens."""

    divergence: float
    same_first: float

    @classmethod
    def of(cls, found: Tensor, exact: Tensor) -> "Loss":
        """From log probabilities [tokens, vocabulary]."""
        divergence = torch.nn.functional.kl_div(found, exact, log_target=True, reduction="batchmean")
        same = (found.argmax(-1) == exact.argmax(-1)).float().mean()
        return cls(float(divergence), float(same))


@dataclass(frozen=True)
class WireLoss(Loss):
    """`share`: bytes of a token on the wire to those of float32; `same_answers` is a share of all.

    The other answers stay the same for `until` tokens, as a median.
    """

    share: float
    same_answers: float
    until: float | None


@dataclass(frozen=True)
class Hops:
    """Engines that hold successive spans. Hidden states travel from one to the next as `form`."""

    engines: Sequence[Engine]
    head: Head
    form: WireForm

    @classmethod
    async def load(cls, model: Model, dtype: str, quantize: str, hops: int, kv_tokens: int) -> "Hops":
        config = EngineConfig(dtype=dtype, device="cpu", quantize=quantize, kv_tokens=kv_tokens)
        edges = [round(model.num_blocks * at / hops) for at in range(hops + 1)]
        engines = [await Engine.load(model, Span(*edge), config) for edge in pairwise(edges)]
        return cls(engines, Head.load(model, dtype, "cpu"), engines[0].wire_form("exact"))

    def travelling(self, wish: Wire) -> "Hops":
        return replace(self, form=self.engines[0].wire_form(wish))

    def close(self) -> None:
        for engine in self.engines:
            engine.close()

    @contextmanager
    def session(self, name: str, max_tokens: int) -> Iterator[None]:
        for engine in self.engines:
            engine.open_session(name, engine.span, max_tokens)
        yield
        for engine in self.engines:
            engine.close_session(name)

    async def step(self, session: str, seq_pos: int, tokens: Sequence[int]) -> Tensor:
        """Log probabilities [tokens, vocabulary] of the next token after each."""
        hidden = self.head.embed(torch.tensor(tokens))
        for engine in self.engines:
            if engine is not self.engines[0]:
                hidden = self._sent(hidden)
            exact = engine.precision.wire_dtype, engine.precision.codec
            shape = tuple(hidden.shape)
            done = await engine.step(session, seq_pos, to_wire(hidden, *exact), shape, *exact)
            hidden = from_wire(done.data, done.shape, done.dtype, done.codec)
        return self.head.logits(hidden).log_softmax(-1)

    async def read(self, tokens: Sequence[int]) -> Tensor:
        """`step` over all tokens, some at a time. The two ends of the model are not quantised."""
        with self.session("text", len(tokens)):
            starts = range(0, len(tokens), STEP)
            return torch.cat([await self.step("text", at, tokens[at : at + STEP]) for at in starts])

    async def answer(self, prompt: Sequence[int]) -> list[int]:
        """The greedy answer. Several at once share batches."""
        name, answer = str(prompt), list[int]()
        with self.session(name, len(prompt) + ANSWER):
            seq_pos, tokens = 0, list(prompt)
            while len(answer) < ANSWER:
                likely = await self.step(name, seq_pos, tokens)
                seq_pos, tokens = seq_pos + len(tokens), [int(likely[-1].argmax())]
                answer += tokens
        return answer

    def _sent(self, hidden: Tensor) -> Tensor:
        form = self.form.wire_dtype, self.form.codec
        return from_wire(to_wire(hidden, *form), tuple(hidden.shape), *form)


async def weights_losses(model: Model, tokens: Sequence[int]) -> dict[str, Loss]:
    """What each way to hold the weights loses, by name."""
    lossy = [("float16", "none"), ("bfloat16", "none"), (EXACT, "int8")]
    if has_bitsandbytes():
        lossy.append((EXACT, "nf4"))
    exact = await _read_once(model, EXACT, "none", tokens)
    return {
        dtype if quantize == "none" else quantize: Loss.of(
            await _read_once(model, dtype, quantize, tokens), exact
        )
        for dtype, quantize in lossy
    }


async def wire_losses(model: Model, tokens: Sequence[int], texts: Sequence[int]) -> dict[str, WireLoss]:
    """What each form loses between float32 hops, by name."""
    kv_tokens = max(len(tokens), PROMPTS * (PROMPT + ANSWER)) + PROMPTS * PAGE_TOKENS
    hops = await Hops.load(model, EXACT, "none", HOPS, kv_tokens)
    starts = range(0, len(texts) - PROMPT, (len(texts) - PROMPT) // PROMPTS)
    prompts = [texts[at : at + PROMPT] for at in starts][:PROMPTS]
    exact = await hops.read(tokens)
    answers = await asyncio.gather(*map(hops.answer, prompts))
    losses: dict[str, WireLoss] = {}
    for wish in WIRES:
        other = hops.travelling(wish)
        loss = Loss.of(await other.read(tokens), exact)
        others = await asyncio.gather(*map(other.answer, prompts))
        same = [_same_tokens(*pair) for pair in zip(answers, others, strict=True)]
        parted = [count for count in same if count < ANSWER]
        losses[wish] = WireLoss(
            loss.divergence,
            loss.same_first,
            share=_token_bytes(other.form, model) / _token_bytes(hops.form, model),
            same_answers=1 - len(parted) / len(same),
            until=median(parted) if parted else None,
        )
    hops.close()
    return losses


async def measure(name: str, count: int) -> dict[str, Any]:
    model = resolve(name)
    text = (Path(__file__).parent.parent / "LICENSE").read_text()
    tokens = Head.load(model, EXACT, "cpu").tokenizer(text).input_ids
    weights = await weights_losses(model, tokens[:count])
    wire = await wire_losses(model, tokens[:count], tokens)
    return {
        "model": name,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "tokens": count,
        "weights": {key: asdict(loss) for key, loss in weights.items()},
        "wire": {key: asdict(loss) for key, loss in wire.items()},
        "hops": HOPS,
        "answers": PROMPTS,
        "answer_tokens": ANSWER,
    }


def show(result: dict[str, Any]) -> None:
    title = f"{result['model']}, {result['tokens']} tokens, against {EXACT}"
    table = Table("weights", "mean divergence", "same first", title=title)
    for name, loss in result["weights"].items():
        table.add_row(name, f"{loss['divergence']:.1e}", f"{100 * loss['same_first']:.1f} %")
    Console().print(table)
    title = f"between {result['hops']} hops; {result['answers']} answers of {result['answer_tokens']} tokens"
    table = Table(
        "wire", "size", "mean divergence", "same first", "same answers", "others until", title=title
    )
    for name, loss in result["wire"].items():
        table.add_row(
            name,
            f"{loss['share']:.2f}",
            f"{loss['divergence']:.1e}",
            f"{100 * loss['same_first']:.1f} %",
            f"{100 * loss['same_answers']:.0f} %",
            "" if loss["until"] is None else f"{loss['until']:g} tokens",
        )
    Console().print(table)


async def _read_once(model: Model, dtype: str, quantize: str, tokens: Sequence[int]) -> Tensor:
    hops = await Hops.load(model, dtype, quantize, 1, len(tokens))
    read = await hops.read(tokens)
    hops.close()
    return read


def _same_tokens(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(one, other, strict=True))
    return next((at for at, (mine, yours) in pairs if mine != yours), len(one))


def _token_bytes(form: WireForm, model: Model) -> int:
    return len(to_wire(torch.zeros(1, model.config["hidden_size"]), form.wire_dtype, form.codec))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    result = asyncio.run(measure(args.model, args.tokens))
    show(result)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
