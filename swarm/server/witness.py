"""A witness: tells peers how this one sees them, and whether it could connect to their machine.

Nobody can have others looked into. Only the machine that asks is dialled, at the address that its own
connection comes from; nothing is sent there; what is told is one bit, whether a peer answers, and a no always
takes equally long. How often is bounded for each machine, and for all together.
"""

import asyncio
import ipaddress
import time
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from swarm.allowance import Allowance
from swarm.net.addresses import endpoint_of
from swarm.net.dialling import Dialled, dial
from swarm.net.messages import DialBack, DialledBack, Error, Observe, Observed
from swarm.net.transport import PeerId, Transport
from swarm.server.admission import refusal
from swarm.version import VERSION

DIAL_TIMEOUT = 5.0
"""Seconds that a machine has to answer, and after which a no is told."""

RELAYED = "Your connection does not come straight from your machine, which can thus not be dialled."

Dial: TypeAlias = Callable[[str, int, float], Awaitable[Dialled]]


class Witness:
    """Answers `Observe` and `DialBack`. `now` gives unix seconds."""

    def __init__(self, transport: Transport, dial: Dial = dial, now: Callable[[], float] = time.time):
        self._transport = transport
        self._dial = dial
        self._now = now
        self._looks = Allowance(rate=1.0, burst=10)
        self._dials = Allowance(rate=0.1, burst=3)
        self._all_dials = Allowance(rate=1.0, burst=10)

    async def observe(self, peer: PeerId, asked: Observe) -> Observed | Error:
        wait = self._looks.take(peer, self._now())
        if wait:
            return refusal("no_capacity", "You ask too often.", wait)
        address = await self._transport.seen_at(peer)
        return Observed(nonce=asked.nonce, address=address, clock=self._now(), version=VERSION)

    async def dial_back(self, peer: PeerId, asked: DialBack) -> DialledBack | Error:
        origin = endpoint_of(await self._transport.seen_at(peer))
        if origin is None or origin.is_relayed or origin.kind not in ("ip4", "ip6"):
            return refusal("bad_request", RELAYED)
        wait = self._dials.take(_machine(origin.host), self._now()) or self._all_dials.take("", self._now())
        if wait:
            return refusal("no_capacity", "This server has dialled back often enough for now.", wait)
        is_reached = await self._is_reached(origin.host, asked.port)
        address = f"/{origin.kind}/{origin.host}/tcp/{asked.port}"
        return DialledBack(nonce=asked.nonce, address=address, is_reached=is_reached)

    async def _is_reached(self, host: str, port: int) -> bool:
        ends_at = asyncio.get_running_loop().time() + DIAL_TIMEOUT
        is_reached = await self._dial(host, port, DIAL_TIMEOUT) == "greeted"
        if not is_reached:
            await asyncio.sleep(ends_at - asyncio.get_running_loop().time())
        return is_reached


def _machine(host: str) -> str:
    """Whom to count a request for: an IPv4 address, or the network that holders of IPv6 addresses have."""
    ip = ipaddress.ip_address(host)
    return host if ip.version == 4 else str(ipaddress.ip_network((host, 64), strict=False))
