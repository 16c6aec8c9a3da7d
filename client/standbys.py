"""Standbys: others that hold copies of what a session's hops hold, to take over when one is lost.

Sought in the background, once there is something worth copying; hops copy to them page after page. Owns who
is asked, and when again. That a standby takes a hop's place is its owner's business.
"""

import asyncio
import logging
from collections.abc import Coroutine, Iterable
from typing import Any, Protocol

from swarm.client.faults import Gone, HopError, NoCapacity
from swarm.client.hop_stream import Deadlines
from swarm.client.inputs import Wired
from swarm.client.leg import Asked, Leg, Pending
from swarm.client.relay import Relay
from swarm.client.route import Hop
from swarm.errors import SwarmError
from swarm.net.transport import PeerId, Transport
from swarm.page_keys import PAGE_TOKENS

logger = logging.getLogger(__name__)

WORTH_TOKENS = 64
"""Tokens from which on a session has standbys: fewer are soon computed again."""

REST = 2.0
"""Seconds until another standby is looked for where none was found, or one was lost."""

PEER_REST = 30.0
"""Seconds for which a peer is not asked again that would not be a standby, or was one no longer."""

PING_PERIOD = 60.0
"""Seconds after which a standby is shown that its session lives."""


class Scout(Protocol):
    """Who knows which other hop can go on with what one holds."""

    def standby_for(
        self, hop: Hop, tokens: int, *, beside: Iterable[Hop], left_out: Iterable[PeerId]
    ) -> Hop | None: ...

    def judge_opening(self, fault: HopError) -> None: ...


