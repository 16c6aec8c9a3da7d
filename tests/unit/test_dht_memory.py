"""The in-process store keeps the rules of the real one."""

import pytest

from swarm.dht.memory import MemoryStore
from swarm.dht.records import SignedRecord, sign
from swarm.dht.store import StoreUnreachable
from swarm.net.identity import Identity

ALICE = Identity.from_seed("alice")
BOB = Identity.from_seed("bob")


class Clock:
    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> MemoryStore:
    return MemoryStore(clock)


def record(who: Identity, body: bytes = b"", expires_at: float = 1030.0, key: str = "k") -> SignedRecord:
    return sign(who, key, body, expires_at)


async def test_each_peer_has_its_own_place_under_a_key(store: MemoryStore) -> None:
    assert await store.put([record(ALICE), record(BOB)]) == 2
    found = await store.another().get(["k", "nothing"])
    assert {entry.peer for entry in found["k"]} == {ALICE.peer, BOB.peer}
    assert found["nothing"] == []


async def test_only_what_expires_later_replaces(store: MemoryStore) -> None:
    assert await store.put([record(ALICE, b"first")]) == 1
    assert await store.put([record(ALICE, b"same time"), record(ALICE, b"earlier", 1020.0)]) == 0
    assert await store.put([record(ALICE, b"later", 1031.0)]) == 1
    assert [entry.body for entry in (await store.get(["k"]))["k"]] == [b"later"]


async def test_records_expire(store: MemoryStore, clock: Clock) -> None:
    await store.put([record(ALICE)])
    clock.time = 1030.0
    assert await store.get(["k"]) == {"k": []}
    assert await store.put([record(ALICE)]) == 0
    assert not store.dropped, "expiring is nobody's fault"


async def test_forged_records_are_refused_on_the_way_in_and_out(store: MemoryStore) -> None:
    good = record(ALICE)
    forged = SignedRecord(good.key, BOB.peer, good.expires_at, good.body, good.signature)
    assert await store.put([forged]) == 0
    store.plant("k", BOB.peer, forged.pack())
    store.plant("k", "x", b"noise")
    store.plant("elsewhere", ALICE.peer, good.pack())
    found = await store.get(["k", "elsewhere"])
    assert found == {"k": [], "elsewhere": []}
    assert store.dropped == {"bad_signature": 2, "malformed": 1, "misplaced": 1}


async def test_an_unreachable_store_says_so(store: MemoryStore) -> None:
    other = store.another()
    other.reachable = False
    with pytest.raises(StoreUnreachable):
        await other.put([record(ALICE)])
    with pytest.raises(StoreUnreachable):
        await other.get(["k"])
    assert await store.put([record(ALICE)]) == 1, "others are not affected"
