"""The command `route`: which route a session would take and why, as a table or one JSON line.

Reads what is announced and measures distances; neither the model's weights nor its config are needed.
"""

import argparse
import asyncio
from contextlib import AsyncExitStack

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from swarm import cli
from swarm.client.costs import Costs, Demand
from swarm.client.estimate import Share
from swarm.client.explain import Explanation, explain
from swarm.client.joining import join
from swarm.client.options import SessionOptions
from swarm.client.peers import find_model
from swarm.client.privacy import NO_PRIVACY, Privacy
from swarm.client.route import Hop, NoRoute, label
from swarm.dht.announcement import ModelEntry
from swarm.dht.directory import list_models, list_peers
from swarm.dht.rtts import RoundTrips
from swarm.dht.store import RecordStore
from swarm.net.entrance import entrance_of
from swarm.net.transport import Transport

PINGS = 3
"""Round trips measured to each peer, of which the shortest counts."""

PAUSE = 1.0
"""Seconds between two looks at servers that still load."""

COLUMNS = ("Peer", "Blocks", "dtype", "Way in", "Queue", "Compute", "Share")
TEXTS = 3
"""Columns that hold texts; the others hold numbers."""

STRAIGHT = "↳"

NOTABLE = 0.0005
"""Seconds of others' waiting for a token from which on it is told."""


async def main(args: argparse.Namespace) -> int:
    demand = Demand(args.prompt_tokens, args.new_tokens)
    privacy = Privacy.of(
        SessionOptions(
            trust_first_last=args.trust_first_last, trust_depth=args.trust_depth, max_share=args.max_share
        )
    )
    async with AsyncExitStack() as stack:
        with cli.Progress(quiet=args.json) as progress:
            joined = progress.stage("Joining the swarm", counted=False)
            network = await join(stack, await asyncio.to_thread(entrance_of, args), args.identity)
            entry = find_model(await list_models(network.store), args.model)
            joined(1.0)
            measured = progress.stage("Measuring distances", counted=False)
            explanation = await look(network.transport, network.store, entry, demand, args.timeout, privacy)
            measured(1.0)
        if args.json:
            cli.emit({"model": entry.name, **explanation.as_json()})
        else:
            Console().print(drawn(explanation, entry.name))
    return 0


async def look(
    transport: Transport,
    store: RecordStore,
    entry: ModelEntry,
    demand: Demand,
    timeout: float,
    privacy: Privacy = NO_PRIVACY,
) -> Explanation:
    """What is announced of a model and how far its servers are, explained; nobody is woken for it.

    Servers that still load are waited for, up to `timeout` seconds.

    Raises:
        InputError: with such `privacy` no peer may run anything of the model.
        NoRoute: some blocks have no server with room, or none that may run them.
        StoreUnreachable: the records could not be read.
    """
    limits = privacy.limits(entry.num_blocks)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    round_trips = RoundTrips(transport)
    try:
        while True:
            servers = await list_peers(store, entry)
            for _ in range(PINGS):
                await round_trips.measure({server.peer_id: server.addresses for server in servers})
            try:
                costs = Costs(rtt=round_trips.rtt)
                return explain(servers, entry.num_blocks, costs, demand, model=entry.name, limits=limits)
            except NoRoute as reason:
                if not reason.loading or loop.time() + PAUSE > deadline:
                    raise
            await asyncio.sleep(PAUSE)
    finally:
        round_trips.close()


def drawn(explanation: Explanation, model: str) -> RenderableType:
    """The explanation for a terminal."""
    lines: list[RenderableType] = [_table(explanation, model), *map(Text, _summary(explanation))]
    if explanation.advice:
        lines.append(Text("\nWhat would help:"))
        lines += [Padding(Text(f"• {advice}"), (0, 0, 0, 2)) for advice in explanation.advice]
    return Group(*lines)


def _table(explanation: Explanation, model: str) -> Table:
    title = f"The fastest route through {model}, in milliseconds a token"
    table = Table(title=Text(title), title_justify="left")
    for index, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if index < TEXTS else "right", no_wrap=index > 0)
    table.columns[0].overflow = "fold"
    times = explanation.times
    for hop, share in zip(explanation.route.hops, times.shares, strict=True):
        table.add_row(*map(Text, _cells(hop, share, times.token)))
    table.add_row("back to you", "", "", _ms(times.back), "", "", f"{times.back / times.token:.0%}")
    return table


def _cells(hop: Hop, share: Share, token: float) -> tuple[str, ...]:
    said = hop.announcement
    form = said.dtype if said.quantization == "none" else f"{said.dtype}, {said.quantization}"
    return (
        label(said),
        str(hop.span),
        form,
        f"{STRAIGHT} {_ms(share.way)}" if share.is_direct else _ms(share.way),
        _ms(share.queue),
        _ms(share.compute),
        f"{share.seconds / token:.0%}",
    )


def _summary(explanation: Explanation) -> list[str]:
    times, demand = explanation.times, explanation.demand
    is_any_direct = any(share.is_direct for share in times.shares)
    return [
        *([f"{STRAIGHT} straight from the hop above; the others by way of you."] if is_any_direct else []),
        f"A token takes {_ms(times.token)} ms, which makes {1 / times.token:.1f} tokens/s.",
        f"The first one comes {times.first_token:.2f} s after a prompt of {demand.prompt_tokens} tokens.",
        *_toll(times.toll),
        _runner_up(explanation),
        *_privacy(explanation),
    ]


def _privacy(explanation: Explanation) -> list[str]:
    """What the route keeps to, and what that costs."""
    limits, unlimited = explanation.limits, explanation.unlimited
    if unlimited is None:
        return []
    rules = []
    if limits.trusted is not None:
        rules.append(f"only the {len(limits.trusted)} peers you trust run blocks outside {limits.inner}")
    if limits.most is not None:
        rules.append(f"no peer runs more than {limits.most} blocks")
    if unlimited == explanation.route:
        cost = "the fastest route does so anyway"
    else:
        cost = f"without that a token would take {_ms(unlimited.seconds)} ms: {unlimited}"
    return [f"As you want it, {' and '.join(rules)}; {cost}."]


def _toll(seconds: float) -> list[str]:
    """What the route takes others, where that is anything."""
    return (
        [f"Others are taken to wait {_ms(seconds)} ms for it, which counts as well."]
        if seconds >= NOTABLE
        else []
    )


def _runner_up(explanation: Explanation) -> str:
    route, slower = explanation.runner_up, explanation.slower
    if route is None:
        return "There is no other route: each of these peers is needed."
    more = route.toll - explanation.times.toll
    if slower >= 0.005:
        rate = f"{slower:.0%} slower"
    elif slower > -0.005:
        rate = "as fast"
    elif more > 0:
        rate = f"{-slower:.0%} faster, but others would wait {_ms(more)} ms more"
    else:
        rate = f"{-slower:.0%} faster, but slower with the prompt"
    return f"The runner-up is {rate}, {_ms(route.seconds)} ms a token: {route}."


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f}"
