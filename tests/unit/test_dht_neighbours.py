"""Whom a node knows: bounded, old ones first, and no crowd from one network."""

import random
from collections import Counter

import pytest

from swarm.dht.neighbours import BUCKET_SIZE, FRESH, PER_NETWORK, Neighbours, Node, spread

OWN = 0
FAR = 1 << 159
"""The bucket of all ids that begin with another bit than `OWN`."""


def node(number: int, network: str = "") -> Node[str]:
    return Node(FAR + number, f"peer {number}", network or f"network {number}")


def heard(*nodes: Node[str], now: float = 0.0) -> Neighbours[str]:
    known: Neighbours[str] = Neighbours(OWN)
    for one in nodes:
        known.hear(one, now)
    return known


def test_those_who_came_first_stay_as_long_as_they_answer() -> None:
    old = [node(number) for number in range(BUCKET_SIZE)]
    known = heard(*old)
    for number in range(100, 200):
        assert known.hear(node(number), FRESH / 2) is None, "all have just been heard"
    assert known.nodes() == old
    known.hear(old[0], FRESH)
    assert known.hear(node(200), FRESH + 1) == old[1], "who was silent for longest is asked"
    assert known.hear(node(201), FRESH + 1) == old[2]
    known.hear(old[1], FRESH + 2)
    known.lose(old[2].node_id)
    assert old[1].node_id in known
    assert old[2].node_id not in known
    assert len(known) == BUCKET_SIZE, "a spare has taken the seat"


def test_a_flood_of_ids_is_bounded() -> None:
    rng = random.Random(7)
    known: Neighbours[str] = Neighbours(rng.getrandbits(160))
    early = [Node(rng.getrandbits(160), f"early {number}", f"{number}") for number in range(10)]
    for one in early:
        known.hear(one, 0.0)
    for number in range(20_000):
        known.hear(Node(rng.getrandbits(160), f"flood {number}", "flood"), 1.0)
    assert all(one.node_id in known for one in early)
    assert len(known) < 12 * BUCKET_SIZE
    assert sum(len(bucket.spares) for bucket in known._buckets.values()) < 12 * BUCKET_SIZE


def test_nobody_new_gets_in_by_one_network_where_others_are() -> None:
    known = heard(*(node(number, "crowd") for number in range(BUCKET_SIZE)))
    others = [node(number) for number in range(100, 140)]
    for one in others:
        known.hear(one, 1.0)
    networks = Counter(one.network for one in known.nodes())
    assert networks.pop("crowd") == PER_NETWORK
    assert len(networks) == BUCKET_SIZE - PER_NETWORK
    assert node(0, "crowd") in known.nodes(), "the oldest of the crowd are those that stay"


def test_a_swarm_in_one_network_is_no_crowd() -> None:
    known = heard(*(node(number, "lab") for number in range(100)))
    assert len(known) == BUCKET_SIZE
    assert len(known.nearest(FAR, 10)) == 10


def test_a_spare_from_elsewhere_goes_first() -> None:
    known = heard(*(node(number, f"n{number % 10}") for number in range(BUCKET_SIZE)))
    for number in range(100, 110):
        known.hear(node(number, "n0"), 1.0)
    known.hear(node(110, "n9"), 1.0)
    for number in range(111, 115):
        known.hear(node(number, "n0"), 1.0)
    known.lose(node(9).node_id)
    assert node(110, "n9") in known.nodes()


def test_a_node_does_not_know_itself() -> None:
    known = heard(Node(OWN, "me", "here"))
    assert len(known) == 0
    known.lose(OWN)
    assert OWN not in known


def test_nearest_by_exclusive_or_and_from_several_networks() -> None:
    known = heard(*(node(number, "a" if number < 6 else f"n{number}") for number in range(12)))
    assert [one.node_id - FAR for one in known.nearest(FAR, 4)] == [0, 1, 6, 7]
    assert [one.node_id - FAR for one in known.nearest(FAR, 4, exclude=FAR)] == [1, 2, 6, 7]
    assert len(known.nearest(FAR, 50)) == 12


@pytest.mark.parametrize(
    ("networks", "count", "chosen"),
    [
        ("aaaa", 3, [0, 1, 2]),
        ("aaaab", 3, [0, 1, 4]),
        ("abcabcabc", 5, [0, 1, 2, 3, 4]),
        ("aaabbb", 5, [0, 1, 3, 4, 2]),
        ("", 3, []),
    ],
)
def test_spreading_takes_others_first_and_fills_up(networks: str, count: int, chosen: list[int]) -> None:
    nodes = [Node(number, "", network) for number, network in enumerate(networks)]
    assert [one.node_id for one in spread(nodes, count)] == chosen
