"""How surely audits catch liars, how seldom they accuse honest peers, and what they cost.

    python -m benchmarks.audit [--model NAME] [--windows 40] [--parts 5] [--json FILE]

Spans of the real model are computed by honest engines of every dtype, with other kernels and threads, and by
liars of several kinds. Each window of text is one audit: what one engine gave is compared with what another
one gives, as `client/auditor.py` does it, at first sight and once it is known how sensitive these blocks and
inputs are. Rates come with Wilson's 95 % intervals. How many sessions a liar lives on at some audit rate is
found in a swarm of eleven on the in-process network, of a model that is arithmetic; what vouching costs a
server is measured alone.
"""

import argparse
import asyncio
import gc
import json
import os
import platform
import random
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import permutations
from math import sqrt
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.audit_costs import vouching_costs
from benchmarks.audit_swarm import lives
from benchmarks.liars import Idle, Inventing, Liar, Noisy, Replaying, Skipping, Zeroing
from swarm.blocks.engine import Engine, EngineConfig
from swarm.blocks.head import Head
from swarm.blocks.models import Model, resolve
from swarm.client.gaps import gaps
from swarm.client.sensitivity import Sensitivity, jittered, sensitivity
from swarm.client.verdict import TRUE, Distance, Form, allowance
from swarm.kernels import layers, linear, pages
from swarm.kernels.codecs import from_wire, to_wire
from swarm.kernels.imprint import Floats, difference, differences, imprint, projected
from swarm.spans import Span

WINDOW = 96
"""Tokens of a window: three vouchers' worth."""

VOUCHED = 32
PARTS = (2 / 3, 1.0), (0.5, 0.54), (0.0, 1 / 3), (1 / 3, 2 / 3), (0.0, 1.0)
"""Which parts of the model's blocks may be audited."""


@dataclass(frozen=True)
class Subject:
    """An engine that is audited, or that audits: how it is made, and as what it is announced."""

    name: str
    form: Form
    make: Callable[[Span], Awaitable[Any]]
    has_native: bool = True
    chunk: int = WINDOW


@dataclass(frozen=True)
class Results:
    """What a subject gave for each window: what is kept of its rows, and the likeliest token after each."""

    subject: Subject
    kept: list[Floats]
    hidden: list[Tensor]
    tokens: list[list[int]]


@dataclass
class Rate:
    """So many of all, with Wilson's interval."""

    hits: int = 0
    trials: int = 0

    def add(self, is_hit: bool) -> None:
        self.hits += is_hit
        self.trials += 1

    def as_json(self) -> dict[str, Any]:
        low, high = self.interval
        return {
            "hits": self.hits,
            "trials": self.trials,
            "rate": round(self.hits / self.trials, 5),
            "from": round(low, 5),
            "to": round(high, 5),
        }

    @property
    def interval(self) -> tuple[float, float]:
        """95 %."""
        z, n, share = 1.96, self.trials, self.hits / self.trials
        middle = (share + z * z / (2 * n)) / (1 + z * z / n)
        half = z * sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return max(0.0, middle - half), min(1.0, middle + half)


class Court:
    """The model, windows of text, and what goes into each span, computed in float32."""

    def __init__(self, model: Model, head: Head, windows: Sequence[Sequence[int]]):
        self.model = model
        self.head = head
        self.windows = windows

    async def inputs(self, span: Span) -> list[Tensor]:
        embedded = [self.head.embed(torch.tensor(window)).float() for window in self.windows]
        if not span.start:
            return embedded
        before = await Engine.load(self.model, Span(0, span.start), config())
        try:
            return [await run(before, hidden, WINDOW) for hidden in embedded]
        finally:
            before.close()

    async def results(self, subject: Subject, span: Span, inputs: Sequence[Tensor]) -> Results:
        with nullcontext() if subject.has_native else torch_kernels():
            engine = await subject.make(span)
            try:
                hidden = [await run(engine, one, subject.chunk) for one in inputs]
            finally:
                engine.close()
                gc.collect()
        is_last = span.end == self.model.num_blocks
        tokens = [self.head.logits(one).argmax(-1).tolist() for one in hidden] if is_last else []
        kept = [projected(one.numpy()) for one in hidden]
        return Results(subject, kept, hidden, tokens)

    async def sensitivities(
        self, subject: Subject, span: Span, inputs: Sequence[Tensor], given: Results
    ) -> list[Sensitivity]:
        """Of each window, as the subject shows it."""
        moved = await self.results(subject, span, list(map(jittered, inputs)))
        return [sensitivity(*three) for three in zip(inputs, given.hidden, moved.hidden, strict=True)]


