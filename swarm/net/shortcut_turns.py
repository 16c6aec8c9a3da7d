"""How a stream turns from libp2p to a shortcut: without delaying, losing or reordering a frame.

The opener asks once the stream has shown that it lives. The acceptor makes an offer, and the opener connects
while frames go on as before. Once that has come about, the opener says `OVER` on the old way and goes on by
the new one; the acceptor hears that, and does the same. Each reads the old way up to that word. Where it does
not come about, nobody says `OVER`, and all stays as it was.
"""

import asyncio
from typing import Protocol

from swarm.net.sealed_connection import SealedConnection
from swarm.net.shortcut_words import ASK, OVER, Offer
from swarm.net.shortcuts import Shortcuts
from swarm.net.transport import FrameError, PeerId

LIVELY_FRAMES = 6
LIVELY_PAUSE = 5.0
"""A stream lives once so many frames went over it, each within so many seconds of the one before."""


class Turnable(Protocol):
    """What a stream does for its turn."""

    peer: PeerId

    def say(self, word: bytes) -> None:
        """Send a word at once."""
        ...

    def go_out_by(self, connection: SealedConnection) -> None:
        """Say `OVER`, and send by `connection` from now on."""
        ...

    def come_in_by(self, connection: SealedConnection) -> None:
        """Receive by `connection` from now on."""
        ...


class Turn(Protocol):
    """One end's part in it."""

    def on_frame(self) -> None:
        """A frame was sent, or has come."""
        ...

    def on_word(self, word: bytes) -> None:
        """
        Raises:
            FrameError: it has no place here.
        """
        ...

    def close(self) -> None:
        """The stream has ended: so does the shortcut."""
        ...


class OpenersTurn:
    """The turn of who opened `stream`."""

    def __init__(self, stream: Turnable, shortcuts: Shortcuts):
        self._stream = stream
        self._shortcuts = shortcuts
        self._clock = asyncio.get_running_loop().time
        self._frames = 0
        self._frame_at = 0.0
        self._has_asked = False
        self._dialling: asyncio.Task[None] | None = None
        self._connection: SealedConnection | None = None
        self._is_over = False

    def on_frame(self) -> None:
        if self._has_asked:
            return
        now = self._clock()
        self._frames = self._frames + 1 if now - self._frame_at <= LIVELY_PAUSE else 1
        self._frame_at = now
        if self._frames >= LIVELY_FRAMES and self._shortcuts.is_worth_asking(self._stream.peer):
            self._has_asked = True
            self._stream.say(ASK)

    def on_word(self, word: bytes) -> None:
        if word == OVER:
            if self._connection is None or self._is_over:
                raise _out_of_place()
            self._is_over = True
            self._stream.come_in_by(self._connection)
            return
        offer = Offer.of(word)
        if not self._has_asked or self._dialling is not None:
            raise _out_of_place()
        self._dialling = asyncio.create_task(self._dial(offer), name=f"shortcut to {self._stream.peer}")

    def close(self) -> None:
        if self._dialling is not None:
            self._dialling.cancel()
        if self._connection is not None:
            self._connection.leave()

    async def _dial(self, offer: Offer) -> None:
        self._connection = await self._shortcuts.reach(self._stream.peer, offer)
        if self._connection is not None:
            self._stream.go_out_by(self._connection)


class AcceptorsTurn:
    """The turn of whom `stream` was opened to."""

    def __init__(self, stream: Turnable, shortcuts: Shortcuts):
        self._stream = stream
        self._shortcuts = shortcuts
        self._was_asked = False
        self._offer: Offer | None = None
        self._connection: SealedConnection | None = None
        self._is_over = False
        self._is_closed = False

    def on_frame(self) -> None:
        pass

    def on_word(self, word: bytes) -> None:
        if word == OVER and self._connection is not None and not self._is_over:
            self._is_over = True
            self._stream.go_out_by(self._connection)
            self._stream.come_in_by(self._connection)
        elif word == ASK and not self._was_asked:
            self._was_asked = True
            self._offer = self._shortcuts.offer(self._on_connected)
            if self._offer is not None:
                self._stream.say(self._offer.word())
        else:
            raise _out_of_place()

    def close(self) -> None:
        self._is_closed = True
        if self._offer is not None:
            self._shortcuts.withdraw(self._offer)
        if self._connection is not None:
            self._connection.leave()

    def _on_connected(self, connection: SealedConnection) -> None:
        if self._is_closed:
            connection.abort()
        else:
            self._connection = connection


def _out_of_place() -> FrameError:
    return FrameError("A peer said something about shortcuts out of its place.")
