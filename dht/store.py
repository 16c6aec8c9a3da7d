"""What a place for records must offer, whichever network is behind it.

Two implementations exist: `kademlia` over hivemind's DHT, and `memory` inside one process. A store keeps
for each key and each peer the record that expires last. It knows records, and not what they say.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from swarm.dht.records import SignedRecord
from swarm.errors import SwarmError


class StoreUnreachable(SwarmError):
    """The store gave no answer in time, or none of its peers could be reached."""


class RecordStore(Protocol):
    """One peer's access to the records of the swarm."""

    dropped: Counter[str]
    """How many records were refused on the way in or out, by the word of their `RecordError`."""

    @property
    def peers(self) -> int:
        """How many other peers this one knows to keep records."""
        ...

    def now(self) -> float:
        """The clock that records expire by, in unix seconds."""
        ...

    async def put(self, records: Sequence[SignedRecord]) -> int:
        """Publish `records`; how many were accepted.

        A record is refused where one of the same key and peer is known that expires at the same time
        or later.

        Raises:
            StoreUnreachable: nothing could be stored in time.
        """
        ...

    async def get(self, keys: Sequence[str]) -> dict[str, list[SignedRecord]]:
        """For each of `keys`, the newest record of each peer: verified, and unexpired at `now()`.

        A key without records has an empty list.

        Raises:
            StoreUnreachable: nothing could be read in time.
        """
        ...

    async def neighbours(self, most: int) -> list[str]:
        """Addresses of other peers that keep records, any `most` of those that this one knows.

        Raises:
            TransportError: this peer's own network has failed.
        """
        ...

    async def close(self) -> None:
        """Stop. Safe to call again."""
        ...