def config(dtype: str = "float32", quantize: str = "none", threads: int = 2) -> EngineConfig:
    return EngineConfig(dtype=dtype, device="cpu", quantize=quantize, kv_tokens=4 * WINDOW, threads=threads)


async def run(engine: Any, hidden: Tensor, chunk: int) -> Tensor:
    form = engine.precision.wire_dtype, engine.precision.codec
    engine.open_session("window", engine.span, len(hidden))
    given = []
    for start in range(0, len(hidden), chunk):
        part = hidden[start : start + chunk]
        done = await engine.step("window", start, to_wire(part, *form), tuple(part.shape), *form)
        given.append(from_wire(done.data, done.shape, done.dtype, done.codec).float())
    engine.close_session("window")
    return torch.cat(given)


@contextmanager
def torch_kernels() -> Iterator[None]:
    """As on a machine where the native kernels were not built."""
    native = linear.native
    for module in (linear, layers, pages):
        module.native = None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in (linear, layers, pages):
            module.native = native  # type: ignore[attr-defined]


def honest(model: Model) -> list[Subject]:
    def made(*form: Any) -> Callable[[Span], Awaitable[Engine]]:
        return lambda span: Engine.load(model, span, config(*form))

    return [
        Subject("float32", TRUE, made("float32")),
        Subject("float32, one thread, by few tokens", TRUE, made("float32", "none", 1), chunk=5),
        Subject("float32, torch's kernels", TRUE, made("float32"), has_native=False),
        Subject("float16", ("float16", "none"), made("float16")),
        Subject("float16, torch's kernels", ("float16", "none"), made("float16"), has_native=False),
        Subject("bfloat16", ("bfloat16", "none"), made("bfloat16")),
        Subject("float32, int8", ("float32", "int8"), made("float32", "int8")),
        Subject("bfloat16, int8", ("bfloat16", "int8"), made("bfloat16", "int8")),
    ]


def liars(model: Model, others: dict[str, Model]) -> list[Subject]:
    def load(of: Model, *form: Any) -> Callable[[Span], Awaitable[Any]]:
        return lambda span: Engine.load(of, span, config(*form))

    def lying(kind: Callable[[Engine], Liar]) -> Callable[[Span], Awaitable[Any]]:
        async def make(span: Span) -> Any:
            return kind(await Engine.load(model, span, config()))

        return make

    def noise(size: float, every: int = 1) -> Callable[[Span], Awaitable[Any]]:
        return lying(lambda engine: Noisy(engine, size, every))

    return [
        *(Subject(f"weights: {name}", TRUE, load(other)) for name, other in others.items()),
        Subject("int8 announced as float32", TRUE, load(model, "float32", "int8")),
        Subject("bfloat16 announced as float32", TRUE, load(model, "bfloat16")),
        Subject("int8 announced as bfloat16", ("bfloat16", "none"), load(model, "bfloat16", "int8")),
        Subject("blocks whose weights are zero", TRUE, lying(Idle)),
        Subject("the last block left out", TRUE, lying(Skipping)),
        Subject("a tenth of the channels zero", TRUE, lying(Zeroing)),
        Subject("random results", TRUE, lying(Inventing)),
        Subject("noise of 10 %", TRUE, noise(0.1)),
        Subject("noise of 1 %", TRUE, noise(0.01)),
        Subject("noise of 0.1 %", TRUE, noise(0.001)),
        Subject("noise of 10 % in one row of 32", TRUE, noise(0.1, 32)),
        Subject("results of another text", TRUE, lying(Replaying)),
    ]


