"""What keeping a directory costs in a DHT of many peers: calls, bytes and seconds, on simulated time.

Every peer is a real node of the real DHT. To begin with each knows the nearest of the others and some at
random, as in a swarm that has been up for long. Only some of them act as servers do: they announce themselves
and read the directory in their periods, by the real announcer, directory and records; the others store and
answer. What one server's part costs is what all calls come to, by all peers, shared among those that act.
"""

import asyncio
import random
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from time import process_time

import numpy as np

from benchmarks.simulated_calls import Access, Calls, Post, simulated_clock
from benchmarks.world import World
from swarm.dht.announcement import Announcement, ModelEntry
from swarm.dht.announcer import PERIOD, Announcer
from swarm.dht.directory import Directory
from swarm.dht.kademlia import KademliaStore
from swarm.dht.store import StoreUnreachable
from swarm.net.identity import Identity
from swarm.net.transport import PeerId
from swarm.net.virtual_time import VirtualTimeLoop, run
from swarm.server.server import DIRECTORY_PERIOD

NEAREST, RANDOM = 40, 120
"""How many others a peer knows to begin with: those next to it, and any."""

ACTING = 5
WARM_UP = 2 * PERIOD
MEASURED = 3 * DIRECTORY_PERIOD
"""Seconds before anything is counted, and in which it is."""

SPAN = 0.225
"""The part of the model's blocks that a server announces: the mean of `population`."""


@dataclass
class Node:
    identity: Identity
    access: Access
    store: KademliaStore
    read: list[float] = field(default_factory=list)
    written: list[float] = field(default_factory=list)
    failed: int = 0

    async def timed(self, work: Awaitable[object], times: list[float]) -> None:
        """Note how long `work` takes, whether it succeeds or is given up."""
        began = asyncio.get_running_loop().time()
        try:
            await work
        except StoreUnreachable:
            self.failed += 1
        times.append(asyncio.get_running_loop().time() - began)


def measure(peers: int, num_blocks: int, seed: int) -> dict[str, float]:
    """Figures of one server's part in a DHT of so many peers, and the seconds that it waits for the DHT."""
    began = process_time()
    found = run(_measure(peers, num_blocks, seed))
    return {"peers": peers, "blocks": num_blocks, **found, "processor_s": process_time() - began}


async def _measure(peers: int, num_blocks: int, seed: int) -> dict[str, float]:
    loop, rng = asyncio.get_running_loop(), random.Random(seed)
    assert isinstance(loop, VirtualTimeLoop)
    world = World(peers, np.random.default_rng(seed))
    identities = [Identity.from_seed(f"peer {seed} {number}") for number in range(peers)]
    number_of = {identity.peer: number for number, identity in enumerate(identities)}

    def seconds(one: PeerId, other: PeerId) -> float:
        return float(world.seconds(number_of[one], number_of[other]))

    post = Post(seconds)
    with simulated_clock(loop):
        random.seed(seed)  # nodes draw their ids
        nodes = [await _node(identity, post) for identity in identities]
        await acquaint(nodes, rng)
        acting = nodes[:ACTING]
        async with asyncio.TaskGroup() as tasks:
            works = [
                work
                for node in acting
                for work in (_announce(node, num_blocks, rng), _read(node, num_blocks, rng))
            ]
            started = [tasks.create_task(work) for work in works]
            await asyncio.sleep(WARM_UP)
            post.calls.clear()
            post.bytes = 0
            for node in acting:
                node.read.clear()
                node.written.clear()
                node.failed = 0
            await asyncio.sleep(MEASURED)
            calls, carried = post.calls.copy(), post.bytes
            for task in started:
                task.cancel()
    share = len(acting) * MEASURED
    return {
        "calls_a_second": calls.total() / share,
        **{f"{name.rpartition('_')[2]}s_a_second": count / share for name, count in sorted(calls.items())},
        "bytes_a_second": carried / share,
        "reading_s": fmean(one for node in acting for one in node.read),
        "writing_s": fmean(one for node in acting for one in node.written),
        "failed": sum(node.failed for node in acting),
    }


async def _node(identity: Identity, post: Post) -> Node:
    access = Access(identity.peer, Calls(post, identity.peer))
    return Node(identity, access, await KademliaStore.start(access))  # type: ignore[arg-type]


async def acquaint(nodes: Sequence[Node], rng: random.Random) -> None:
    """Let nodes know each other as if they had been there for long."""
    protocols = [node.store._node.protocol for node in nodes]
    in_order = sorted(range(len(nodes)), key=lambda at: protocols[at].node_id)
    for place, at in enumerate(in_order):
        first = max(0, min(place - NEAREST // 2, len(nodes) - NEAREST))
        known = {*in_order[first : first + NEAREST], *rng.sample(in_order, min(RANDOM, len(nodes)))}
        for other in sorted(known - {at}):
            await protocols[at].update_routing_table(
                protocols[other].node_id, nodes[other].access.p2p.peer_id, responded=True
            )


async def _announce(node: Node, num_blocks: int, rng: random.Random) -> None:
    entry = ModelEntry(model_id="m", name="simulated", num_blocks=num_blocks, fingerprint="f")
    announcer = Announcer(node.store, node.identity, entry)
    size = max(1, round(SPAN * num_blocks))
    start = rng.randrange(num_blocks - size + 1)
    said = Announcement(
        peer=node.identity.peer, model_id="m", start=start, end=start + size, state="serving", progress=1.0
    )
    await asyncio.sleep(rng.uniform(0, PERIOD))
    while True:
        await node.timed(announcer.publish(said), node.written)
        await asyncio.sleep(PERIOD)


async def _read(node: Node, num_blocks: int, rng: random.Random) -> None:
    directory = Directory(node.store, node.access, "m", num_blocks)  # type: ignore[arg-type]
    await asyncio.sleep(rng.uniform(0, DIRECTORY_PERIOD))
    while True:
        await node.timed(directory.refresh(), node.read)
        await asyncio.sleep(DIRECTORY_PERIOD)
