"""The record store over hivemind's Kademlia DHT: the only file that knows `hivemind.dht`.

It runs a DHT node in this process's event loop, on the transport's own daemon. Each node, ours among them,
keeps a record only if it is signed by the peer under whose id it is to be kept, and readers check it again.
In a private swarm only who has the key can call a node, or be one. It must not know what records say.

hivemind calls a record's key a key, its peer a subkey, and keeps under each key a dictionary of subkeys.
"""

import asyncio
import random
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress

import msgspec

import swarm.net.slim  # noqa: F401, before hivemind

# isort: split

from hivemind.dht.node import DHTNode
from hivemind.dht.protocol import ValidationError
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.utils.timed_storage import TimedStorage, ValueWithExpiration

from swarm.allowance import Allowance
from swarm.dht.guarded_calls import GuardedCalls
from swarm.dht.records import RecordError, SignatureMemory, SignedRecord, check_lifetime, check_time
from swarm.dht.store import StoreUnreachable
from swarm.errors import InputError, SwarmError
from swarm.net.addresses import parse_address
from swarm.net.libp2p import Libp2pTransport
from swarm.net.transport import PeerId

REPLICAS = 5
BEAM = 10
"""How many of the nearest peers a search visits for each key."""

RPC_TIMEOUT = 3.0
SILENT_FOR = 20.0
"""Seconds for which a peer that did not answer is not asked again: each such question costs `RPC_TIMEOUT`."""

PUT_TIMEOUT = 10.0
GET_TIMEOUT = 10.0
JOIN_TIMEOUT = 8.0
JOIN_PAUSE = 0.5
CLOSE_TIMEOUT = 1.0
REJOIN_PERIOD = 30.0
"""Seconds between attempts to reach the initial peers that have been lost."""

KEYS_PER_CALL = 16
MAX_STORED_RECORDS = 16_384
"""What this peer keeps for others: typically 1 KB each, at most `MAX_RECORD_BYTES`."""

MAX_RECORDS_PER_PEER = 512
"""Of which so many of one peer: twice what one has that serves all blocks of the deepest models."""

NEW_PER_SECOND, NEW_AT_ONCE = 2.0, 2_048
"""New records that one caller may bring, whoever signed them: within `MAX_LIFETIME` half of what is kept."""

_PING = "DHTProtocol.rpc_ping"


