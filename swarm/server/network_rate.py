"""How many bytes a second this peer can send and take, measured by moving some to and from other peers.

What is moved is little, and asked of few: see `probes` for how much a peer allows. Nobody else is asked.
"""

import asyncio
import logging
from collections.abc import Sequence

from swarm.dht.announcement import Announcement
from swarm.errors import SwarmError
from swarm.net.calls import MessageStream
from swarm.net.messages import MAX_PROBE_BYTES, Probe, Probed
from swarm.net.transport import Transport

logger = logging.getLogger(__name__)

FIRST_BYTES, MOST_BYTES, GROWTH = 32 * 1024, 512 * 1024, 4
"""What is moved first each way, at most, and how many times more after what was too fast to measure."""

MEASURABLE = 0.1
"""Seconds that moving must take beyond the way itself to be sure of the rate."""

PINGS = 3
TIMEOUT = 20.0
"""Seconds that measuring with one peer may take, whatever the peer does."""

MOST_PEERS = 3
"""Peers to measure with: the fastest way is the one that this peer limits."""


async def network_rate(transport: Transport, peers: Sequence[Announcement]) -> float:
    """Bytes a second, the slower of both directions; 0 if none of the first `MOST_PEERS` allows it."""
    rates = [await _rate_to(transport, peer) for peer in peers[:MOST_PEERS]]
    return max(rates, default=0.0)


async def _rate_to(transport: Transport, peer: Announcement) -> float:
    try:
        async with asyncio.timeout(TIMEOUT):
            stream = MessageStream(await transport.open_stream(peer.peer_id, peer.addresses))
            try:
                return await _measured(stream, transport)
            finally:
                stream.close()
    except (SwarmError, TimeoutError) as error:
        logger.info("the way to peer %s cannot be measured: %r", peer.peer, error)
        return 0.0


async def _measured(stream: MessageStream, transport: Transport) -> float:
    """The slower direction's rate.

    Raises:
        SwarmError: the peer does not allow it, or does not answer.
    """
    rtt, allowed = min([await _probe(stream, transport) for _ in range(PINGS)])
    rates = []
    for goes in (True, False):
        size, rate = FIRST_BYTES, 0.0
        while size <= min(allowed, MOST_BYTES):
            seconds, allowed = await _probe(stream, transport, *((size, 0) if goes else (0, size)))
            rate = size / max(seconds - rtt, 1e-6)
            if seconds - rtt >= MEASURABLE:
                break
            size *= GROWTH
        rates.append(rate)
    return min(rates)


async def _probe(
    stream: MessageStream, transport: Transport, size: int = 0, back: int = 0
) -> tuple[float, int]:
    """Seconds that it takes, and how much may be moved after that."""
    asked = transport.clock()
    answer, _ = await stream.call(
        Probe(nonce=0, size=size, back=back), bytes(size), timeout=TIMEOUT, max_body=MAX_PROBE_BYTES
    )
    assert isinstance(answer, Probed), "a call returns what answers it"
    return transport.clock() - asked, answer.allowed
