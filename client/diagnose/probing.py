"""Looking at one peer: whether it is reached, how far away it is, and what it tells of this one.

Every question has a deadline, and what comes of it is a fact to be told, never an error. What the facts
mean is not known here.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

from swarm.client.diagnose.seen import DialledBack, Fault, PeerSeen, Told
from swarm.errors import InputError, SwarmError
from swarm.net.addresses import Address, Endpoint, endpoint_of, parse_address
from swarm.net.calls import MessageStream, Refused, ping
from swarm.net.dialling import FAMILIES, Dialled, dial, resolve
from swarm.net.messages import DialBack, Observe, Observed, printable
from swarm.net.messages import DialledBack as Answer
from swarm.net.relaying import ENOUGH_BYTES
from swarm.net.transport import OtherPeer, OtherProtocol, PeerId, Transport, TransportError

logger = logging.getLogger(__name__)

PINGS = 3
PING_TIMEOUT = 3.0
OPEN_TIMEOUT = 12.0
OBSERVE_TIMEOUT = 5.0
DIAL_BACK_TIMEOUT = 10.0
TCP_TIMEOUT = 4.0
RESOLVE_TIMEOUT = 4.0

AT_ONCE = 8
"""Peers looked at together: few, so that pings do not wait for each other and measure that."""

FAULT_OF: dict[Dialled, Fault] = {
    "greeted": "no_connection",
    "not_a_peer": "not_a_peer",
    "refused": "refused",
    "silent": "silent",
    "no_way": "no_way",
}
PROGRESS: tuple[Fault, ...] = ("unresolved", "no_way", "silent", "refused", "not_a_peer", "no_connection")
"""How far one came on the way to a peer; of several addresses the one that led farthest counts."""

Find: TypeAlias = Callable[[Endpoint], Awaitable[Fault]]
"""Why nobody was reached there."""


class Probe:
    """Looks at peers from this one. `now` gives unix seconds; `find` says what is at an address instead."""

    def __init__(self, transport: Transport, now: Callable[[], float] = time.time, find: Find | None = None):
        self._transport = transport
        self._now = now
        self._find = find or what_is_at
        self._turn = asyncio.Semaphore(AT_ONCE)

    async def look_at(self, text: str, *, is_connected: bool = False) -> PeerSeen:
        """How it goes to reach the peer at an address, as a person gave it.

        With a peer to whom there is a connection already (`is_connected`) no other is made: what is found
        then is whether a peer listens there too.
        """
        try:
            address = parse_address(text)
        except InputError as error:
            return PeerSeen(printable(text), fault="malformed", detail=error.hint, given=text)
        look = (
            self._look_beside(address) if is_connected else self.look(str(address), address.peer, [address])
        )
        return replace(await look, given=text)

    async def look(self, name: str, peer: PeerId, addresses: Sequence[Address]) -> PeerSeen:
        """How it goes to reach `peer`, called `name`, at its addresses."""
        async with self._turn:
            endpoints = [found for found in map(endpoint_of, addresses) if found is not None]
            first = endpoints[0] if endpoints else None
            try:
                async with asyncio.timeout(OPEN_TIMEOUT):
                    texts = [str(address) for address in addresses]
                    stream = MessageStream(await self._transport.open_stream(peer, texts))
            except OtherPeer as other:
                return PeerSeen(name, peer, "another_peer", other.found, first)
            except OtherProtocol:
                return PeerSeen(name, peer, "other_protocol", at=first)
            except TransportError:
                raise
            except (SwarmError, TimeoutError) as error:
                logger.debug("peer %s could not be reached: %r", peer, error)
                fault, at = await self._why(endpoints)
                return PeerSeen(name, peer, fault, at=at)
            try:
                return await self._ask(name, stream)
            except TransportError:
                raise
            except (SwarmError, TimeoutError) as error:
                logger.debug("peer %s does not answer: %r", peer, error)
                return PeerSeen(name, peer, "mute", at=first)
            finally:
                stream.close()

    async def _look_beside(self, address: Address) -> PeerSeen:
        endpoint = endpoint_of(address)
        assert endpoint is not None, "an address that was read leads somewhere"
        found = await self._find(endpoint)
        return PeerSeen(str(address), address.peer, None if found == "no_connection" else found, at=endpoint)

    async def ask_to_dial(self, name: str, peer: PeerId, port: int) -> DialledBack:
        """Whether `peer` could connect to this one on a TCP port."""
        try:
            async with asyncio.timeout(OPEN_TIMEOUT):
                stream = MessageStream(await self._transport.open_stream(peer))
            try:
                asked = DialBack(nonce=1, port=port)
                answer, _ = await stream.call(asked, timeout=DIAL_BACK_TIMEOUT)
            finally:
                stream.close()
        except Refused as refused:
            return DialledBack(name, refusal=printable(refused.error.message))
        except TransportError:
            raise
        except (SwarmError, TimeoutError) as error:
            logger.debug("peer %s does not tell whether it can dial this one: %r", peer, error)
            return DialledBack(name, refusal="It did not answer in time.")
        assert isinstance(answer, Answer)
        return DialledBack(name, printable(answer.address), answer.is_reached)

    async def relays(self, peer: PeerId) -> bool:
        """Whether `peer`, who was reached, would relay to this one."""
        return await self._transport.bytes_relayed_by(peer) >= ENOUGH_BYTES

    async def _ask(self, name: str, stream: MessageStream) -> PeerSeen:
        peer, clock = stream.peer, self._transport.clock
        rtts = [await ping(stream, PING_TIMEOUT, clock=clock) for _ in range(PINGS)]
        remote = await self._transport.seen_at(peer)
        return PeerSeen(name, peer, rtt=min(rtts), remote=remote, told=await self._told(stream))

    async def _told(self, stream: MessageStream) -> Told | None:
        """What the peer tells of this one; None if it is too old to, or does not in time."""
        asked_at = self._now()
        try:
            answer, _ = await stream.call(Observe(nonce=1), timeout=OBSERVE_TIMEOUT)
        except SwarmError as error:
            logger.debug("peer %s does not tell how it sees this one: %r", stream.peer, error)
            return None
        assert isinstance(answer, Observed)
        answered_at = self._now()
        middle, uncertainty = (asked_at + answered_at) / 2, (answered_at - asked_at) / 2
        return Told(printable(answer.address), answer.clock - middle, uncertainty, printable(answer.version))

    async def _why(self, endpoints: Sequence[Endpoint]) -> tuple[Fault, Endpoint | None]:
        """What kept this peer from being reached, and where: at the address that led farthest."""
        faults = await asyncio.gather(*map(self._find, endpoints))
        found = max(zip(faults, endpoints, strict=True), key=lambda one: PROGRESS.index(one[0]), default=None)
        return found if found is not None else ("no_connection", None)


async def what_is_at(endpoint: Endpoint) -> Fault:
    """What is found where a peer should be, by a connection of its own."""
    hosts = [endpoint.host]
    if endpoint.kind not in ("ip4", "ip6"):
        hosts = await resolve(endpoint.host, FAMILIES[endpoint.kind], RESOLVE_TIMEOUT)
    if endpoint.protocol != "tcp":
        return "no_connection" if hosts else "unresolved"
    dialled = await asyncio.gather(*(dial(host, endpoint.port, TCP_TIMEOUT) for host in hosts[:4]))
    return max((FAULT_OF[one] for one in dialled), key=PROGRESS.index, default="unresolved")