class KademliaStore:
    """A `RecordStore` shared by all peers of the swarm. Made by `start`; an async context manager."""

    def __init__(
        self,
        node: DHTNode,
        calls: GuardedCalls,
        validator: "_OwnRecordsOnly",
        transport: Libp2pTransport,
        initial: Iterable[PeerId],
        client_mode: bool,
    ):
        self.dropped = validator.dropped
        self._node = node
        self._calls = calls
        self._transport = transport
        self._signatures = validator.signatures
        self._initial = [node.peer_id.from_base58(peer) for peer in initial]
        self._client_mode = client_mode
        self._rejoin_at = 0.0

    @classmethod
    async def start(
        cls, transport: Libp2pTransport, initial_peers: Sequence[str] = (), *, client_mode: bool = False
    ) -> "KademliaStore":
        """Join the DHT of `initial_peers`, multiaddrs that `transport` was started with; or begin a new one.

        In client mode this peer keeps no records for others, and need not be reachable. If the transport's
        door is private, so is the DHT; records of peers that the door does not admit are not read.

        Raises:
            InputError: an address is malformed, or they are in a private swarm with another key, or in one
                without, or this peer needs a key.
            StoreUnreachable: none of `initial_peers` answered.
            SwarmError: they answered, but cannot reach this peer, or their clocks differ from this one's.
        """
        initial = [
            peer for peer in (parse_address(text).peer for text in initial_peers) if peer != transport.peer
        ]
        calls = GuardedCalls(transport.p2p, transport.door.key)
        validator = _OwnRecordsOnly(calls)
        async with _within(JOIN_TIMEOUT, "served"):
            node = await DHTNode.create(
                p2p=calls,
                num_replicas=REPLICAS,
                wait_timeout=RPC_TIMEOUT,
                cache_locally=False,
                cache_nearest=0,
                cache_on_store=False,
                cache_refresh_before_expiry=0,
                reuse_get_requests=False,
                blacklist_time=SILENT_FOR,
                backoff_rate=1.0,
                client_mode=client_mode,
                record_validator=validator,
            )
        node.protocol.storage = _BoundedStorage(MAX_STORED_RECORDS, calls)
        node.protocol.cache = _BoundedStorage(0)  # anybody's cached entry would hide what is stored
        store = cls(node, calls, validator, transport, initial, client_mode)
        try:
            await store._join()
        except BaseException:
            await store.close()
            raise
        return store

    async def __aenter__(self) -> "KademliaStore":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def peers(self) -> int:
        return len(self._node.protocol.routing_table.uid_to_peer_id)

    def now(self) -> float:
        return time.time()

    async def put(self, records: Sequence[SignedRecord]) -> int:
        async with _within(PUT_TIMEOUT, "written"):
            await self._rejoin()
            stored = await self._node.store_many(
                [record.key for record in records],
                [record.pack() for record in records],
                [record.expires_at for record in records],
                subkeys=[record.peer for record in records],
                exclude_self=self._client_mode,
                beam_size=BEAM,
            )
        return sum(map(bool, stored.values()))

    async def get(self, keys: Sequence[str]) -> dict[str, list[SignedRecord]]:
        ids = {DHTID.generate(source=key): key for key in keys}
        async with _within(GET_TIMEOUT, "read"):
            await self._rejoin()
            entries = await self._find(ids)
        return {key: self._newest(entries[key_id]) for key_id, key in ids.items()}

    async def neighbours(self, most: int) -> list[str]:
        known = list(self._node.protocol.routing_table.uid_to_peer_id.values())
        chosen = random.sample(known, min(most, len(known)))
        found = (self._transport.known_addresses(PeerId(peer.to_base58())) for peer in chosen)
        return [address for addresses in await asyncio.gather(*found) for address in addresses]

    async def close(self) -> None:
        if self._node.is_alive:
            with suppress(TimeoutError):  # a daemon that died leaves its calls unanswered
                async with asyncio.timeout(CLOSE_TIMEOUT):
                    await self._node.shutdown()

    async def _find(self, ids: Iterable[DHTID]) -> dict[DHTID, list[bytes]]:
        """The values that this peer and the nearest ones to each id hold under it.

        Every replica is asked and heard for itself: one that is malformed, silent or holds something
        old takes nothing away from what the others say.
        """
        nearest = await self._node.find_nearest_nodes(
            ids, k_nearest=REPLICAS, beam_size=BEAM, exclude_self=True
        )
        wanted = defaultdict(list)
        for key_id, nodes in nearest.items():
            for peer in nodes.values():
                wanted[peer].append(key_id)
        calls = [
            self._node.protocol.call_find(peer, some)
            for peer, key_ids in wanted.items()
            if peer not in self._node.blacklist  # it has just been silent during the search
            for some in _chunks(key_ids, KEYS_PER_CALL)
        ]
        answers = await asyncio.gather(*calls)
        if wanted and not any(answers):
            raise StoreUnreachable("None of the peers that hold records answered.", "Check the connection.")
        found: dict[DHTID, list[bytes]] = {
            key_id: _values(self._node.protocol.storage.get(key_id)) for key_id in ids
        }
        for answer in filter(None, answers):
            for key_id, (entry, _) in answer.items():
                found[key_id] += _values(entry)
        return found

    def _newest(self, values: Iterable[bytes]) -> list[SignedRecord]:
        newest: dict[str, SignedRecord] = {}
        for value in values:
            try:
                record = self._signatures.unpack(_unwrap(value))
                check_time(record, self.now())
            except RecordError as error:
                if error.fault != "expired":
                    self.dropped[error.fault] += 1
                continue
            if record.peer != self._transport.peer and not self._transport.door.admits(record.peer_id):
                continue
            known = newest.get(record.peer)
            if known is None or known.expires_at < record.expires_at:
                newest[record.peer] = record
        return list(newest.values())

    async def _join(self) -> None:
        """Reach at least one initial peer and look around from there."""
        if not self._initial:
            return
        deadline = time.monotonic() + JOIN_TIMEOUT
        while not await self._ping_initial():
            await self._check_key()
            if time.monotonic() + JOIN_PAUSE > deadline:
                raise StoreUnreachable(
                    "None of the initial peers answered.",
                    "Check that one of them is running and that its address is right.",
                )
            await asyncio.sleep(JOIN_PAUSE)
        async with _within(GET_TIMEOUT, "searched"):
            await self._node.find_nearest_nodes([self._node.node_id])

    async def _rejoin(self) -> None:
        """Look again for initial peers that this one has lost: two halves of a swarm meet through them."""
        table = self._node.protocol.routing_table
        lost = [peer for peer in self._initial if peer not in table]
        is_alone = not table.uid_to_peer_id
        if not lost or (self.now() < self._rejoin_at and not is_alone):
            return
        self._rejoin_at = self.now() + REJOIN_PERIOD
        if not await self._ping_initial() and is_alone:
            raise StoreUnreachable(
                "No peer of the swarm can be reached.", "Check this computer's connection."
            )

    async def _check_key(self) -> None:
        """
        Raises:
            InputError: an initial peer is there, and this one has not the key that it has.
        """
        is_private = self._transport.door.key is not None
        if any(peer.to_base58() in self._calls.refused_by for peer in self._initial):
            raise InputError(
                "This swarm has another key.",
                "Ask a member for its key file, or for an invitation: python -m swarm.client invite",
            )
        probes = (self._calls.speaks(peer, _PING, privately=not is_private) for peer in self._initial)
        if not any(await asyncio.gather(*probes)):
            return
        if is_private:
            raise InputError("This swarm has no key: it is open to all.", "Leave --swarm-key out to join it.")
        raise InputError(
            "This swarm is private: it takes a key to join it.",
            "Give --swarm-key FILE; or give as --initial-peers the invitation that a member makes.",
        )

    async def _ping_initial(self) -> bool:
        """Whether any initial peer answered.

        Raises:
            SwarmError: all that answered refused this peer.
        """
        self._node.blacklist.clear()
        pings = (self._node.protocol.call_ping(peer, validate=True, strict=True) for peer in self._initial)
        answers = await asyncio.gather(*pings, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, ValidationError):
                raise answer
        refusals = [answer for answer in answers if isinstance(answer, ValidationError)]
        welcomes = [answer for answer in answers if isinstance(answer, DHTID)]
        if refusals and not welcomes:
            raise SwarmError(
                f"The swarm answers, but this peer cannot join it: {refusals[0]}.",
                "Check that this computer's clock is right and that others can reach its port.",
            ) from refusals[0]
        return bool(welcomes)


