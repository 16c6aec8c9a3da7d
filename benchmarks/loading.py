"""Memory and time that loading a span takes, beyond the shard that is left in the end. Linux only.

    python -m benchmarks.loading [--spans 0:10 0:30] [--dtypes float32 float16 bfloat16] [--json FILE]

Each measurement is a fresh process that loads one block first, so that imports and whatever else happens
only once lie below the base. The peak is the kernel's own high-water mark of resident memory, counted
from that base.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from math import prod
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console
from rich.table import Table

from swarm.blocks.engine import Engine, EngineConfig
from swarm.blocks.heap import give_back_freed_memory
from swarm.blocks.models import Model, resolve
from swarm.errors import InputError
from swarm.spans import Span

VALUE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
PROCESS = Path("/proc/self")


@dataclass(frozen=True)
class Loading:
    """One span loaded: MiB of its weights, MiB resident at the peak and in the end beyond the base."""

    span: str
    dtype: str
    shard_mib: float
    peak_mib: float
    final_mib: float
    seconds: float

    @property
    def ratio(self) -> float:
        return self.peak_mib / self.shard_mib


def measure(name: str, span: Span, dtype: str) -> Loading:
    """Load blocks `span`; to be run in a process of its own."""
    model = resolve(name)
    load(model, Span(span.start, span.start + 1), dtype).close()
    give_back_freed_memory()
    base = resident_mib("VmRSS")
    (PROCESS / "clear_refs").write_text("5")  # forgets the peak so far, see proc_pid_clear_refs(5)
    started = time.perf_counter()
    engine = load(model, span, dtype)
    seconds = time.perf_counter() - started
    peak, final = resident_mib("VmHWM"), resident_mib("VmRSS")
    engine.close()
    return Loading(str(span), dtype, shard_mib(model, span, dtype), peak - base, final - base, seconds)


def load(model: Model, span: Span, dtype: str) -> Engine:
    config = EngineConfig(dtype=dtype, device="cpu", kv_tokens=1024, threads=1)
    return asyncio.run(Engine.load(model, span, config))


def resident_mib(field: str) -> float:
    """`VmRSS`, what is resident now, or `VmHWM`, the most that ever was."""
    for line in (PROCESS / "status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == field:
            return int(value.split()[0]) / 1024
    raise ValueError(f"this kernel does not tell {field}")


def shard_mib(model: Model, span: Span, dtype: str) -> float:
    """What the weights of a span take when they are loaded."""
    blocks = model.checkpoint.block_tensors(span).values()
    values = sum(prod(model.checkpoint.entry(name).shape) for names in blocks for name in names)
    return values * VALUE_BYTES[dtype] / 2**20


def show(model: str, loadings: Sequence[Loading]) -> None:
    table = Table(title=f"Loading {model}: MiB beyond the process as it was before")
    for heading in ("blocks", "dtype", "shard", "peak", "peak / shard", "in the end", "seconds"):
        table.add_column(heading, justify="left" if heading in ("blocks", "dtype") else "right")
    for loading in loadings:
        table.add_row(
            loading.span,
            loading.dtype,
            f"{loading.shard_mib:.1f}",
            f"{loading.peak_mib:.1f}",
            f"{loading.ratio:.2f}",
            f"{loading.final_mib:.1f}",
            f"{loading.seconds:.2f}",
        )
    Console().print(table)


def span_of(text: str) -> Span:
    try:
        return Span.parse(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(f"{error.message} {error.hint}") from error


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--spans", nargs="+", type=span_of, default=[Span(0, 10), Span(0, 30)])
    parser.add_argument("--dtypes", nargs="+", choices=list(VALUE_BYTES), default=list(VALUE_BYTES))
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as fresh:
        futures = [
            fresh.submit(measure, args.model, span, dtype) for span in args.spans for dtype in args.dtypes
        ]
        loadings = [future.result() for future in futures]
    show(args.model, loadings)
    if args.json:
        figures = [{**asdict(loading), "ratio": loading.ratio} for loading in loadings]
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
