"""The command `diagnose`: what is wrong with this machine's connection to a swarm, and what to do about it.

Works just as well when nothing does: each thing is looked at by itself, with a deadline of its own.
"""

import argparse
import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from swarm import cli
from swarm.client.diagnose.examining import Examination
from swarm.client.diagnose.finding import Finding, Level
from swarm.client.diagnose.findings import findings
from swarm.client.diagnose.probing import Probe
from swarm.client.diagnose.seen import Seen
from swarm.dht.store import RecordStore
from swarm.errors import InputError
from swarm.importing import imported
from swarm.net.addresses import endpoint_of
from swarm.net.door import Door
from swarm.net.identity import Identity
from swarm.net.invitation import expand
from swarm.net.peer_lists import PeerLists
from swarm.net.reachability import own_addresses
from swarm.net.relaying import Relaying
from swarm.net.swarm_key import SwarmKey
from swarm.net.transport import TransportError

LISTEN = "/ip4/0.0.0.0/tcp/{}"
STYLES: dict[Level, str] = {"ok": "green", "warning": "yellow", "problem": "bold red"}


async def main(args: argparse.Namespace) -> int:
    """Print findings; exit code 1 if one of them is a problem.

    Raises:
        InputError: there is no peer to join by, or a file or an invitation cannot be used.
    """
    addresses, door = await asyncio.to_thread(_way_in, args)
    identity = await asyncio.to_thread(_identity, args)
    with cli.Progress(quiet=args.json) as progress:
        looked = progress.stage("Looking at the swarm and the way to it", counted=False)
        seen = await look(identity, args, addresses, door)
        looked(1.0)
    found = findings(seen)
    if args.json:
        for one in found:
            cli.emit(one.as_json())
    else:
        console = Console()
        console.print(drawn(found))
        console.print(summary(found))
    return int(any(one.level == "problem" for one in found))


async def look(identity: Identity, args: argparse.Namespace, addresses: Sequence[str], door: Door) -> Seen:
    """All that can be seen of a swarm joined by `addresses` through `door`, within `args.timeout` seconds."""
    seen = Seen(local=await asyncio.to_thread(own_addresses), unfinished="starting this peer's network")
    seen.is_port_asked = bool(args.port)
    try:
        async with asyncio.timeout(args.timeout), AsyncExitStack() as stack:
            await _look(seen, identity, args, addresses, door, stack)
    except TimeoutError:
        pass
    except TransportError as error:
        seen.network_error, seen.unfinished = error, ""
    return seen


async def _look(
    seen: Seen,
    identity: Identity,
    args: argparse.Namespace,
    addresses: Sequence[str],
    door: Door,
    stack: AsyncExitStack,
) -> None:
    libp2p = await imported("swarm.net.libp2p")
    transport = await _start(libp2p, identity, args.port or 0, door)
    stack.push_async_callback(transport.close)
    listening = [endpoint_of(text) for text in await transport.addresses()]
    seen.port = args.port or next((found.port for found in listening if found), None)

    async def join_records(reached: Sequence[str]) -> RecordStore:
        kademlia = await imported("swarm.dht.kademlia")
        store: RecordStore = await kademlia.KademliaStore.start(transport, reached, client_mode=True)
        stack.push_async_callback(store.close)
        return store

    await Examination(seen, Probe(transport), identity, args.model).run(addresses, join_records)


async def _start(libp2p: Any, identity: Identity, port: int, door: Door) -> Any:
    """A network that listens on `port`, or, where a server of this machine does, on a free one beside it."""
    for number in dict.fromkeys((port, 0)):
        try:
            return await libp2p.Libp2pTransport.start(
                identity,
                host_maddrs=(LISTEN.format(number),),
                routes_for_others=False,
                relaying=Relaying(uses=True),
                door=door,
            )
        except InputError as error:
            taken = error
    raise taken


def _way_in(args: argparse.Namespace) -> tuple[tuple[str, ...], Door]:
    """Whom to join by, whether that can be done or not, and the door for all streams."""
    key = SwarmKey.load(args.swarm_key) if args.swarm_key is not None else None
    addresses, key = expand(args.initial_peers, key)
    if not addresses:
        raise InputError(
            "There is no peer to join by.",
            "Give the address that a server prints: --initial-peers ADDRESS, or SWARM_INITIAL_PEERS.",
        )
    lists = PeerLists(args.allow_peers, args.block_peers) if args.allow_peers or args.block_peers else None
    return addresses, Door(key, lists)


def _identity(args: argparse.Namespace) -> Identity:
    return Identity.generate() if args.identity is None else Identity.load_or_create(args.identity)


def drawn(found: Sequence[Finding]) -> Table:
    """The findings for a terminal: what to do stands below what was found."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for overflow in ("ellipsis", "ellipsis", "fold"):
        table.add_column(overflow=overflow)
    for one in found:
        advice = f"\n→ {one.advice}" if one.advice else ""
        table.add_row(
            Text(one.level, style=STYLES[one.level]), Text(one.check, no_wrap=True), Text(one.cause + advice)
        )
    return table


def summary(found: Sequence[Finding]) -> str:
    counts = Counter(one.level for one in found)
    told = [
        f"{counts[level]} {level}{'s' if counts[level] > 1 else ''}"
        for level in ("problem", "warning")
        if counts[level]
    ]
    return f"\n{' and '.join(told)}." if told else "\nNothing is wrong."
