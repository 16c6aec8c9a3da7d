"""The TCP port at which shortcuts begin: who connects there, and what they must bring.

Who connects says nothing but a greeting: the id of an offer, and the same id sealed with the offer's key.
Whoever says something else, or nothing, is gone after a moment and has cost a few bytes. Knows offers, and
not the streams that they were made on.
"""

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from swarm.net.sealed_connection import LENGTH, PieceSeal, SealedConnection
from swarm.net.sealing import TAG_BYTES, SealBroken
from swarm.net.shortcut_words import ID_BYTES, Offer

logger = logging.getLogger(__name__)

GREETING_BYTES = ID_BYTES + LENGTH.size + ID_BYTES + TAG_BYTES
GREETING_TIME = 1.0
"""Seconds for a greeting to come."""
MAX_GREETING = 32
"""Connections that may be without a greeting; those beyond are closed at once."""
OFFER_TIME = 10.0
"""Seconds for which an offer holds."""
MAX_SHORTCUTS = 512
"""Shortcuts, open or offered; no more are offered."""

_ACCEPT_PAUSE = 1.0  # seconds, where this process has no file descriptors left

OnConnected = Callable[[SealedConnection], None]


def greeting(offer: Offer, seal: PieceSeal) -> bytes:
    """What the opener says first; `seal` is that of its direction."""
    return offer.id + seal.close(offer.id)


@dataclass(frozen=True)
class _Waiting:
    offer: Offer
    on_connected: OnConnected
    until: asyncio.TimerHandle


class ShortcutPort:
    """One port, at each of several hosts."""

    def __init__(self, port: int, sockets: Sequence[socket.socket]):
        self.port = port
        self._sockets = sockets
        self._waiting: dict[bytes, _Waiting] = {}
        self._open: set[SealedConnection] = set()
        self._greeting: set[asyncio.Task[None]] = set()
        self._accepting = [asyncio.create_task(self._accept_forever(one)) for one in sockets]

    @classmethod
    def listen(cls, hosts: Sequence[str], port: int) -> "ShortcutPort":
        """Listen at these IP addresses; port 0 is a free one.

        Raises:
            OSError: it is not to be had.
        """
        sockets: list[socket.socket] = []
        try:
            for host in dict.fromkeys(hosts):
                sockets.append(_listen(host, port))
                port = sockets[0].getsockname()[1]
        except OSError:
            for one in sockets:
                one.close()
            raise
        return cls(port, sockets)

    def offer(self, on_connected: OnConnected) -> Offer | None:
        """An offer for the other end of a stream; None if there are too many. Who takes it is connected."""
        if len(self._waiting) + len(self._open) >= MAX_SHORTCUTS:
            return None
        offer = Offer.new(self.port)
        until = asyncio.get_running_loop().call_later(OFFER_TIME, self.withdraw, offer)
        self._waiting[offer.id] = _Waiting(offer, on_connected, until)
        return offer

    def withdraw(self, offer: Offer) -> None:
        """Nobody is to take that offer any more. Safe to call again."""
        waiting = self._waiting.pop(offer.id, None)
        if waiting is not None:
            waiting.until.cancel()

    async def close(self) -> None:
        """Stop listening, and end all that began here."""
        tasks = [*self._accepting, *self._greeting]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for one in self._sockets:
            one.close()
        for waiting in list(self._waiting.values()):
            self.withdraw(waiting.offer)
        for connection in self._open:
            connection.abort()

    async def _accept_forever(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listening)
            except OSError as error:
                logger.debug("nobody can begin a shortcut: %s", error)
                await asyncio.sleep(_ACCEPT_PAUSE)
                continue
            if len(self._greeting) >= MAX_GREETING:
                connection.close()
                continue
            task = asyncio.create_task(self._greet(connection), name="greet at the port of shortcuts")
            self._greeting.add(task)
            task.add_done_callback(self._greeting.discard)

    async def _greet(self, connection: socket.socket) -> None:
        try:
            async with asyncio.timeout(GREETING_TIME):
                heard = await _exactly(connection, GREETING_BYTES)
            waiting, theirs = self._greeted(heard)
            self.withdraw(waiting.offer)
            sealed = SealedConnection(PieceSeal(waiting.offer.to_opener), theirs, self._open.discard)
            await asyncio.get_running_loop().connect_accepted_socket(lambda: sealed, connection)
        except (OSError, EOFError, SealBroken) as error:
            logger.debug("somebody connected to the port of shortcuts in vain: %r", error)
            connection.close()
            return
        except BaseException:
            connection.close()
            raise
        self._open.add(sealed)
        waiting.on_connected(sealed)
        sealed.write(waiting.offer.id)  # the opener goes over once it has this

    def _greeted(self, heard: bytes) -> tuple[_Waiting, PieceSeal]:
        """Which offer the greeting is for, and the seal that goes on from there.

        Raises:
            SealBroken: it is for none.
        """
        waiting = self._waiting.get(heard[:ID_BYTES])
        if waiting is None:
            raise SealBroken
        seal = PieceSeal(waiting.offer.to_acceptor)
        (size,) = LENGTH.unpack_from(heard, ID_BYTES)
        if size != ID_BYTES + TAG_BYTES or seal.open(heard[ID_BYTES + LENGTH.size :]) != waiting.offer.id:
            raise SealBroken
        return waiting, seal


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen()
        listening.setblocking(False)
    except OSError:
        listening.close()
        raise
    return listening


async def _exactly(connection: socket.socket, size: int) -> bytes:
    """
    Raises:
        EOFError: the connection has ended before.
    """
    read = bytearray()
    while len(read) < size:
        piece = await asyncio.get_running_loop().sock_recv(connection, size - len(read))
        if not piece:
            raise EOFError
        read += piece
    return bytes(read)
