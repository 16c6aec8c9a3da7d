"""Round-trip times: how far other peers are from this one, measured by pings over one kept stream each.

Owns those streams and the samples. It must not know why a peer's distance matters.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from swarm.errors import SwarmError
from swarm.net.calls import MessageStream, ping
from swarm.net.relaying import is_relayed
from swarm.net.transport import PeerId, Transport

logger = logging.getLogger(__name__)

MAX_PEERS = 64
SAMPLES = 5
PING_TIMEOUT = 3.0
OPEN_TIMEOUT = 5.0
AT_ONCE = 8
"""Peers measured at the same time: few, so that pings do not wait for each other and measure that."""


@dataclass
class _Probe:
    """What is known of the way to one peer."""

    stream: MessageStream | None = None
    samples: deque[float] = field(default_factory=lambda: deque(maxlen=SAMPLES))
    failures: int = 0


class RoundTrips:
    """Round trips from this peer to others, each the least of its last `SAMPLES` pings.

    What a ping takes beyond the way itself, waiting for a busy peer or a busy sender, only ever adds to
    it, so the least of a few is the nearest to the truth; and after as many pings a new way is believed.
    """

    def __init__(self, transport: Transport):
        self._transport = transport
        self._probes: dict[PeerId, _Probe] = {}
        self._measuring = asyncio.Lock()

    def rtt(self, peer: PeerId) -> float | None:
        """Seconds to `peer` and back; None if it is not measured or could not be reached the last time."""
        probe = self._probes.get(peer)
        return min(probe.samples) if probe and probe.samples else None

    def failures(self, peer: PeerId) -> int:
        """How many times in a row `peer` could not be reached."""
        probe = self._probes.get(peer)
        return probe.failures if probe else 0

    async def measure(self, peers: Mapping[PeerId, Sequence[str]]) -> None:
        """Ping each of `peers` (its addresses for the first time) once, and forget all others.

        At most `MAX_PEERS` are measured, those already known first.
        """
        others = sorted((peer for peer in peers if peer != self._transport.peer), key=self._is_new)
        chosen = others[:MAX_PEERS]
        for peer in self._probes.keys() - set(chosen):
            self._forget(peer)
        turn = asyncio.Semaphore(AT_ONCE)
        async with self._measuring, asyncio.TaskGroup() as tasks:
            for peer in chosen:
                tasks.create_task(self._measure(peer, peers[peer], turn), name=f"ping {peer}")

    def close(self) -> None:
        """Close all streams. Safe to call again."""
        for peer in list(self._probes):
            self._forget(peer)

    def _is_new(self, peer: PeerId) -> bool:
        return peer not in self._probes

    async def _measure(self, peer: PeerId, addresses: Sequence[str], turn: asyncio.Semaphore) -> None:
        probe = self._probes.setdefault(peer, _Probe())
        async with turn:
            stream, probe.stream = probe.stream, None  # given back only if it still works
            try:
                if stream is None:
                    async with asyncio.timeout(OPEN_TIMEOUT):
                        stream = MessageStream(await self._transport.open_stream(peer, addresses))
                probe.samples.append(await ping(stream, timeout=PING_TIMEOUT, clock=self._transport.clock))
                is_through_relay = is_relayed(addresses) and is_relayed([await self._transport.seen_at(peer)])
            except (SwarmError, TimeoutError) as error:
                if stream is not None:
                    stream.close()
                probe.samples.clear()
                probe.failures += 1
                logger.debug(
                    "peer %s could not be pinged, %d times in a row: %r", peer, probe.failures, error
                )
            else:
                probe.failures = 0
                if is_through_relay:
                    stream.close()  # while none is open, the network may find a straight way
                else:
                    probe.stream = stream

    def _forget(self, peer: PeerId) -> None:
        probe = self._probes.pop(peer)
        if probe.stream is not None:
            probe.stream.close()
