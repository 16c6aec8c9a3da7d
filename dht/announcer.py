"""Announcing: keeps what a server says of itself in the DHT, and takes it back when the server leaves.

Owns when records are written and until when they hold. It must not know how the announcement comes about.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

import msgspec

from swarm.dht.announcement import (
    MODELS_KEY,
    Announcement,
    ModelEntry,
    announcement_from,
    block_key,
    encode,
    model_entry_from,
)
from swarm.dht.records import SignedRecord, sign
from swarm.dht.store import RecordStore, StoreUnreachable
from swarm.errors import SwarmError
from swarm.net.identity import Identity

logger = logging.getLogger(__name__)

PERIOD = 15.0
"""Seconds between announcements. One holds for two periods, so that a single lost one does no harm and a
server that died is forgotten within 30 seconds; what changes in between is announced at once."""

MIN_INTERVAL = 0.5
"""Seconds between two announcements at least, however often things change."""

RETRY_AFTER = 3.0
WITHDRAW_TIMEOUT = 3.0
LATER = 0.001
"""Seconds by which a record must outlive the one it replaces."""


class Announcer:
    """Publishes one server's announcements under each block of its span, and its model in the list.

    Each record expires after two `period`s, in seconds, and always later than the one before it, which
    is what makes it the newer one.
    """

    def __init__(self, store: RecordStore, identity: Identity, model: ModelEntry, period: float = PERIOD):
        self._store = store
        self._identity = identity
        self._model = model
        self._period = period
        self._last: Announcement | None = None
        self._expires_at = 0.0
        self._changed = asyncio.Event()
        self._publishing = asyncio.Lock()

    def changed(self) -> None:
        """The announcement is out of date: `run` publishes soon."""
        self._changed.set()

    async def run(self, current: Callable[[], Announcement]) -> None:
        """Publish what `current` gives, at once, after each `changed` and each period, until cancelled.

        A failure is logged and tried again.
        """
        while True:
            self._changed.clear()
            wait = self._period
            try:
                await self.publish(current())
            except SwarmError as error:
                wait = min(RETRY_AFTER, self._period)
                logger.warning("peer %s could not announce itself: %s", self._identity.peer, error)
            await asyncio.sleep(MIN_INTERVAL)
            with suppress(TimeoutError):
                async with asyncio.timeout(max(wait - MIN_INTERVAL, 0)):
                    await self._changed.wait()

    async def publish(self, announcement: Announcement) -> int:
        """Publish now; how many records were accepted.

        Raises:
            StoreUnreachable: the store failed or accepted nothing.
            RecordError: the announcement is one that readers would refuse.
        """
        async with self._publishing:
            expires_at = max(self._store.now() + 2 * self._period, self._expires_at + LATER)
            entry = sign(self._identity, MODELS_KEY, encode(self._model), expires_at)
            model_entry_from(entry)
            return await self._put(
                [*self._records(announcement, expires_at), entry], announcement, expires_at
            )

    async def withdraw(self) -> None:
        """Say `left` under every key of the last announcement; give up after `WITHDRAW_TIMEOUT` seconds.

        The farewell expires a moment after that announcement: a record is only replaced by one that
        expires later. Cancel `run` first. The model's entry is left to expire.
        """
        try:
            async with asyncio.timeout(WITHDRAW_TIMEOUT), self._publishing:
                if self._last is not None:
                    farewell = msgspec.structs.replace(self._last, state="left")
                    expires_at = max(self._store.now(), self._expires_at) + LATER
                    await self._put(self._records(farewell, expires_at), farewell, expires_at)
        except (SwarmError, TimeoutError) as error:
            logger.warning("peer %s could not withdraw its announcement: %r", self._identity.peer, error)

    def _records(self, announcement: Announcement, expires_at: float) -> list[SignedRecord]:
        body = encode(announcement)
        keys = (block_key(announcement.model_id, block) for block in announcement.span.blocks)
        records = [sign(self._identity, key, body, expires_at) for key in keys]
        announcement_from(records[0])
        return records

    async def _put(self, records: list[SignedRecord], announcement: Announcement, expires_at: float) -> int:
        self._last, self._expires_at = announcement, expires_at  # even if it fails, some may have arrived
        accepted = await self._store.put(records)
        if not accepted:
            raise StoreUnreachable(
                "No peer accepted the announcement.", "Another process may use this identity."
            )
        return accepted
