"""A record store inside one process, for tests and simulation: the real one's rules, without a network."""

from collections import Counter
from collections.abc import Callable, Sequence

from swarm.dht.records import RecordError, SignatureMemory, SignedRecord, check_time
from swarm.dht.store import StoreUnreachable


class MemoryStore:
    """A table of records shared by all stores made with `another`, one for each peer.

    Set `reachable` to False to make every `put` and `get` of this store fail, as for a peer that has
    lost the network. Each write and read is checked as a remote one would be.
    """

    def __init__(self, now: Callable[[], float]):
        self.now = now
        self.reachable = True
        self.dropped: Counter[str] = Counter()
        self._signatures = SignatureMemory()
        self._table: dict[str, dict[str, bytes]] = {}

    @property
    def peers(self) -> int:
        return len({peer for held in self._table.values() for peer in held})

    def another(self) -> "MemoryStore":
        """A store for one more peer, over the same table and clock."""
        store = MemoryStore(self.now)
        store._table = self._table
        return store

    def plant(self, key: str, peer: str, packed: bytes) -> None:
        """Put raw bytes into the table unchecked, as a malicious peer that holds the key could."""
        self._table.setdefault(key, {})[peer] = packed

    async def put(self, records: Sequence[SignedRecord]) -> int:
        self._check_reachable()
        return sum(self._accept(record) for record in records)

    async def get(self, keys: Sequence[str]) -> dict[str, list[SignedRecord]]:
        self._check_reachable()
        return {key: self._read(key) for key in keys}

    async def neighbours(self, most: int) -> list[str]:
        return []

    async def close(self) -> None:
        self.reachable = False

    def _check_reachable(self) -> None:
        if not self.reachable:
            raise StoreUnreachable("The record store cannot be reached.", "Check this peer's connection.")

    def _accept(self, record: SignedRecord) -> bool:
        packed = record.pack()
        if self._believe(packed) is None:
            return False
        held = self._table.setdefault(record.key, {})
        known = self._believe(held.get(record.peer, b""))
        if known is not None and known.expires_at >= record.expires_at:
            return False
        held[record.peer] = packed
        return True

    def _read(self, key: str) -> list[SignedRecord]:
        found = []
        for peer, packed in list(self._table.get(key, {}).items()):
            record = self._believe(packed)
            if record is None:
                del self._table[key][peer]
            elif (record.key, record.peer) == (key, peer):
                found.append(record)
            else:
                self.dropped["misplaced"] += 1
        return found

    def _believe(self, packed: bytes) -> SignedRecord | None:
        if not packed:
            return None
        try:
            record = self._signatures.unpack(packed)
            check_time(record, self.now())
        except RecordError as error:
            if error.fault != "expired":
                self.dropped[error.fault] += 1
            return None
        return record
