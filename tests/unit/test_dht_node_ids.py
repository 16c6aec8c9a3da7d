"""A node's id follows from its peer's, and what is said of others is heard no further than that."""

import hashlib

import base58
import pytest

import swarm.net.slim  # noqa: F401, before hivemind

# isort: split

from hivemind.proto import dht_pb2

from swarm.dht.node_ids import MAX_NAMED, NODE_ID_BYTES, keep_to_ids, node_id_of
from swarm.net.identity import Identity


def raw(name: str) -> bytes:
    return base58.b58decode(Identity.from_seed(name).peer)


ALICE, BOB = raw("alice"), raw("bob")


def test_an_id_is_the_hash_of_the_peers() -> None:
    assert node_id_of(ALICE) == hashlib.sha256(b"swarm-node-v1" + ALICE).digest()[:20]
    assert len(node_id_of(BOB)) == NODE_ID_BYTES
    assert node_id_of(ALICE) != node_id_of(BOB)


@pytest.mark.parametrize("said", [node_id_of(BOB), bytes(20), b"x", bytes(21)])
def test_who_says_another_id_than_its_own_says_none(said: bytes) -> None:
    for kind in (dht_pb2.PingRequest, dht_pb2.PingResponse, dht_pb2.StoreRequest, dht_pb2.FindRequest):
        message = kind(peer=dht_pb2.NodeInfo(node_id=said))
        keep_to_ids(message, ALICE)
        assert message.peer.node_id == b""


def test_who_says_its_own_or_none_is_heard() -> None:
    for node_id in (node_id_of(ALICE), b""):
        message = dht_pb2.StoreResponse(store_ok=[True], peer=dht_pb2.NodeInfo(node_id=node_id))
        keep_to_ids(message, ALICE)
        assert message == dht_pb2.StoreResponse(store_ok=[True], peer=dht_pb2.NodeInfo(node_id=node_id))


def answer(*named: tuple[bytes, bytes]) -> dht_pb2.FindResponse:
    result = dht_pb2.FindResult(value=b"v")
    result.nearest_node_ids.extend(node_id for node_id, _ in named)
    result.nearest_peer_ids.extend(peer for _, peer in named)
    return dht_pb2.FindResponse(results=[result, dht_pb2.FindResult()])


def named_in(message: dht_pb2.FindResponse) -> list[tuple[bytes, bytes]]:
    result = message.results[0]
    return list(zip(result.nearest_node_ids, result.nearest_peer_ids, strict=True))


def test_of_those_named_only_true_ones_are_heard() -> None:
    rsa = b"\x12\x20" + bytes(32)
    true = (node_id_of(BOB), BOB)
    message = answer((bytes(20), ALICE), true, (node_id_of(rsa), rsa), (node_id_of(b""), b""))
    keep_to_ids(message, ALICE)
    assert named_in(message) == [true]
    assert message.results[0].value == b"v"


def test_ids_without_peers_are_not_heard() -> None:
    message = answer((node_id_of(BOB), BOB))
    message.results[0].nearest_node_ids.append(node_id_of(ALICE))
    keep_to_ids(message, ALICE)
    assert named_in(message) == [(node_id_of(BOB), BOB)]


def test_one_answer_names_only_so_many() -> None:
    peers = [raw(str(number)) for number in range(3 * MAX_NAMED)]
    message = answer(*((node_id_of(peer), peer) for peer in peers))
    keep_to_ids(message, ALICE)
    assert [peer for _, peer in named_in(message)] == peers[:MAX_NAMED]
