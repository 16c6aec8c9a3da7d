"""A swarm of ten to ten thousand servers, simulated: does it cover its model, and what does it carry?

    python -m benchmarks.simulate [--servers 10,100,1000,10000] [--hours 1] [--quick] [--parts PART,…]

The code that decides is the real one everywhere; how much of the rest is, depends on what can be computed:

- `optimum`: the real placement against the best placement there is, on swarms so small that it can be found.
- `whole`: real servers, clients, sessions and directory on an in-process network and a simulated clock, up
  to 100 servers: how they arrange themselves while others come and go, and how sessions fare under load.
- `crowd`: the real decisions about where servers go, second by second, for any number of servers; and the
  real routes of many sessions through where these are in the end.
- `dht`: the real DHT, with that many peers, of which some announce and read as servers do.

What is modelled stands at the heads of `world`, `population` and `simulated_engine`; docs/simulation.md tells
what came out. The same seed gives the same figures, but for those of the processor's time.
"""

import os
import sys

if __name__ == "__main__" and os.environ.get("PYTHONHASHSEED") != "0":
    os.environ["PYTHONHASHSEED"] = "0"  # or sets of names would be in another order in each process
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.simulate", *sys.argv[1:]])

import argparse
import json
import logging
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import simulate_report, simulated_parts
from benchmarks.simulated_parts import Row, Scale

PARTS: dict[str, Callable[[Scale], Iterator[Row]]] = {
    "optimum": simulated_parts.optimum,
    "whole": simulated_parts.whole,
    "crowd": simulated_parts.crowd,
    "dht": simulated_parts.dht,
}

PROCESSOR_TIMES = {"placing_ms", "planning_ms", "routing", "processor_s"}
"""The figures that are others in each run."""


def numbers(text: str) -> tuple[int, ...]:
    return tuple(sorted(int(number) for number in text.split(",")))


def parts(text: str) -> list[str]:
    chosen = text.split(",")
    if unknown := set(chosen) - set(PARTS):
        raise argparse.ArgumentTypeError(f"there are no parts {sorted(unknown)}, but {list(PARTS)}")
    return chosen


def size(row: Row) -> tuple[Any, ...]:
    """What a row is of: no part has two of the same."""
    return tuple(row[name] for name in ("servers", "peers", "records") if name in row)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--servers", type=numbers, default=(10, 100, 1000, 10000))
    parser.add_argument("--hours", type=float, default=1.0, help="of churn, at most; default: %(default)s")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a taste of all, with ten servers")
    parser.add_argument("--parts", type=parts, default=list(PARTS), help="default: all")
    parser.add_argument(
        "--json", type=Path, help="also write the figures here; parts and sizes not run are kept"
    )
    parser.add_argument("--plots", type=Path, help="also draw them into this folder")
    args = parser.parse_args()
    scale = Scale(args.servers, args.hours, args.seed)
    if args.quick:
        scale = Scale((10,), 0.05, args.seed, small=1, whole_minutes=20.0, loads=(0.5,))
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # hivemind leaves tasks behind when it ends
    logging.getLogger("swarm").setLevel(logging.ERROR)
    result: dict[str, Any] = {}
    if args.json and args.json.exists():
        result = json.loads(args.json.read_text())
    result |= {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "seed": args.seed}
    for part in args.parts:
        for row in PARTS[part](scale):
            others = [one for one in result.get(part, []) if size(one) != size(row)]
            result[part] = sorted([*others, row], key=size)
            print(f"{part}: {' '.join(map(str, size(row)))} done", file=sys.stderr, flush=True)
            if args.json:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps(result, indent=1) + "\n")
    simulate_report.show(result)
    if args.plots:
        from benchmarks import simulate_plots  # matplotlib comes with the extra "bench" alone

        simulate_plots.draw(result, args.plots)
    return 0


if __name__ == "__main__":
    sys.exit(main())
