"""Where the internet sees this peer: others are asked again and again, and this peer's network is told.

Behind a router that is what straight connections with peers behind other routers begin with. How they are
made is not known here.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from swarm.dht.store import RecordStore
from swarm.errors import SwarmError
from swarm.net.addresses import parse_address
from swarm.net.reachability import seen_outside
from swarm.net.relaying import is_relayed
from swarm.net.transport import Transport

logger = logging.getLogger(__name__)

ASK_PERIOD = 600.0
RETRY_PERIOD = 30.0
"""Seconds between two looks, and until the next one where nothing was seen. libp2p's daemon forgets an
address that nobody has told for half an hour."""
CANDIDATES = 8


@asynccontextmanager
async def looking_from_outside(
    transport: Transport, store: RecordStore, addresses: Sequence[str]
) -> AsyncIterator[None]:
    """Ask the peers at `addresses`, and others that are known, where they see this one, now and again."""
    task = asyncio.create_task(_look_forever(transport, store, addresses), name="look from outside")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _look_forever(transport: Transport, store: RecordStore, addresses: Sequence[str]) -> None:
    while True:
        is_seen = await _look(transport, store, addresses)
        await asyncio.sleep(ASK_PERIOD if is_seen else RETRY_PERIOD)


async def _look(transport: Transport, store: RecordStore, addresses: Sequence[str]) -> bool:
    """Whether the internet's view of this peer was found."""
    try:
        known = (*addresses, *await store.neighbours(CANDIDATES))
        peers = dict.fromkeys(parse_address(one).peer for one in known if not is_relayed([one]))
        seen = await seen_outside(transport, [peer for peer in peers if peer != transport.peer])
        if seen is not None:
            await transport.be_seen_at(seen)
            logger.debug("the internet sees this peer at %s", seen)
    except SwarmError as error:
        logger.info("nobody tells where the internet sees this peer: %s", error)
        return False
    return seen is not None
