"""What a node of hivemind's DHT keeps for others, and what it refuses to.

It keeps nothing but records that are signed by the peer under whose id they come, so many of each peer and so
many in all. Where in the swarm they belong is not known here.

hivemind calls a record's key a key, its peer a subkey, and keeps under each key a dictionary of subkeys.
"""

import time
from collections import Counter

import msgspec

import swarm.net.slim  # noqa: F401, before hivemind

# isort: split

from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.utils.timed_storage import TimedStorage, ValueWithExpiration

from swarm.allowance import Allowance
from swarm.dht.guarded_calls import GuardedCalls
from swarm.dht.records import RecordError, SignatureMemory, SignedRecord, check_lifetime

MAX_STORED_RECORDS = 16_384
"""What this peer keeps for others: typically 1 KB each, at most `MAX_RECORD_BYTES`."""

MAX_RECORDS_PER_PEER = 512
"""Of which so many of one peer: twice what one has that serves all blocks of the deepest models."""

NEW_PER_SECOND, NEW_AT_ONCE = 2.0, 2_048
"""New records that one caller may bring, whoever signed them: within `MAX_LIFETIME` half of what is kept."""

_wrapped_bytes = msgspec.msgpack.Decoder(bytes)
_encoder = msgspec.msgpack.Encoder()


class OwnRecordsOnly(RecordValidatorBase):
    """Lets a node keep and return nothing but records signed by the peer under whose id they are kept.

    Whether a record has expired is left to storage and readers: a whole dictionary is refused for one
    bad entry, and an entry may expire on its way.
    """

    def __init__(self, calls: GuardedCalls) -> None:
        self._calls = calls
        self.dropped: Counter[str] = Counter()
        self.signatures = SignatureMemory()

    def validate(self, record: DHTRecord) -> bool:
        try:
            signed = self.signatures.unpack(unwrapped(record.value))
            check_lifetime(signed, time.time())
            if _place(signed) != (record.key, record.subkey, record.expiration_time):
                raise RecordError("misplaced", "A record lies under another key, peer or time than its own.")
        except RecordError as error:
            self.dropped[error.fault] += 1
            self._calls.blame_caller()
            return False
        return True


class BoundedStorage(DHTLocalStorage):
    """What a node keeps: at most `capacity` records, none replaced or outlived by an older one of its peer.

    No peer has more than `MAX_RECORDS_PER_PEER` of them, and no caller brings many new ones at once.
    hivemind's own storage has no bound, forgets a record when an older one that was replayed expires, and
    hands out dictionaries that searches then write into.
    """

    def __init__(self, capacity: int, calls: GuardedCalls | None = None):
        super().__init__()
        self._capacity = capacity
        self._calls = calls
        self._newcomers = Allowance(NEW_PER_SECOND, NEW_AT_ONCE)
        self._ledger: TimedStorage[tuple[DHTID, str], None] = TimedStorage()
        self._by_peer: TimedStorage[str, TimedStorage[DHTID, None]] = TimedStorage()

    def store(self, key: DHTID, value: bytes, expiration_time: float, subkey: str | None = None) -> bool:
        return subkey is not None and self.store_subkey(key, subkey, value, expiration_time)

    def store_subkey(self, key: DHTID, subkey: str, value: bytes, expiration_time: float) -> bool:
        held = super().get(key)
        entries = held.value if held else DictionaryDHTValue()
        known = entries.get(subkey)
        if known and known.expiration_time >= expiration_time:
            return False
        if not known and not self._has_room_for(subkey):
            return False
        if not entries.store(subkey, value, expiration_time):
            return False
        self._note(key, subkey, expiration_time)
        if not held or held.expiration_time < expiration_time:
            super().store(key, entries, expiration_time)
        return True

    def _has_room_for(self, peer: str) -> bool:
        """Whether one more record may be kept: in all, of `peer`, and from who brings it."""
        held = self._by_peer.get(peer)
        if len(self._ledger) >= self._capacity or (held and len(held.value) >= MAX_RECORDS_PER_PEER):
            return False
        caller = self._calls and self._calls.caller()
        return not (caller and self._newcomers.take(caller, time.monotonic()))

    def _note(self, key: DHTID, peer: str, expiration_time: float) -> None:
        self._ledger.store((key, peer), None, expiration_time)
        held = self._by_peer.get(peer)
        records = held.value if held else TimedStorage()
        records.store(key, None, expiration_time)
        if not held or held.expiration_time < expiration_time:
            self._by_peer.store(peer, records, expiration_time)

    def get(self, key: DHTID) -> ValueWithExpiration | None:
        held = super().get(key)
        if held is None:
            return None
        copy = DictionaryDHTValue()
        for subkey, entry in held.value.items():
            copy.store(subkey, entry.value, entry.expiration_time)
        return ValueWithExpiration(copy, held.expiration_time)


def wrapped(record: SignedRecord) -> bytes:
    """The value under which hivemind keeps a record: msgpack's form of the packed record's bytes."""
    return _encoder.encode(record.pack())


def unwrapped(value: object) -> bytes:
    """The packed record in a value that was `wrapped`.

    Raises:
        RecordError: `malformed`.
    """
    try:
        return _wrapped_bytes.decode(value if isinstance(value, bytes) else b"")
    except msgspec.DecodeError as error:
        raise RecordError("malformed", f"A value in the DHT is no record: {error}.") from error


def _place(record: SignedRecord) -> tuple[bytes, bytes, float]:
    """Where hivemind keeps this record: its key, subkey and expiration."""
    return DHTID.generate(source=record.key).to_bytes(), _encoder.encode(record.peer), record.expires_at


def values_in(entry: ValueWithExpiration | None) -> list[bytes]:
    """What is kept under one key."""
    if entry is None or not isinstance(entry.value, DictionaryDHTValue):
        return []
    with entry.value.freeze():  # or it would weigh a size limit that the remote peer wrote into it
        return [item.value for _, item in entry.value.items()]
