"""The command `peers`: who serves what in a swarm, as a table or one JSON line."""

import argparse
import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack

from rich.console import Console
from rich.table import Table
from rich.text import Text

from swarm import cli
from swarm.client.joining import join
from swarm.client.peers import PeerReport, report_peers
from swarm.dht.announcement import Announcement
from swarm.net.entrance import entrance_of

COLUMNS = ("Peer", "Model", "Blocks", "State", "Blocks/s", "KV left", "RTT", "Version")


async def main(args: argparse.Namespace) -> int:
    async with AsyncExitStack() as stack:
        with cli.Progress(quiet=args.json) as progress:
            joined = progress.stage("Joining the swarm", counted=False)
            network = await join(stack, await asyncio.to_thread(entrance_of, args), args.identity)
            reports = await report_peers(network.transport, network.store, args.model)
            joined(1.0)
        if args.json:
            cli.emit([report.as_json() for report in reports])
        else:
            Console().print(table(reports) if reports else "No server is announced in this swarm.")
    return 0


def table(reports: Sequence[PeerReport]) -> Table:
    drawn = Table(*COLUMNS)
    drawn.columns[0].no_wrap = True
    drawn.columns[1].overflow = "fold"
    for report in reports:
        drawn.add_row(*(Text(cell) for cell in _cells(report)))
    return drawn


def _cells(report: PeerReport) -> tuple[str, ...]:
    said = report.announcement
    return (
        report.label,
        report.model,
        str(report.span),
        _state(said),
        f"{said.throughput.decode:.0f}" if said.throughput.decode else "-",
        str(said.kv_tokens_left),
        "-" if report.rtt is None else f"{report.rtt * 1000:.1f} ms",
        said.version,
    )


def _state(said: Announcement) -> str:
    if said.asleep:
        return "asleep"
    return f"{said.state} {said.progress:.0%}" if said.state == "joining" else said.state
