"""What a node of the DHT keeps: bounded in all, for each peer and from each caller, and the newest."""

import time
from types import SimpleNamespace

import pytest
from hivemind.dht.routing import DHTID

from swarm.dht import node_storage
from swarm.dht.node_storage import MAX_RECORDS_PER_PEER, BoundedStorage


def test_a_node_keeps_only_so_much() -> None:
    storage = BoundedStorage(2)
    key, later = DHTID.generate(source="k"), time.time() + 60
    assert storage.store_subkey(key, "a", b"1", later)
    assert storage.store_subkey(key, "b", b"1", later)
    assert not storage.store_subkey(key, "c", b"1", later + 9), "full"
    assert not storage.store_subkey(DHTID.generate(source="other"), "a", b"1", later)
    assert storage.store_subkey(key, "a", b"2", later + 1), "what it keeps may still be renewed"
    assert not storage.store(key, b"regular", later)
    assert not BoundedStorage(0).store_subkey(key, "a", b"1", later)


def test_a_node_keeps_only_so_much_of_one_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    storage, later = BoundedStorage(10_000), time.time() + 60
    stored = [
        storage.store_subkey(DHTID.generate(source=f"k{number}"), "a", b"1", later + number)
        for number in range(1000)
    ]
    assert sum(stored) == MAX_RECORDS_PER_PEER
    first = DHTID.generate(source="k0")
    assert storage.store_subkey(first, "b", b"1", later), "others have their own share"
    assert storage.store_subkey(first, "a", b"2", later + 1), "what it keeps may still be renewed"
    monkeypatch.setattr("hivemind.utils.timed_storage.get_dht_time", lambda: later + 10)
    assert storage.store_subkey(DHTID.generate(source="new"), "a", b"1", later + 99), (
        "what expired makes room"
    )


def test_a_node_takes_only_so_much_from_one_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_storage, "NEW_AT_ONCE", 3)
    monkeypatch.setattr(node_storage, "NEW_PER_SECOND", 0.001)
    caller: list[str | None] = ["liar"]
    storage = BoundedStorage(100, SimpleNamespace(caller=lambda: caller[0]))
    key, later = DHTID.generate(source="k"), time.time() + 60
    stored = [storage.store_subkey(key, f"peer {number}", b"1", later) for number in range(5)]
    assert stored == [True, True, True, False, False]
    assert storage.store_subkey(key, "peer 0", b"2", later + 1), "what it keeps may still be renewed"
    for other in ("honest", None):
        caller[0] = other
        assert storage.store_subkey(key, f"peer of {other}", b"1", later)


def test_replaying_an_old_record_does_not_shorten_the_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = BoundedStorage(9)
    key, now = DHTID.generate(source="k"), time.time()
    assert storage.store_subkey(key, "a", b"new", now + 60)
    assert not storage.store_subkey(key, "a", b"old", now + 30)
    monkeypatch.setattr("hivemind.utils.timed_storage.get_dht_time", lambda: now + 40)
    held = storage.get(key)
    assert held is not None
    assert held.value.get("a").value == b"new"


def test_what_is_handed_out_is_a_copy() -> None:
    storage = BoundedStorage(9)
    key, later = DHTID.generate(source="k"), time.time() + 60
    storage.store_subkey(key, "a", b"1", later)
    held = storage.get(key)
    assert held is not None
    held.value.store("b", b"2", later)
    again = storage.get(key)
    assert again is not None
    assert [subkey for subkey, _ in again.value.items()] == ["a"]
