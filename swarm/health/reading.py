"""Reading a swarm's records: every model that is listed, and everybody who announces a block of it.

Owns what was read and is not out of date. Merging records is the directory's; what they amount to is
worked out elsewhere.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

from swarm.dht.announcement import MODELS_KEY, Announcement, ModelEntry, block_key
from swarm.dht.directory import MAX_MODELS, Listing, listed_models, merge, present
from swarm.dht.records import SignedRecord
from swarm.dht.store import RecordStore
from swarm.errors import SwarmError
from swarm.net.transport import PeerId

logger = logging.getLogger(__name__)

MODELS_AT_ONCE = 4
ROUND_TIMEOUT = 15.0
"""Seconds after which a reading ends, well before announcements expire."""

REMEMBERED = 3600.0
"""Seconds for which a model is still shown after the last peer that listed it has gone."""


class Records:
    """What peers say, read from `store` model by model: one that cannot be read spares the others.

    `read_at` is when all that can be read was, in unix seconds; `failed` are the ids of models that could
    not be, `error` says so, and `dropped` counts the records that were refused, by fault.
    """

    def __init__(self, store: RecordStore):
        self.read_at = 0.0
        self.error = ""
        self.dropped: Counter[str] = Counter()
        self.failed: frozenset[str] = frozenset()
        self._store = store
        self._models: dict[str, ModelEntry] = {}
        self._listed_at: dict[str, float] = {}
        self._tried_at: dict[str, float] = {}
        self._read_at: dict[str, float] = {}
        self._listings: dict[str, dict[PeerId, Listing]] = {}

    @property
    def models(self) -> list[ModelEntry]:
        """Those that are listed, or were within `REMEMBERED` seconds, by name."""
        return sorted(self._models.values(), key=lambda model: (model.name, model.model_id))

    def announcements(self) -> dict[str, list[Announcement]]:
        """By model id, what holds now of the peers that have not left."""
        now = self._store.now()
        return {model_id: present(listings, now) for model_id, listings in self._listings.items()}

    async def read(self) -> None:
        """Read everything once. What cannot be read stays as it was until it expires."""
        try:
            self._list((await self._store.get([MODELS_KEY]))[MODELS_KEY])
        except SwarmError as error:
            if not self.error:
                logger.warning("the records of the swarm could not be read: %s", error)
            self.error = error.message
            return
        failed = await self._read_models()
        self.error = f"{failed} of {len(self._models)} models could not be read." if failed else ""
        self.read_at = self._store.now()

    def _list(self, records: Sequence[SignedRecord]) -> None:
        now = self._store.now()
        for model in listed_models(records):
            self._models[model.model_id] = model
            self._listed_at[model.model_id] = now
        newest = sorted(self._models, key=lambda model_id: -self._listed_at[model_id])
        for place, model_id in enumerate(newest):
            if place >= MAX_MODELS or now - self._listed_at[model_id] > REMEMBERED:
                for table in (self._models, self._listed_at, self._tried_at, self._read_at, self._listings):
                    table.pop(model_id, None)

    async def _read_models(self) -> int:
        """How many could not be read."""
        waiting = sorted(self._models, key=self._turn_of)
        turn = asyncio.Semaphore(MODELS_AT_ONCE)
        began = self._store.now()
        with suppress(TimeoutError):
            async with asyncio.timeout(ROUND_TIMEOUT), asyncio.TaskGroup() as tasks:
                for model_id in waiting:
                    tasks.create_task(self._read_model(self._models[model_id], turn), name=f"read {model_id}")
        failed = [model_id for model_id in waiting if self._read_at.get(model_id, 0.0) < began]
        self.failed = frozenset(failed)
        return len(failed)

    def _turn_of(self, model_id: str) -> tuple[bool, float]:
        """Those that could not be read the last time wait until all others were, longest untried first."""
        return model_id in self.failed, self._tried_at.get(model_id, 0.0)

    async def _read_model(self, model: ModelEntry, turn: asyncio.Semaphore) -> None:
        keys = [block_key(model.model_id, block) for block in range(model.num_blocks)]
        async with turn:
            self._tried_at[model.model_id] = self._store.now()
            try:
                found = await self._store.get(keys)
            except SwarmError as error:
                logger.debug("the records of %s could not be read: %s", model.model_id, error)
                return
        records = (record for key in keys for record in found[key])
        known = self._listings.get(model.model_id, {})
        now = self._store.now()
        self._listings[model.model_id], dropped = merge(known, records, model.num_blocks, now)
        self._read_at[model.model_id] = now
        self.dropped += dropped