def perturbed(model: Model, folder: Path) -> dict[str, Model]:
    """Checkpoints of the same shape: each matrix of the blocks another one, or with noise or an update."""
    made = {}
    for name, change in (
        ("others of the same size", lambda weight: weight.std() * torch.randn_like(weight)),
        ("noise of 1 %", lambda weight: weight + 0.01 * weight.std() * torch.randn_like(weight)),
        ("noise of 0.1 %", lambda weight: weight + 0.001 * weight.std() * torch.randn_like(weight)),
        ("a fine-tuning of rank 8, 1 %", lambda weight: weight + _low_rank(weight, 0.01)),
    ):
        torch.manual_seed(0)
        target = folder / name.replace(" ", "-").replace("%", "percent")
        shutil.copytree(model.path, target)
        for file in target.glob("*.safetensors"):
            tensors = load_file(file)
            for key, weight in tensors.items():
                if ".layers." in key and weight.dim() == 2:
                    tensors[key] = change(weight.float())
            save_file({key: one.float().contiguous() for key, one in tensors.items()}, file)
        made[name] = resolve(str(target))
    return made


def _low_rank(weight: Tensor, size: float) -> Tensor:
    update = torch.randn(len(weight), 8) @ torch.randn(8, weight.shape[1])
    return update * (size * weight.norm() / update.norm())


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    model = resolve(args.model)
    head = Head.load(model, "float32", "cpu")
    court = Court(model, head, list(windows_of(head.tokenizer, args.windows)))
    with tempfile.TemporaryDirectory() as folder:
        others = await asyncio.to_thread(perturbed, model, Path(folder))
        found = await judged(court, honest(model), liars(model, others), args.parts)
    return {
        "model": args.model,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "windows": args.windows,
        "window_tokens": WINDOW,
        **found,
    }


async def judged(
    court: Court, peers: Sequence[Subject], wrong: Sequence[Subject], parts: int
) -> dict[str, Any]:
    """Of pairs of honest peers how many are told apart, and of liars and honest witnesses."""
    alarms: dict[str, Case] = {}
    lies: dict[str, Case] = {}
    growths: list[dict[str, Any]] = []
    for part in PARTS[:parts]:
        span = Span(*(round(edge * court.model.num_blocks) for edge in part))
        inputs = await court.inputs(span)
        results = [await court.results(peer, span, inputs) for peer in peers]
        found = await court.sensitivities(peers[0], span, inputs, results[0])
        growths.append({"blocks": list(span), **spread([one.growth for one in found])})
        for one, other in permutations(results, 2):
            name = f"{one.subject.name} / {other.subject.name}"
            alarms.setdefault(name, Case()).add(court, one, other, span, found)
        witnesses = {one.subject.form: one for one in results if one.subject.name in ("float32", "bfloat16")}
        for subject in wrong:
            if span.size == 1 and "left out" in subject.name:
                continue  # who has one block cannot leave it out unseen
            lied = await court.results(subject, span, inputs)
            for form, witness in witnesses.items():
                name = f"{subject.name} / {form[0]}"
                lies.setdefault(name, Case()).add(court, lied, witness, span, found)
            print(f"{span}: {subject.name}", flush=True)
    return {
        "growth": growths,
        "false_alarms": {name: case.as_json() for name, case in alarms.items()},
        "false_alarms_together": together(alarms.values()).as_json(),
        "detection": {name: case.as_json() for name, case in lies.items()},
    }


def together(cases: Iterable["Case"]) -> Rate:
    """Who was caught in all of them."""
    rates = [case.caught for case in cases]
    return Rate(sum(one.hits for one in rates), sum(one.trials for one in rates))


def spread(some: Sequence[float]) -> dict[str, float]:
    return {"median": round(median(some), 3), "least": round(min(some), 3), "most": round(max(some), 3)}


