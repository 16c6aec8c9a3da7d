"""Servers as processes of their own on loopback, for measurements and long runs."""

import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from swarm.forking import ForkServer
from swarm.processes import Launcher, ServerProcess, stop_all
from swarm.spans import Span

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
STARTING = 120.0
"""Seconds within which a server must have loaded its blocks."""


@dataclass(frozen=True)
class Servers:
    """Running servers, in the order of their spans, and the addresses to join them by."""

    processes: list[ServerProcess]
    addresses: list[str]


@asynccontextmanager
async def serving(
    model: str,
    dtype: str,
    spans: Sequence[Span],
    folder: Path,
    *options: str,
    launcher: Launcher | None = None,
) -> AsyncIterator[Servers]:
    """One server with one thread for each of `spans`, once all serve; their logs go to `folder`."""
    logs = [folder / f"{dtype}-{span.start}-{span.end}-of-{len(spans)}.log" for span in spans]
    processes = [
        server_process(model, dtype, span, log, options, launcher=launcher)
        for span, log in zip(spans, logs, strict=True)
    ]
    try:
        await processes[0].start()
        addresses = (await processes[0].wait_for("listening", STARTING))["addresses"]
        for process in processes[1:]:
            await process.start(["--initial-peers", *addresses])
        for process in processes:
            await process.wait_for("serving", STARTING)
        yield Servers(processes, addresses)
    finally:
        await stop_all(processes)


def server_process(
    model: str,
    dtype: str,
    span: Span,
    log: Path,
    options: Sequence[str] = (),
    *,
    address: str = LOOPBACK,
    launcher: Launcher | None = None,
) -> ServerProcess:
    """A server with one thread that will listen on `address`; not started yet."""
    common = f"--model {model} --dtype {dtype} --device cpu --threads 1 --host-maddrs {address}".split()
    return ServerProcess(
        [*common, "--exit-with-stdin", "--blocks", str(span), *options],
        name=f"server of blocks {span}",
        log=log,
        launcher=launcher,
    )


def fork_server() -> ForkServer:
    """A launcher of servers that start in a moment. Linux only."""
    return ForkServer("swarm.server", "swarm.server.preload")


def kill(server: ServerProcess) -> None:
    """End a server at once with all that it has started, as a power cut would."""
    with suppress(psutil.NoSuchProcess):
        daemons = psutil.Process(server.pid).children(recursive=True)
        server.kill()
        for daemon in daemons:
            with suppress(psutil.NoSuchProcess):
                daemon.kill()


def even_spans(num_blocks: int, count: int) -> list[Span]:
    """`num_blocks` blocks in `count` spans that differ by one block at most."""
    edges = [part * num_blocks // count for part in range(count + 1)]
    return [Span(start, end) for start, end in itertools.pairwise(edges)]
