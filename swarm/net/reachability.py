"""Whether others can connect to this peer, and where the internet sees it: some of them are asked.

They dial this machine at the address that its connection with them comes from, and tell yes or no; see the
server's witness. What follows from it is not known here.
"""

import asyncio
import logging
import socket
from collections.abc import Sequence

import psutil

from swarm.errors import SwarmError
from swarm.net.addresses import endpoint_of
from swarm.net.calls import MessageStream
from swarm.net.messages import AnyMessage, DialBack, DialledBack, Observe, Observed
from swarm.net.relaying import is_relayed
from swarm.net.transport import PeerId, Transport
from swarm.net.wary import is_public

logger = logging.getLogger(__name__)

WITNESSES = 3
OPEN_TIMEOUT = 5.0
ANSWER_TIMEOUT = 8.0
"""Seconds that a witness has: it tells a no after five."""


def own_addresses() -> frozenset[str]:
    """The IP addresses of this machine's interfaces."""
    found = psutil.net_if_addrs().values()
    families = (socket.AF_INET, socket.AF_INET6)
    return frozenset(
        one.address.partition("%")[0] for some in found for one in some if one.family in families
    )


def listening_port(addresses: Sequence[str]) -> int | None:
    """The TCP port at which a peer with these addresses can be dialled itself."""
    found = (endpoint_of(address) for address in addresses)
    return next((one.port for one in found if one and one.protocol == "tcp" and not one.is_relayed), None)


async def dialled_back(transport: Transport, peers: Sequence[PeerId], port: int) -> DialledBack | None:
    """What the first `WITNESSES` of `peers` say of connecting to `port` of this machine: that one of them
    could, else that one could not; None if none of them would try."""
    asked = [asyncio.create_task(_ask(transport, peer, port)) for peer in peers[:WITNESSES]]
    said: DialledBack | None = None
    try:
        for answer in asyncio.as_completed(asked):
            said = await answer or said
            if said is not None and said.is_reached:
                break
    finally:
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
    return said


async def seen_outside(transport: Transport, peers: Sequence[PeerId]) -> str | None:
    """The multiaddr of the internet at which the first `WITNESSES` of `peers` see this peer.

    None if none of them does, or they do not agree: it is another one for each then.
    """
    asked = (_answer(transport, peer, Observe(nonce=1)) for peer in peers[:WITNESSES])
    told = {answer.address for answer in await asyncio.gather(*asked) if isinstance(answer, Observed)}
    outer = {address for address in told if is_public([address]) and not is_relayed([address])}
    return outer.pop() if len(outer) == 1 else None


async def _ask(transport: Transport, peer: PeerId, port: int) -> DialledBack | None:
    answer = await _answer(transport, peer, DialBack(nonce=1, port=port))
    return answer if isinstance(answer, DialledBack) else None


async def _answer(transport: Transport, peer: PeerId, question: AnyMessage) -> AnyMessage | None:
    try:
        async with asyncio.timeout(OPEN_TIMEOUT):
            calls = MessageStream(await transport.open_stream(peer))
        try:
            answer, _ = await calls.call(question, timeout=ANSWER_TIMEOUT)
        finally:
            calls.close()
    except (SwarmError, TimeoutError) as error:
        logger.debug("peer %s does not answer a %s: %r", peer, type(question).__name__, error)
        return None
    return answer
