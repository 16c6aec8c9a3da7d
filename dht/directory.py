"""The directory: one peer's view of who serves which block of one model, and how far away they are.

Owns the view and the background work that keeps it fresh. Merging is a pure function; reading records
and measuring distances are done by the store and `RoundTrips`. It must not know how a route is chosen.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from hashlib import blake2b
from itertools import chain, groupby, zip_longest
from typing import NamedTuple

from swarm.dht.announcement import (
    MAX_NEIGHBOURS,
    MODELS_KEY,
    Announcement,
    ModelEntry,
    PeerState,
    announcement_from,
    block_key,
    encode,
    model_entry_from,
)
from swarm.dht.records import RecordError, SignedRecord
from swarm.dht.rtts import MAX_PEERS as MAX_MEASURED
from swarm.dht.rtts import RoundTrips
from swarm.dht.store import RecordStore
from swarm.errors import SwarmError
from swarm.net.transport import PeerId, Transport
from swarm.spans import Span

logger = logging.getLogger(__name__)

PERIOD = 5.0
"""Seconds between two readings of the DHT."""

EAGER_PERIOD = 1.0
"""The same while somebody waits for the view to change."""

MAX_PEERS = 2_000
MAX_MODELS = 100
SERVING: frozenset[PeerState] = frozenset(("serving",))


class Listing(NamedTuple):
    """What a peer said last, and until when it holds, in unix seconds."""

    announcement: Announcement
    expires_at: float


class Directory:
    """Who serves `model_id`, of `num_blocks` blocks, read anew every `period` seconds.

    An async context manager: inside it, the view is kept fresh. `span` is the one that this peer itself
    serves, if any: then it measures its distance to the holders of the next blocks, otherwise to all.
    What cannot be read stays as it was until it expires.
    """

    def __init__(
        self,
        store: RecordStore,
        transport: Transport,
        model_id: str,
        num_blocks: int,
        *,
        span: Span | None = None,
        period: float = PERIOD,
    ):
        self.model_id = model_id
        self.num_blocks = num_blocks
        self.span = span
        self.dropped: Counter[str] = Counter()
        self.error: SwarmError | None = None
        self._store = store
        self._peer = transport.peer
        self._round_trips = RoundTrips(transport)
        self._period = period
        self._listings: dict[PeerId, Listing] = {}
        self._models: list[ModelEntry] = []
        self._updated = asyncio.Condition()
        self._hurry = asyncio.Event()
        self._waiting = 0
        self._is_unmeasured = False
        self._tasks = asyncio.TaskGroup()
        self._background: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "Directory":
        await self._tasks.__aenter__()
        self._background = [
            self._tasks.create_task(self._refresh_forever(), name="directory: refresh"),
            self._tasks.create_task(self._measure_forever(), name="directory: measure"),
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._background:
            task.cancel()
        try:
            await self._tasks.__aexit__(None, None, None)  # what the caller raised stays as it is, unwrapped
        finally:
            self._round_trips.close()

    @property
    def announcements(self) -> list[Announcement]:
        """The newest of each peer that is neither expired nor of one that left, by span and peer."""
        return present(self._listings, self._store.now())

    def models(self) -> list[ModelEntry]:
        """The models that the swarm carries, as last read."""
        return list(self._models)

    def coverage(self) -> list[int]:
        """For each block, how many peers serve it."""
        return holders(self.announcements, self.num_blocks, SERVING)

    def missing(self, states: Collection[PeerState] = SERVING) -> list[Span]:
        """The spans that no peer in one of `states` holds."""
        held = holders(self.announcements, self.num_blocks, states)
        runs = groupby(range(self.num_blocks), key=lambda block: held[block] == 0)
        gaps = [list(blocks) for is_gap, blocks in runs if is_gap]
        return [Span(blocks[0], blocks[-1] + 1) for blocks in gaps]

    def joining(self) -> list[Announcement]:
        """The peers that still load their shard."""
        return [announcement for announcement in self.announcements if announcement.state == "joining"]

    def next_holders(self, span: Span) -> list[Announcement]:
        """Other peers to whom a route may go on after `span`: they hold the block where it ends."""
        there = [
            announcement
            for announcement in self.announcements
            if span.end in announcement.span.blocks and announcement.peer != self._peer
        ]
        return sample(there, MAX_NEIGHBOURS, self._peer)

    def next_rtts(self, span: Span) -> dict[str, float]:
        """What a server of `span` announces as `rtts`: seconds to the next holders that answer."""
        times = {holder.peer: self.rtt(holder.peer_id) for holder in self.next_holders(span)}
        return {peer: seconds for peer, seconds in times.items() if seconds is not None}

    def rtt(self, peer: PeerId) -> float | None:
        """Seconds from this peer to `peer` and back; None if unknown or unreachable."""
        return self._round_trips.rtt(peer)

    def is_missing(self, peer: PeerId) -> bool:
        """Whether `peer` could not be reached when it was last measured."""
        return self._round_trips.failures(peer) > 0

    async def refresh(self) -> None:
        """Read the DHT once.

        Raises:
            StoreUnreachable: it could not be read; the view stays as it was.
        """
        keys = [block_key(self.model_id, block) for block in range(self.num_blocks)]
        found = await self._store.get([MODELS_KEY, *keys])
        records = in_turn(found[key] for key in keys)
        self._listings, dropped = merge(self._listings, records, self.num_blocks, self._store.now())
        self._models = listed_models(found[MODELS_KEY])
        self.dropped += dropped
        self.error = None
        self._is_unmeasured = True
        await self._notify()

    async def measure(self) -> None:
        """Measure the round trip once to each peer that this one may need, or a sample of them."""
        if self.span is None:
            needed = sample(self.announcements, MAX_MEASURED, self._peer)
        else:
            needed = self.next_holders(self.span)
        await self._round_trips.measure(
            {announcement.peer_id: announcement.addresses for announcement in needed}
        )
        await self._notify()

    def hurry(self) -> None:
        """Read the DHT now rather than when it is due, since others may be there than are listed."""
        self._hurry.set()

    async def wait_for(self, predicate: Callable[[], bool], timeout: float) -> bool:
        """Wait up to `timeout` seconds, reading the DHT often, until `predicate()`; whether it came true.

        It is asked again whenever records or round trips are new.
        """
        if predicate():
            return True
        self._waiting += 1
        self.hurry()
        try:
            async with asyncio.timeout(timeout), self._updated:
                return await self._updated.wait_for(predicate)
        except TimeoutError:
            return predicate()
        finally:
            self._waiting -= 1

    async def _notify(self) -> None:
        async with self._updated:
            self._updated.notify_all()

    async def _refresh_forever(self) -> None:
        while True:
            try:
                await self.refresh()
            except SwarmError as error:
                if self.error is None:
                    logger.warning("the directory of %s could not be refreshed: %s", self.model_id, error)
                self.error = error
            await self._pause()

    async def _pause(self) -> None:
        self._hurry.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(EAGER_PERIOD if self._waiting else self._period):
                await self._hurry.wait()

    async def _measure_forever(self) -> None:
        """Measure once after each refresh; refreshes that come meanwhile count as one."""
        while True:
            async with self._updated:
                await self._updated.wait_for(lambda: self._is_unmeasured)
            self._is_unmeasured = False
            await self.measure()


def merge(
    known: Mapping[PeerId, Listing], records: Iterable[SignedRecord], num_blocks: int, now: float
) -> tuple[dict[PeerId, Listing], Counter[str]]:
    """`known` and `records` of one model's blocks together: of each peer what expires last and has not yet.

    Also counts, by fault, the records that were dropped. Who `left` stays listed as that, so that no
    older record can bring it back. At most `MAX_PEERS` are listed.
    """
    merged = {peer: listing for peer, listing in known.items() if now < listing.expires_at}
    dropped: Counter[str] = Counter()
    for record in records:
        held = merged.get(record.peer_id)
        if record.has_expired(now) or (held is not None and held.expires_at >= record.expires_at):
            continue
        try:
            announcement = announcement_from(record)
        except RecordError as error:
            dropped[error.fault] += 1
            continue
        if max((announcement.end, *(announcement.goes_to or ()))) > num_blocks:
            dropped["misplaced"] += 1
        elif held is None and len(merged) >= MAX_PEERS:
            dropped["too_many"] += 1
        else:
            merged[record.peer_id] = Listing(announcement, record.expires_at)
    return merged, dropped


def in_turn(found: Iterable[Sequence[SignedRecord]]) -> Iterator[SignedRecord]:
    """The first record of each block, then the second of each, and so on.

    Where there are more peers than are listed, those that are hold all blocks then, not the first ones alone.
    """
    return (record for record in chain.from_iterable(zip_longest(*found)) if record is not None)


def sample(announcements: Sequence[Announcement], most: int, peer: PeerId) -> list[Announcement]:
    """All `announcements`; or `most` of them that `peer` draws, the same again while they are there.

    In their own order the first ones would hold the first blocks, and all peers would take the same.
    """
    if len(announcements) <= most:
        return list(announcements)

    def lot(announcement: Announcement) -> bytes:
        return blake2b(f"{peer} {announcement.peer}".encode(), digest_size=8).digest()

    return sorted(announcements, key=lot)[:most]


def present(listings: Mapping[PeerId, Listing], now: float) -> list[Announcement]:
    """The announcements that hold at `now` of peers that have not left, by span and peer."""
    there = (
        listing.announcement
        for listing in listings.values()
        if now < listing.expires_at and listing.announcement.state != "left"
    )
    return sorted(there, key=lambda announcement: (announcement.span, announcement.peer))


def holders(
    announcements: Iterable[Announcement], num_blocks: int, states: Collection[PeerState]
) -> list[int]:
    """For each block, how many of `announcements` hold it in one of `states`."""
    held = Counter(
        block
        for announcement in announcements
        if announcement.state in states
        for block in announcement.span.blocks
    )
    return [held[block] for block in range(num_blocks)]


def listed_models(records: Iterable[SignedRecord]) -> list[ModelEntry]:
    """The models in records of `MODELS_KEY`, by name. Where peers differ on one, most of them are right."""
    votes: Counter[ModelEntry] = Counter()
    for record in records:
        try:
            votes[model_entry_from(record)] += 1
        except RecordError as error:
            logger.debug("peer %s lists a model wrongly: %s", record.peer, error)
    ranked = sorted(votes, key=lambda entry: (-votes[entry], encode(entry)))
    chosen: dict[str, ModelEntry] = {}
    for entry in ranked:
        chosen.setdefault(entry.model_id, entry)
    return sorted(list(chosen.values())[:MAX_MODELS], key=lambda entry: (entry.name, entry.model_id))


async def list_models(store: RecordStore) -> list[ModelEntry]:
    """All models that the swarm carries.

    Raises:
        StoreUnreachable: the records could not be read.
    """
    return listed_models((await store.get([MODELS_KEY]))[MODELS_KEY])


async def list_peers(store: RecordStore, model: ModelEntry) -> list[Announcement]:
    """Who serves or loads any block of `model`, one announcement a peer.

    Raises:
        StoreUnreachable: the records could not be read.
    """
    found = await store.get([block_key(model.model_id, block) for block in range(model.num_blocks)])
    listings, _ = merge({}, in_turn(found.values()), model.num_blocks, store.now())
    return present(listings, store.now())
