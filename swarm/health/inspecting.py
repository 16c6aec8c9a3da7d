"""Whether peers serve what they announce: in turn a session is opened at each of them, and closed again.

It costs them a page of KV memory for a moment. Owns what came of it. One refusal proves nothing, since a peer
may have changed meanwhile; a peer without room, or that admits only others, is not to blame. What it would
compute is not looked at.
"""

import asyncio
import logging
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from swarm.dht.announcement import Announcement
from swarm.errors import SwarmError
from swarm.net.calls import CallTimeout, MessageStream, Refused
from swarm.net.messages import Close, Open
from swarm.net.transport import FrameError, PeerId, StreamClosed, Transport

logger = logging.getLogger(__name__)

PER_ROUND = 8
AT_ONCE = 4
PERIOD = 300.0
"""Seconds between two looks at a peer that serves, and at one that may not."""

RETRY_PERIOD = 30.0
MISSES = 2
"""So many in a row, and a peer is shown as one that does not serve."""

OPEN_TIMEOUT = 6.0
ANSWER_TIMEOUT = 5.0
MAX_KNOWN = 4_000

INNOCENT = frozenset(("no_capacity", "draining", "warming_up", "not_allowed"))
"""What a peer may answer that serves what it announces."""


@dataclass(frozen=True)
class Inspection:
    """What came of looking at a peer: how often in a row it did not serve, and when, in unix seconds."""

    misses: int
    at: float

    @property
    def serves(self) -> bool:
        return self.misses < MISSES

    @property
    def due_at(self) -> float:
        return self.at + (RETRY_PERIOD if self.misses else PERIOD)


class Inspections:
    """Looks at peers from this one. `now` gives unix seconds."""

    def __init__(self, transport: Transport, now: Callable[[], float]):
        self._transport = transport
        self._now = now
        self._known: dict[PeerId, Inspection] = {}

    def known(self) -> dict[PeerId, Inspection]:
        return dict(self._known)

    async def round(self, announced: Iterable[Announcement]) -> None:
        """Look at some of those that say they serve, those whose turn it has been for longest."""
        now = self._now()
        serving = {one.peer_id: one for one in announced if one.state == "serving"}
        serving.pop(self._transport.peer, None)
        if len(self._known) > MAX_KNOWN:
            self._known = {peer: one for peer, one in self._known.items() if peer in serving}
        due = [peer for peer in serving if self._due_at(peer) <= now]
        turn = asyncio.Semaphore(AT_ONCE)
        async with asyncio.TaskGroup() as tasks:
            for peer in sorted(due, key=self._due_at)[:PER_ROUND]:
                tasks.create_task(self._look(serving[peer], turn), name=f"inspect {peer}")

    def _due_at(self, peer: PeerId) -> float:
        known = self._known.get(peer)
        return known.due_at if known else float("-inf")

    async def _look(self, said: Announcement, turn: asyncio.Semaphore) -> None:
        peer, before = said.peer_id, self._known.get(said.peer_id, Inspection(0, 0.0))
        async with turn:
            serves = await self._serves(said)
        misses = before.misses if serves is None else 0 if serves else before.misses + 1
        self._known[peer] = Inspection(misses, self._now())

    async def _serves(self, said: Announcement) -> bool | None:
        """Whether it opens a session for what it announces; None if that cannot be told now."""
        try:
            async with asyncio.timeout(OPEN_TIMEOUT):
                calls = MessageStream(await self._transport.open_stream(said.peer_id, said.addresses))
        except (SwarmError, TimeoutError):
            return None  # whether it is reached is told by pings
        session = secrets.token_hex(16)
        asked = Open(
            session_id=session,
            model_id=said.model_id,
            start=said.start,
            end=said.end,
            max_tokens=1,
            priority="bulk",
        )
        try:
            await calls.call(asked, timeout=ANSWER_TIMEOUT)
            await calls.call(Close(session_id=session), timeout=ANSWER_TIMEOUT)
        except Refused as refused:
            code = refused.error.code
            logger.debug("peer %s opened no session for blocks %s: %s", said.peer, said.span, code)
            return None if code in INNOCENT else False
        except (StreamClosed, FrameError, CallTimeout) as fault:
            logger.debug("peer %s opened no session for blocks %s: %r", said.peer, said.span, fault)
            return False
        finally:
            calls.close()
        return True
