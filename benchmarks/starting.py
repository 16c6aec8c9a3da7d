"""How long a server takes until it listens, and until it serves, and with how much processor time.

    python -m benchmarks.starting [--rounds 5] [--together 1] [--forked] [--json FILE]

Servers of a third of the real model start, each a swarm of its own, `--together` of them at once: anew, or
`--forked` from a process that has imported what they need. Figures are medians over all.
"""

import argparse
import asyncio
import json
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.servers import STARTING, fork_server, server_process
from swarm.processes import Launcher
from swarm.spans import Span

MODEL, DTYPE, SPAN = "smollm2-135m", "float16", Span(0, 10)


@dataclass(frozen=True)
class Start:
    """Seconds from the start, and of processor time, until the server listened and until it served."""

    listening: float
    listening_cpu: float
    serving: float
    serving_cpu: float


async def start(log: Path, launcher: Launcher | None) -> Start:
    started = time.perf_counter()
    async with server_process(MODEL, DTYPE, SPAN, log, launcher=launcher) as server:
        process = psutil.Process(server.pid)
        await server.wait_for("listening", STARTING)
        listening, listening_cpu = time.perf_counter() - started, sum(process.cpu_times()[:2])
        await server.wait_for("serving", STARTING)
        return Start(listening, listening_cpu, time.perf_counter() - started, sum(process.cpu_times()[:2]))


async def measure(rounds: int, together: int, launcher: Launcher | None) -> list[Start]:
    starts: list[Start] = []
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"{number}.log") for number in range(together)]
        if launcher is not None:
            await start(logs[0], launcher)  # waits until the fork server has imported everything
        for _ in range(rounds):
            starts += await asyncio.gather(*(start(log, launcher) for log in logs))
    return starts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--together", type=int, default=1, help="servers that start at once")
    parser.add_argument("--forked", action="store_true", help="fork them, in place of starting them anew")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    with fork_server() if args.forked else nullcontext() as launcher:
        starts = asyncio.run(measure(args.rounds, args.together, launcher))
    found = {name: median(asdict(one)[name] for one in starts) for name in asdict(starts[0])}
    table = Table("until it", "seconds", "processor seconds")
    for event in ("listening", "serving"):
        table.add_row(event, f"{found[event]:.1f}", f"{found[f'{event}_cpu']:.1f}")
    Console().print(table)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        asked = {"together": args.together, "forked": args.forked}
        args.json.write_text(json.dumps(asked | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
