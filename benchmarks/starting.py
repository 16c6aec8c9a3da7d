"""How long a server takes until it listens, and until it serves, and with how much processor time.

    python -m benchmarks.starting [--rounds 5] [--together 1] [--json FILE]

Servers of a third of the real model start anew, each a swarm of its own, `--together` of them at once;
figures are medians over all.
"""

import argparse
import asyncio
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.servers import STARTING, server_process
from swarm.spans import Span

MODEL, DTYPE, SPAN = "smollm2-135m", "float16", Span(0, 10)


@dataclass(frozen=True)
class Start:
    """Seconds from the start, and of processor time, until the server listened and until it served."""

    listening: float
    listening_cpu: float
    serving: float
    serving_cpu: float


async def start(folder: Path, number: int) -> Start:
    async with server_process(MODEL, DTYPE, SPAN, folder / f"{number}.log") as server:
        process, started = psutil.Process(server.pid), time.perf_counter()
        await server.wait_for("listening", STARTING)
        listening, listening_cpu = time.perf_counter() - started, sum(process.cpu_times()[:2])
        await server.wait_for("serving", STARTING)
        return Start(listening, listening_cpu, time.perf_counter() - started, sum(process.cpu_times()[:2]))


async def measure(rounds: int, together: int) -> list[Start]:
    starts: list[Start] = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            some = [start(Path(folder), number) for number in range(together)]
            starts += await asyncio.gather(*some)
    return starts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--together", type=int, default=1, help="servers that start at once")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    starts = asyncio.run(measure(args.rounds, args.together))
    found = {name: median(asdict(one)[name] for one in starts) for name in asdict(starts[0])}
    table = Table("until it", "seconds", "processor seconds")
    for event in ("listening", "serving"):
        table.add_row(event, f"{found[event]:.1f}", f"{found[f'{event}_cpu']:.1f}")
    Console().print(table)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"together": args.together, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