class Case:
    """Audits of one kind: how many found a difference, and by how much of what is allowed."""

    def __init__(self) -> None:
        self.suspected, self.caught, self.vouchers, self.tokens = Rate(), Rate(), Rate(), Rate()
        self._parts: dict[str, list[float]] = {"mean": [], "row": [], "gap": []}

    def add(
        self, court: Court, one: Results, other: Results, span: Span, found: Sequence[Sensitivity]
    ) -> None:
        usual = allowance([one.subject.form, other.subject.form], "raw", span.size)
        for at, (mine, yours) in enumerate(zip(one.kept, other.kept, strict=True)):
            allowed = found[at].of(usual)
            apart = Distance.of(differences(mine, yours))
            self.suspected.add(apart.exceeds(usual))
            self.caught.add(apart.exceeds(usual) and apart.exceeds(allowed))
            self._parts["mean"].append(apart.mean / allowed.mean)
            self._parts["row"].append(apart.row / allowed.row)
            for start in range(0, len(mine), VOUCHED):
                rows = slice(start, start + VOUCHED)
                distance = max(difference(imprint(mine[rows], start), yours[rows], start))
                self.vouchers.add(distance > allowed.mean)
            if one.tokens:
                gap = max(gaps(court.head.logits(other.hidden[at]), one.tokens[at]))
                self.tokens.add(gap > allowed.gap)
                self._parts["gap"].append(gap / allowed.gap)

    def as_json(self) -> dict[str, Any]:
        return {
            "suspected": self.suspected.as_json(),
            "caught": self.caught.as_json(),
            "vouchers": self.vouchers.as_json(),
            "tokens": self.tokens.as_json() if self.tokens.trials else None,
            "of_allowed": {name: spread(some) for name, some in self._parts.items() if some},
        }


def windows_of(tokenizer: Any, count: int) -> Iterator[list[int]]:
    """Windows of English and of programs: what people send. Each fourth is noise, or a token repeated."""
    root = Path(__file__).parent.parent
    files = [root / "LICENSE", root / "README.md", *sorted((root / "docs").glob("*.md")), Path(__file__)]
    texts = [tokenizer(file.read_text()).input_ids for file in files]
    rng = random.Random(0)
    for index in range(count):
        if index % 4 == 3:
            tokens = rng.choices(range(len(tokenizer)), k=WINDOW if index % 8 == 3 else 1)
            yield (tokens * WINDOW)[:WINDOW]
            continue
        text = texts[index % len(texts)]
        start = (index // len(texts)) * 2 * WINDOW % max(1, len(text) - WINDOW)
        yield text[start : start + WINDOW]


def show(result: dict[str, Any]) -> None:
    for title, cases in (("honest peers", result["false_alarms"]), ("liars", result["detection"])):
        table = Table(
            *("audited / witness", "suspected", "caught", "95 %"),
            *("by vouchers", "by tokens", "of allowed"),
            title=title,
        )
        for name, case in cases.items():
            rate, tokens = case["caught"], case["tokens"]
            table.add_row(
                name,
                f"{100 * case['suspected']['rate']:.1f} %",
                f"{100 * rate['rate']:.1f} %",
                f"{100 * rate['from']:.1f} to {100 * rate['to']:.1f} %",
                f"{100 * case['vouchers']['rate']:.1f} %",
                "" if tokens is None else f"{100 * tokens['rate']:.1f} %",
                ", ".join(
                    f"{part} {most['least']:.2g}-{most['most']:.2g}"
                    for part, most in case["of_allowed"].items()
                ),
            )
        Console(width=180).print(table)
    others = ("growth", "false_alarms_together", "lives", "costs")
    print(json.dumps({name: result[name] for name in others}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--parts", type=int, default=len(PARTS), help="so many of the model's parts")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(2)
    result = asyncio.run(measure(args)) | {"lives": lives(), "costs": vouching_costs()}
    show(result)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
