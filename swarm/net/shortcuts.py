"""Shortcuts: TCP connections between two processes, over which streams go on past the libp2p daemons.

A stream is opened through libp2p, and all that is agreed on about a shortcut is said over it: so only its two
ends know the keys. Owns the port that this peer offers, and with whom a shortcut was tried in vain. How a
stream turns to one is told in `shortcut_turns`.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from swarm.allowance import Allowance
from swarm.net.sealed_connection import PieceSeal, SealedConnection
from swarm.net.shortcut_port import OnConnected, ShortcutPort, greeting
from swarm.net.shortcut_words import ID_BYTES, Offer
from swarm.net.transport import PeerId, TransportError

logger = logging.getLogger(__name__)

PROTOCOL_SUFFIX = "/shortcuts"
"""What is added to the id of a protocol whose streams may go on by a shortcut."""

DIAL_TIME = 2.0
"""Seconds to reach the other end at all of its hosts."""
REST = 300.0
"""Seconds without another try with a peer that was not reached."""

HostsOf = Callable[[PeerId], Awaitable[Sequence[str]]]


def has_shortcuts(protocol: str) -> bool:
    """Whether both ends of a stream that speaks `protocol` know of shortcuts."""
    return protocol.endswith(PROTOCOL_SUFFIX)


class Shortcuts:
    """Those of one peer, which offers them at one TCP `port` of the IP addresses `hosts`; 0 is a free one.

    It reaches others at those that `hosts_of` tells. Without a port it has nothing to do with shortcuts.
    """

    def __init__(self, hosts: Sequence[str], port: int | None, hosts_of: HostsOf):
        self._hosts = hosts
        self._given_port = port
        self._hosts_of = hosts_of
        self._port: ShortcutPort | None = None
        self._dialled: set[SealedConnection] = set()
        self._in_vain = Allowance(rate=1 / REST, burst=1)

    def protocols(self, plain: str) -> list[str]:
        """The protocols that streams speak which without shortcuts speak `plain`, dearest first."""
        return [plain] if self._given_port is None else [plain + PROTOCOL_SUFFIX, plain]

    def listen(self) -> None:
        """Offer shortcuts from now on, if this peer has a host."""
        if self._given_port is None or not self._hosts:
            return
        try:
            self._port = ShortcutPort.listen(self._hosts, self._given_port)
        except OSError as error:
            logger.warning("No shortcuts to this peer, since their port cannot be opened: %s", error)

    def offer(self, on_connected: OnConnected) -> Offer | None:
        """An offer to make to the other end of a stream; None if none can be made now."""
        return None if self._port is None else self._port.offer(on_connected)

    def withdraw(self, offer: Offer) -> None:
        if self._port is not None:
            self._port.withdraw(offer)

    def is_worth_asking(self, peer: PeerId) -> bool:
        """Whether `peer` was not lately tried in vain."""
        return self._in_vain.left(peer, asyncio.get_running_loop().time()) >= 1

    async def reach(self, peer: PeerId, offer: Offer) -> SealedConnection | None:
        """The connection that `peer` has offered; None if there is no way to it."""
        try:
            async with asyncio.timeout(DIAL_TIME):
                for host in await self._hosts_of(peer):
                    if (connection := await self._dial(host, offer)) is not None:
                        return connection
        except (TimeoutError, TransportError) as error:
            logger.debug("no shortcut to peer %s: %r", peer, error)
        self._in_vain.take(peer, asyncio.get_running_loop().time())
        return None

    async def close(self) -> None:
        """End all shortcuts, and offer none any more. Safe to call again."""
        if self._port is not None:
            await self._port.close()
        for connection in self._dialled:
            connection.abort()
        await asyncio.sleep(0)  # what was aborted is lost in the loop's next turn

    async def _dial(self, host: str, offer: Offer) -> SealedConnection | None:
        ours = PieceSeal(offer.to_acceptor)
        connection = SealedConnection(ours, PieceSeal(offer.to_opener), self._dialled.discard)
        self._dialled.add(connection)
        try:
            await asyncio.get_running_loop().create_connection(lambda: connection, host, offer.port)
            connection.transport.write(greeting(offer, ours))
            if await connection.readexactly(ID_BYTES) == offer.id:
                return connection
        except (OSError, EOFError) as error:
            logger.debug("no shortcut at %s port %d: %r", host, offer.port, error)
        except BaseException:
            self._give_up(connection)
            raise
        self._give_up(connection)
        return None

    def _give_up(self, connection: SealedConnection) -> None:
        connection.abort()
        self._dialled.discard(connection)
