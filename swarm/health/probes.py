"""Whether peers can be reached from here, and how far away they are: pings in turn, and on request.

Owns the attempts and what came of them. A swarm may have far more peers than streams can be kept open, so
each attempt opens its own; those asked longest ago are next. It must not know why anybody asks.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from swarm.errors import SwarmError
from swarm.health.state import Reach
from swarm.net.calls import MessageStream, ping
from swarm.net.transport import PeerId, Transport

logger = logging.getLogger(__name__)

SAMPLES = 5
PER_ROUND = 64
AT_ONCE = 8
OPEN_TIMEOUT = 6.0
PING_TIMEOUT = 3.0
FRESH = 10.0
"""Seconds for which an answer is given again instead of asking the peer."""

MAX_KNOWN = 4_000


@dataclass
class _Probe:
    """The attempts to reach one peer: round trips in seconds, and the last one's end."""

    rtts: deque[float] = field(default_factory=lambda: deque(maxlen=SAMPLES))
    last: Reach | None = None
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


class Probes:
    """Pings from this peer. `now` gives unix seconds."""

    def __init__(self, transport: Transport, now: Callable[[], float]):
        self._transport = transport
        self._now = now
        self._probes: dict[PeerId, _Probe] = {}
        self._turn = asyncio.Semaphore(AT_ONCE)

    def reaches(self) -> dict[PeerId, Reach]:
        """What is known of each peer that was ever asked, and not forgotten."""
        return {peer: probe.last for peer, probe in self._probes.items() if probe.last is not None}

    async def round(self, peers: Mapping[PeerId, Sequence[str]]) -> None:
        """Ping those of `peers` (with their addresses) whose turn it is, and forget most others."""
        self._forget(peers)
        waiting = sorted((peer for peer in peers if peer != self._transport.peer), key=self._asked_at)
        async with asyncio.TaskGroup() as tasks:
            for peer in waiting[:PER_ROUND]:
                tasks.create_task(self._asked(peer, peers[peer]), name=f"ping {peer}")

    async def check(self, peer: PeerId, addresses: Sequence[str] = ()) -> Reach:
        """Whether `peer` can be reached, asked now or within the last `FRESH` seconds.

        Callers who ask for the same peer at the same time share one attempt.
        """
        probe = self._probes.setdefault(peer, _Probe())
        async with probe.turn:
            if probe.last is not None and self._now() - probe.last.at < FRESH:
                return probe.last
            return await self._attempt(peer, probe, addresses)

    async def _asked(self, peer: PeerId, addresses: Sequence[str]) -> None:
        probe = self._probes.setdefault(peer, _Probe())
        async with probe.turn:
            await self._attempt(peer, probe, addresses)

    async def _attempt(self, peer: PeerId, probe: _Probe, addresses: Sequence[str]) -> Reach:
        async with self._turn:
            try:
                probe.rtts.append(await self._round_trip(peer, addresses))
            except (SwarmError, TimeoutError) as error:
                logger.debug("peer %s could not be reached: %r", peer, error)
                probe.rtts.clear()
        rtt = min(probe.rtts) if probe.rtts else None
        probe.last = Reach(rtt is not None, rtt, self._now())
        return probe.last

    async def _round_trip(self, peer: PeerId, addresses: Sequence[str]) -> float:
        async with asyncio.timeout(OPEN_TIMEOUT):
            stream = MessageStream(await self._transport.open_stream(peer, addresses))
        try:
            return await ping(stream, timeout=PING_TIMEOUT, clock=self._transport.clock)
        finally:
            stream.close()

    def _asked_at(self, peer: PeerId) -> float:
        probe = self._probes.get(peer)
        return probe.last.at if probe and probe.last else float("-inf")

    def _forget(self, kept: Mapping[PeerId, Sequence[str]]) -> None:
        others = [peer for peer in self._probes if peer not in kept and not self._probes[peer].turn.locked()]
        others.sort(key=self._asked_at)
        for peer in others[: max(len(self._probes) - MAX_KNOWN, 0)]:
            del self._probes[peer]
