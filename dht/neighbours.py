"""The other nodes that a node knows, in buckets by their distance from it. Pure: time is passed in.

A bucket keeps those who came first as long as they answer, and has room for others only when one does not.
But no network, which may be one person's, keeps others out: a bucket that it crowds lets its newest go for
who comes from elsewhere. It must not know how nodes are called.

Source: Maymounkov and Mazières, "Kademlia" (2002), sections 2.2 and 4.1; a bucket for each length of the
prefix that an id shares with the node's own.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

BUCKET_SIZE = 20
PER_NETWORK = 2
"""Nodes of one network that are taken as long as there are others."""

FRESH = 60.0
"""Seconds for which who was heard counts as being there."""

P = TypeVar("P")


class Node(NamedTuple, Generic[P]):
    """A node: its id, who is called there, and the network that it is reached in, empty if unknown."""

    node_id: int
    peer: P
    network: str = ""


class Neighbours(Generic[P]):
    """What the node with the id `own` knows of others."""

    def __init__(self, own: int):
        self._own = own
        self._buckets: dict[int, _Bucket[P]] = {}

    def __len__(self) -> int:
        return sum(len(bucket.seats) for bucket in self._buckets.values())

    def __contains__(self, node_id: int) -> bool:
        bucket = self._buckets.get(self._place(node_id))
        return bucket is not None and node_id in bucket.seats

    def nodes(self) -> list[Node[P]]:
        return [seat.node for bucket in self._buckets.values() for seat in bucket.seats.values()]

    def hear(self, node: Node[P], now: float) -> Node[P] | None:
        """`node` is there. If it has to wait for a seat: who has been silent for long, to be asked."""
        if node.node_id == self._own:
            return None
        bucket = self._buckets.setdefault(self._place(node.node_id), _Bucket())
        return bucket.hear(node, now)

    def lose(self, node_id: int) -> None:
        """The node with that id does not answer; nothing if it is not known."""
        bucket = self._buckets.get(self._place(node_id))
        if bucket is not None:
            bucket.lose(node_id)

    def nearest(self, key: int, count: int, *, exclude: int | None = None) -> list[Node[P]]:
        """The `count` nearest to `key` that are known, from several networks if it can be."""
        others = (node for node in self.nodes() if node.node_id != exclude)
        return spread(sorted(others, key=lambda node: node.node_id ^ key), count)

    def _place(self, node_id: int) -> int:
        return (self._own ^ node_id).bit_length()


def spread(nodes: Iterable[Node[P]], count: int, most: int = PER_NETWORK) -> list[Node[P]]:
    """The first `count` of `nodes`, but no more than `most` of one network where others can stand in."""
    taken: Counter[str] = Counter()
    chosen: list[Node[P]] = []
    beside: list[Node[P]] = []
    for node in nodes:
        taken[node.network] += 1
        (chosen if taken[node.network] <= most else beside).append(node)
        if len(chosen) == count:
            break
    return chosen + beside[: count - len(chosen)]


@dataclass
class _Seat(Generic[P]):
    node: Node[P]
    heard_at: float


@dataclass
class _Bucket(Generic[P]):
    """`seats` and the `spares` that wait for one, both in the order in which they came."""

    seats: dict[int, _Seat[P]] = field(default_factory=dict)
    spares: dict[int, Node[P]] = field(default_factory=dict)

    def hear(self, node: Node[P], now: float) -> Node[P] | None:
        seat = self.seats.get(node.node_id)
        if seat is not None:
            seat.node, seat.heard_at = node, now
            return None
        if len(self.seats) >= BUCKET_SIZE and not self._make_room_for(node.network):
            return self._wait(node, now)
        self.spares.pop(node.node_id, None)
        self.seats[node.node_id] = _Seat(node, now)
        return None

    def lose(self, node_id: int) -> None:
        self.spares.pop(node_id, None)
        if self.seats.pop(node_id, None) is not None and self.spares:
            crowds = self._crowds()
            newest_first = reversed(self.spares.values())
            chosen = min(newest_first, key=lambda spare: crowds[spare.network])
            del self.spares[chosen.node_id]
            self.seats[chosen.node_id] = _Seat(chosen, float("-inf"))

    def _make_room_for(self, network: str) -> bool:
        """Let the newest of the most crowded network go, if that is more crowded than `network` will be."""
        crowds = self._crowds()
        crowd, most = crowds.most_common(1)[0]
        if most <= max(crowds[network] + 1, PER_NETWORK):
            return False
        newest = next(seat.node for seat in reversed(self.seats.values()) if seat.node.network == crowd)
        del self.seats[newest.node_id]
        return True

    def _wait(self, node: Node[P], now: float) -> Node[P] | None:
        self.spares.pop(node.node_id, None)
        self.spares[node.node_id] = node
        if len(self.spares) > BUCKET_SIZE:
            del self.spares[next(iter(self.spares))]
        silent = min(self.seats.values(), key=lambda seat: seat.heard_at)
        if now - silent.heard_at < FRESH:
            return None
        silent.heard_at = now  # asked once; who does not answer is lost
        return silent.node

    def _crowds(self) -> Counter[str]:
        return Counter(seat.node.network for seat in self.seats.values())
