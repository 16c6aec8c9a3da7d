"""Bringing records to the nodes that are to keep them: as many as replicas are wanted, in few calls.

Who does not answer is made up for by the next. How nodes are called, and which are near, is not known here.
"""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias, TypeVar

from swarm.dht.neighbours import Node
from swarm.dht.records import SignedRecord

REPLICAS = 5
RECORDS_PER_CALL = 16

P = TypeVar("P")

Keep: TypeAlias = Callable[[P, Sequence[SignedRecord]], Awaitable[Sequence[bool] | None]]
"""Have one node keep records: which it took; None if it does not answer."""


async def keep_all(
    records: Iterable[SignedRecord], holders: Mapping[str, Sequence[Node[P]]], keep: Keep[P]
) -> list[SignedRecord]:
    """Bring each record to `REPLICAS` of the `holders` of its key that answer, the first ones if it can be.

    Returns those that any of them took.
    """
    waiting = {record: iter(holders[record.key]) for record in records}
    lacking = dict.fromkeys(waiting, REPLICAS)
    taken: set[SignedRecord] = set()
    while batches := _batches(waiting, lacking):
        answers = await asyncio.gather(*(keep(peer, batch) for peer, batch in batches))
        for (_, batch), answer in zip(batches, answers, strict=True):
            if answer is not None:
                for record, was_taken in zip(batch, answer, strict=False):
                    lacking[record] -= 1
                    if was_taken:
                        taken.add(record)
    return [record for record in waiting if record in taken]


def _batches(
    waiting: Mapping[SignedRecord, Iterator[Node[P]]], lacking: Mapping[SignedRecord, int]
) -> list[tuple[P, list[SignedRecord]]]:
    """Whom to bring which records now."""
    wanted: defaultdict[int, list[SignedRecord]] = defaultdict(list)
    peers: dict[int, P] = {}
    for record, nodes in waiting.items():
        for _, node in zip(range(lacking[record]), nodes, strict=False):  # takes no node too many
            wanted[node.node_id].append(record)
            peers[node.node_id] = node.peer
    return [
        (peers[node_id], some[first : first + RECORDS_PER_CALL])
        for node_id, some in wanted.items()
        for first in range(0, len(some), RECORDS_PER_CALL)
    ]
