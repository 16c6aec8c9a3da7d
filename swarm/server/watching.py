"""Who is not to be counted with though it is still announced: servers that are gone, and those that never get
done with loading.

A record outlives its server by half a minute, which is long where nobody else holds a block. So where blocks
are thin, their holders are pinged. Owns what was seen of them; must not know what follows from it.
"""

import asyncio
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from swarm.dht.announcement import Announcement
from swarm.dht.directory import SERVING, Directory, holders
from swarm.dht.rtts import RoundTrips
from swarm.net.transport import PeerId, Transport
from swarm.spans import Span

PERIOD = 5.0
"""Seconds between two pings of a server."""

THIN = 2
"""Servers of a block up to which they are watched."""

MISSED = 2
"""Pings that a server has to miss, one after the other, to be taken for gone."""

STALLED = 120.0
"""Seconds without progress after which a server that loads is not counted with."""


class Loading(NamedTuple):
    """How far a server was with loading a span, and since when it has been there."""

    span: Span
    progress: float
    since: float


class Watch:
    """Looks after the servers of `directory`, while it runs."""

    def __init__(self, directory: Directory, transport: Transport):
        self._directory = directory
        self._peer = transport.peer
        self._round_trips = RoundTrips(transport)
        self._answered: set[PeerId] = set()
        self._missing: set[PeerId] = set()
        self._loading: dict[PeerId, Loading] = {}

    def gone(self) -> set[PeerId]:
        """Who is not to be counted with now."""
        now = asyncio.get_running_loop().time()
        self._loading = loading(self._loading, self._directory.announcements, now)
        stalled = {peer for peer, one in self._loading.items() if now > one.since + STALLED}
        return self._missing | stalled

    async def run(self) -> None:
        """Ping those who matter, until cancelled."""
        try:
            while True:
                await asyncio.sleep(PERIOD)
                await self.look()
        finally:
            self._round_trips.close()

    async def look(self) -> None:
        """Ping each server of thin blocks once."""
        watched = on_thin_blocks(self._directory.announcements, self._directory.num_blocks, self._peer)
        await self._round_trips.measure({one.peer_id: one.addresses for one in watched})
        peers = {one.peer_id for one in watched}
        self._answered = {
            peer for peer in peers if peer in self._answered or self._round_trips.rtt(peer) is not None
        }
        self._missing = missing(self._answered, {peer: self._round_trips.failures(peer) for peer in peers})


def on_thin_blocks(
    announcements: Iterable[Announcement], num_blocks: int, peer: PeerId
) -> list[Announcement]:
    """The other servers that serve a block which few do."""
    announcements = list(announcements)
    held = holders(announcements, num_blocks, SERVING)
    return [
        one
        for one in announcements
        if one.state == "serving"
        and one.peer != peer
        and min(held[block] for block in one.span.blocks) <= THIN
    ]


def missing(answered: set[PeerId], failures: dict[PeerId, int]) -> set[PeerId]:
    """Who has answered once and does not any more. Where nobody does, the fault is nearer."""
    silent = {peer for peer in answered if failures[peer] >= MISSED}
    return set() if len(silent) == len(answered) else silent


def loading(
    before: dict[PeerId, Loading], announcements: Sequence[Announcement], now: float
) -> dict[PeerId, Loading]:
    """Since when each server that loads has not come further."""
    found = {}
    for one in announcements:
        if one.state == "joining" and not one.asleep:
            known = before.get(one.peer_id)
            is_same = known is not None and (known.span, known.progress) == (one.span, one.progress)
            found[one.peer_id] = known if known and is_same else Loading(one.span, one.progress, now)
    return found
