"""A peer's door: who may open a stream to it, and to whom it opens any, settled before anything is said.

Both networks let streams through here, so that who is admitted is the same in tests as in the world: in a
private swarm who proves to have its key, and everywhere whom this peer's lists admit. Does not know what
streams are for.
"""

import asyncio
import logging
from collections.abc import Collection

from swarm.net import messages
from swarm.net.peer_lists import PeerLists
from swarm.net.proof import call_prove, on_prove
from swarm.net.swarm_key import SwarmKey
from swarm.net.transport import (
    PRIVATE_PROTOCOL,
    PROTOCOL,
    FrameError,
    NotAdmitted,
    PeerId,
    Stream,
    StreamClosed,
)

logger = logging.getLogger(__name__)

REFRESH_PERIOD = 1.0
"""Seconds between two looks at whether the lists have changed."""

TURN_AWAY_TIMEOUT = 5.0
"""Seconds in which a peer that is not admitted is told so."""


class Door:
    """The door of one peer: private with a `key`, else open to all whom the `lists` admit."""

    def __init__(self, key: SwarmKey | None = None, lists: PeerLists | None = None):
        self.key = key
        self._lists = lists
        self._watching: asyncio.Task[None] | None = None

    @property
    def protocol(self) -> str:
        """What streams through this door speak."""
        return PROTOCOL if self.key is None else PRIVATE_PROTOCOL

    def admits(self, peer: PeerId) -> bool:
        """Whether the lists admit `peer`."""
        return self._lists is None or self._lists.admits(peer)

    def check(self, peer: PeerId) -> None:
        """
        Raises:
            NotAdmitted: the lists do not admit `peer`.
        """
        if not self.admits(peer):
            raise NotAdmitted(f"This peer's lists do not admit peer {peer}.", "Change them to allow it.")

    async def call_enter(self, stream: Stream, own: PeerId) -> None:
        """Do what must be done first over a stream that this peer, `own`, has opened.

        Raises:
            NotAdmitted: the other end has not the swarm's key; the stream is closed.
        """
        if self.key is not None:
            await call_prove(stream, own, self.key)

    async def on_enter(self, stream: Stream, own: PeerId) -> None:
        """The same over one that was opened to this peer; who is not on the lists is told so.

        Raises:
            NotAdmitted: its peer may not come in; the stream is closed, or may be.
        """
        if self.key is not None:
            await on_prove(stream, own, self.key)
        if not self.admits(stream.peer):
            await _turn_away(stream)
            raise NotAdmitted(f"This peer's lists do not admit peer {stream.peer}.")

    def watch(self, streams: Collection[Stream]) -> None:
        """From now on keep the lists fresh, and close those of `streams` whose peers they no longer admit.

        `close` must follow. Calling it again changes nothing.
        """
        if self._lists is not None and self._watching is None:
            self._watching = asyncio.create_task(
                self._expel_forever(self._lists, streams), name="watch the lists of peers"
            )

    async def close(self) -> None:
        """Stop watching. Safe to call again."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)

    async def _expel_forever(self, lists: PeerLists, streams: Collection[Stream]) -> None:
        while True:
            await asyncio.sleep(REFRESH_PERIOD)
            if lists.refresh():  # a look at two small files: to ask a thread would cost more
                for stream in [stream for stream in streams if not lists.admits(stream.peer)]:
                    logger.info("closed a stream of peer %s, which is not admitted any more", stream.peer)
                    stream.close()


async def _turn_away(stream: Stream) -> None:
    """Answer the peer's first message with an error, and let it close the stream."""
    refusal = messages.Error(code="not_allowed", message=f"Peer {stream.peer} is not admitted here.")
    try:
        async with asyncio.timeout(TURN_AWAY_TIMEOUT):
            await stream.receive(max_body=0)
            await stream.send(messages.encode(refusal))
            while True:
                await stream.receive(max_body=0)
    except (TimeoutError, StreamClosed, FrameError):
        return
