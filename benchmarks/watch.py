"""Watching servers from outside: their metrics, their memory, and whether pages of KV memory got lost."""

import asyncio
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, linear_regression
from typing import Any

import psutil

from swarm.processes import ServerProcess

READ_TIMEOUT = 30.0
SETTLING = 20.0
"""Seconds in which a server must have noticed that everybody left."""

COURSE = 15
"""Samples to show of a run."""

FREE_TOKENS = "swarm_kv_unpromised_tokens"
USED_PAGES = 'swarm_kv_pages{state="used"}'
SESSIONS = "swarm_sessions"
QUEUE = "swarm_queue_steps"


def metrics_of(server: ServerProcess) -> dict[str, float]:
    """The metrics of a server that was started with `--metrics-port`, by name and labels. Blocks."""
    url = next(event["url"] for event in server.events if event["event"] == "metrics")
    with urllib.request.urlopen(url, timeout=READ_TIMEOUT) as answer:
        lines = answer.read().decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


async def losses(server: ServerProcess, kv_tokens: float) -> list[str]:
    """What a server without visitors still holds after `SETTLING` seconds, of `kv_tokens` tokens of room."""
    deadline = time.monotonic() + SETTLING
    while True:
        said = await asyncio.to_thread(metrics_of, server)
        held = {
            "sessions": said[SESSIONS],
            "steps": said[QUEUE],
            "used pages": said[USED_PAGES],
            "promised tokens": kv_tokens - said[FREE_TOKENS],
        }
        lost = [f"{server.name} holds {count:g} {what}" for what, count in held.items() if count]
        if not lost or time.monotonic() > deadline:
            return lost
        await asyncio.sleep(0.25)


@dataclass(frozen=True)
class Memory:
    """Bytes of a server at a moment: resident and proportional of its process, resident of its daemon."""

    at: float
    rss: int
    pss: int
    daemon_rss: int


def memory_of(server: ServerProcess) -> Memory:
    process = psutil.Process(server.pid)
    own = process.memory_full_info()
    daemons = sum(child.memory_info().rss for child in process.children(recursive=True))
    return Memory(time.monotonic(), own.rss, own.pss, daemons)


def growth(samples: Sequence[Memory], field: str) -> dict[str, Any]:
    """How memory went: a `course` of some samples in MiB, and its growth as fractions.

    `fitted` is what a line through all samples gains from the first to the last; `highest` how far the
    highest sample is above the mean of the first quarter.
    """
    times = [sample.at for sample in samples]
    sizes = [getattr(sample, field) / 2**20 for sample in samples]
    slope = linear_regression(times, sizes).slope if len(set(times)) > 1 else 0.0
    begin = fmean(sizes[: max(1, len(sizes) // 4)])
    return {
        "mean_mib": fmean(sizes),
        "course": [round(size, 1) for size in sizes[:: max(1, len(sizes) // COURSE)]],
        "fitted": slope * (times[-1] - times[0]) / fmean(sizes),
        "highest": max(sizes) / begin - 1,
    }