class _OwnRecordsOnly(RecordValidatorBase):
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
            signed = self.signatures.unpack(_unwrap(record.value))
            check_lifetime(signed, time.time())
            if _place(signed) != (record.key, record.subkey, record.expiration_time):
                raise RecordError("misplaced", "A record lies under another key, peer or time than its own.")
        except RecordError as error:
            self.dropped[error.fault] += 1
            self._calls.blame_caller()
            return False
        return True


class _BoundedStorage(DHTLocalStorage):
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


_wrapped_bytes = msgspec.msgpack.Decoder(bytes)
_encoder = msgspec.msgpack.Encoder()


def _unwrap(value: object) -> bytes:
    """The packed record in a value of hivemind's, which is msgpack's form of those bytes.

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


def _values(entry: ValueWithExpiration | None) -> list[bytes]:
    if entry is None or not isinstance(entry.value, DictionaryDHTValue):
        return []
    with entry.value.freeze():  # or it would weigh a size limit that the remote peer wrote into it
        return [item.value for _, item in entry.value.items()]


def _chunks(items: Sequence[DHTID], size: int) -> Iterator[Sequence[DHTID]]:
    return (items[start : start + size] for start in range(0, len(items), size))


@asynccontextmanager
async def _within(seconds: float, done: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise StoreUnreachable(
            f"Records could not be {done} in time.", "The swarm or the connection to it may be overloaded."
        ) from error