class Standbys:
    """The standbys of the legs of `relay`. Implements `Listener` for them, until they take a place there."""

    def __init__(self, relay: Relay, scout: Scout, transport: Transport, deadlines: Deadlines):
        self._relay = relay
        self._scout = scout
        self._transport = transport
        self._deadlines = deadlines
        self._of: dict[Leg, Leg] = {}
        self._copied = 0
        self._resting: dict[Leg, float] = {}
        self._resting_peers: dict[PeerId, float] = {}
        self._tasks: dict[Leg, asyncio.Task[None]] = {}
        self._pinged_at = 0.0

    @property
    def copied_tokens(self) -> int:
        """Tokens that hops have copied to standbys so far."""
        return self._copied + sum(_copied(standby) for standby in self._of.values())

    def seek(self, asked: Asked, length: int) -> None:
        """See that each leg of a session of `length` tokens gets a standby, in the background."""
        if length < WORTH_TOKENS:
            return
        now = self._transport.clock()
        self._forget_gone()
        for leg in self._relay.legs:
            is_whole = leg.fault is None and not leg.is_leaving and leg.opened.mirrors
            if not is_whole or leg in self._tasks or now < self._resting.get(leg, 0.0):
                continue
            if leg in self._of and self._of[leg].is_unfed:
                self._drop(leg)
            if leg not in self._of:
                self._begin(leg, self._find(leg, asked))
        if now >= self._pinged_at + PING_PERIOD:
            self._pinged_at = now
            for leg, standby in self._of.items():
                if leg not in self._tasks:
                    self._begin(leg, self._ping(standby))

    def held(self, leg: Leg) -> int:
        """How many of the leg's tokens its standby holds; 0 if none that may take its place has any.

        What a hop gave wrong is not made right by a copy: then it holds nothing of worth.
        """
        is_right = leg.fault is None or isinstance(leg.fault, Gone | NoCapacity)
        if leg not in self._of or leg.copied is None or not is_right:
            return 0
        return min(leg.copied.tokens, leg.length - leg.length % PAGE_TOKENS)

    def take(self, leg: Leg) -> Leg:
        """The leg's standby, which there must be, and which is to take its place."""
        standby = self._of.pop(leg)
        self._copied += _copied(standby)
        return standby

    def distrust(self, peer: PeerId) -> None:
        """`peer` gives wrong results: it shall take nobody's place."""
        for leg in [leg for leg, standby in self._of.items() if standby.hop.peer == peer]:
            self._drop(leg)

    def close(self) -> None:
        """End all of them."""
        for task in self._tasks.values():
            task.cancel()
        for leg in list(self._of):
            self._drop(leg)

    def on_result(self, leg: Leg, answered: Pending, result: Wired, pushed: bool, token: int | None) -> None:
        raise AssertionError("a standby is asked no steps")

    def on_refused(self, leg: Leg, refused: Pending, fault: HopError) -> None:
        raise AssertionError("a standby is asked no steps")

    def on_times(self, leg: Leg, tokens: int, queue_ms: float, compute_ms: float) -> None:
        raise AssertionError("a standby is asked no steps")

    def on_news(self, leg: Leg) -> None:
        """The standby is lost or about to leave; or nothing is copied to it any more, as its hop is lost."""
        for source in [source for source, standby in self._of.items() if standby is leg]:
            if leg.fault is None and not leg.is_leaving:
                self._rest(source)
                continue
            logger.info("peer %s is a standby no longer", leg.hop.peer)
            self._rest(source, leg.hop.peer)
            self._drop(source)

    def on_bug(self, bug: Exception) -> None:
        logger.error("hearing a standby failed", exc_info=bug)

    def _begin(self, leg: Leg, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name=f"standby for {leg.hop.peer}")
        self._tasks[leg] = task
        task.add_done_callback(lambda _: self._tasks.pop(leg, None))

    async def _find(self, leg: Leg, asked: Asked) -> None:
        now = self._transport.clock()
        others = [other.hop for other in (*self._relay.legs, *self._of.values()) if other is not leg]
        resting = [peer for peer, until in self._resting_peers.items() if until > now]
        hop = self._scout.standby_for(leg.hop, asked.max_tokens, beside=others, left_out=resting)
        if hop is None:
            self._rest(leg)
            return
        standby = Leg(hop, None, self._deadlines, self._transport.clock)
        try:
            await self._open(standby, leg, asked)
        except SwarmError as fault:
            logger.info("peer %s is no standby for peer %s: %s", hop.peer, leg.hop.peer, fault)
            self._rest(leg, hop.peer)
            standby.abort()
        except BaseException:
            standby.abort()
            raise

    async def _open(self, standby: Leg, leg: Leg, asked: Asked) -> None:
        """
        Raises:
            SwarmError: it cannot be a standby, or the hop cannot copy to it.
        """
        try:
            await standby.open(self._transport, asked, self, is_standby=True)
        except HopError as fault:
            if isinstance(fault, Gone):
                self._scout.judge_opening(fault)  # that it has no room for standbys says nothing of others
            raise
        await leg.mirror(standby)
        is_needed = leg in self._relay.legs and leg.fault is None and standby.fault is None
        if is_needed and not standby.is_leaving and not standby.is_unfed:
            self._of[leg] = standby
        else:
            standby.abort()

    async def _ping(self, standby: Leg) -> None:
        try:
            await standby.ping()
        except HopError as fault:
            standby.fail(fault)

    def _forget_gone(self) -> None:
        """Drop the standbys of legs that were replaced."""
        for leg in [leg for leg in self._of if leg not in self._relay.legs]:
            self._drop(leg)
        self._resting = {leg: until for leg, until in self._resting.items() if leg in self._relay.legs}

    def _drop(self, leg: Leg) -> None:
        standby = self._of.pop(leg)
        self._copied += _copied(standby)
        standby.abort()

    def _rest(self, leg: Leg, peer: PeerId | None = None) -> None:
        now = self._transport.clock()
        self._resting[leg] = now + REST
        if peer is not None:
            self._resting_peers[peer] = now + PEER_REST


def _copied(standby: Leg) -> int:
    return standby.copied.total if standby.copied is not None else 0
