"""Other hops in the place of those that are lost or about to leave, and links between all of them.

What a lost hop held is computed again by those that take its place, from the journal of what went into it; a
hop that leaves hands it over, and where a hop had a standby, that holds most of it. Owns who is asked, and
what they are told of what came before; that the work is then done is the relay's business.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, TypeAlias

from torch import Tensor

from swarm.client.auditor import Auditor
from swarm.client.changes import Changes
from swarm.client.concurrently import concurrently
from swarm.client.faults import HopError, NoCapacity, RequestRefused
from swarm.client.hop_stream import Deadlines
from swarm.client.inputs import Embed
from swarm.client.journal import JournalStore
from swarm.client.leg import Asked, Leg
from swarm.client.page_chain import chain_for
from swarm.client.relay import Relay
from swarm.client.route import Hop
from swarm.client.standbys import Scout, Standbys
from swarm.dht.announcement import Announcement
from swarm.errors import SwarmError
from swarm.net.transport import PeerId, Transport
from swarm.spans import Span

logger = logging.getLogger(__name__)

MAX_REFUSALS = 3
"""Hops that may find a session's requests wrong before that is taken for true."""

LEAVING_AVOIDED = 60.0
"""Seconds for which routes avoid a peer that says it leaves."""

MOVE_PERIOD = 5.0
"""Seconds after which a place is looked for again for what a leaving hop holds, while it serves on."""

SOON_COMPUTED = 64
"""Tokens that are computed again sooner than all are handed over."""

LEAVES = "is about to leave"

Likeliest: TypeAlias = Callable[[Tensor], Awaitable[list[int]]]


class Router(Scout, Protocol):
    """What must be known of the swarm's routes; `swarm.client.routes.Routes` does."""

    @property
    def timeout(self) -> float: ...

    def judge(self, fault: HopError) -> None: ...

    async def detour(
        self, span: Span, tokens: int, *, like: Announcement, timeout: float, beside: Iterable[Hop]
    ) -> tuple[Hop, ...]: ...

    def may_push(self, source: PeerId, target: PeerId) -> bool: ...

    def push_failed(self, source: PeerId, target: PeerId) -> None: ...

    def succeeded(self, hop: Hop, tokens: int, queue_ms: float, compute_ms: float) -> None: ...


@dataclass(frozen=True)
class Environment:
    """What all sessions of a client share.

    By `secret`, 64 bytes at most, later sessions find what hops keep of this client's. `store` keeps what is
    needed when hops are lost. With `pushes` hops pass steps on to each other where they can. Some sessions
    are audited by `auditor`, if there is one. With `standbys` hops copy what they hold to others that can
    take their place. `embed` serves first hops that take no token ids, `likeliest` last ones that give none:
    it makes hidden states [rows, hidden] the likeliest token after each.
    """

    transport: Transport
    router: Router
    store: JournalStore
    secret: bytes
    deadlines: Deadlines
    embed: Embed
    likeliest: Likeliest
    pushes: bool = True
    auditor: Auditor | None = None
    standbys: bool = False


class Recovery:
    """Keeps the legs of `relay` whole.

    `count` is how often a hop was replaced, `replayed_tokens` how many tokens were computed again for that,
    counted once a hop, `handed_over_tokens` how many were not since leaving hops gave them, and
    `stood_in_tokens` how many since standbys held them. `changes` say what was replaced by what.
    """

    def __init__(self, relay: Relay, environment: Environment):
        self.changes = Changes()
        self.count = 0
        self.replayed_tokens = 0
        self.handed_over_tokens = 0
        self.stood_in_tokens = 0
        self._relay = relay
        self._environment = environment
        self._router = environment.router
        self._replaced_from: int | None = None
        self._refusals = 0
        self._failing_since: float | None = None
        self._goes_round = False
        self._linking: set[asyncio.Task[None]] = set()
        self._standbys = Standbys(relay, self._router, environment.transport, environment.deadlines)

    @property
    def copied_tokens(self) -> int:
        """Tokens that hops have copied to standbys."""
        return self._standbys.copied_tokens

    def leg(self, hops: Sequence[Hop]) -> Leg:
        """A leg to the last of `hops`, a route's first ones."""
        own = self._environment
        chain = chain_for(hops, own.secret) if self._may_be_named(hops[-1]) else None
        return Leg(hops[-1], chain, own.deadlines, own.transport.clock)

    async def heal(self, asked: Asked) -> None:
        """Have hops for all blocks again.

        Raises:
            SwarmError: none came up in time that does its part, or this client's own network has failed.
        """
        clock = asyncio.get_running_loop().time
        lost = [leg for leg in self._relay.legs if leg.fault is not None]
        if self._failing_since is None or any(leg.has_answered for leg in lost):
            self._failing_since = clock()
        deadline = self._failing_since + self._router.timeout
        for leg in lost:
            assert leg.fault is not None
            self._judge(leg.fault, is_over=clock() >= deadline)
        for leg in lost:
            assert leg.fault is not None
            if (standby := self._standing_in(leg)) is not None:
                self.changes.lost([leg.hop], leg.fault.reason)
                self._put_in(leg, standby)
                self.changes.taken([standby.hop])
        while (gone := self._lost()) is not None:
            try:
                await self._replace_lost(*gone, asked, deadline - clock())
            except HopError as fault:
                self._router.judge_opening(fault)
                if clock() >= deadline:
                    raise
        self.link()

    def has_healed(self) -> None:
        """The hops have done what they were needed for."""
        self._failing_since = None

    async def move(self, asked: Callable[[], Asked], patience: float = 0.0) -> None:
        """Have other hops for those that leave, which hand over what they hold, if there are any.

        They are `asked` then what it gives. Others are waited for up to `patience` seconds. Who leaves serves
        on until it is gone, so where there are none it is tried again at a later call.
        """
        clock = self._environment.transport.clock
        for leg in [leg for leg in self._relay.legs if leg.is_leaving and leg.fault is None]:
            if clock() < leg.move_at:
                continue
            self._router.judge(NoCapacity(leg.hop, LEAVES, LEAVING_AVOIDED))
            leg.move_at = clock() + MOVE_PERIOD
            try:
                await self._move(leg, asked(), patience)
            except SwarmError as error:
                logger.info("a leaving hop's session cannot be moved yet: %s", error)
        self.link()

    def stand_by(self, asked: Asked, length: int) -> None:
        """Have standbys for the hops of a session of `length` tokens from some moment on, if wanted."""
        if self._environment.standbys:
            self._standbys.seek(asked, length)

    def distrust(self, peer: PeerId) -> None:
        """`peer` gives wrong results: it shall not stand in for anybody."""
        self._standbys.distrust(peer)

    def link(self) -> None:
        """Let hops pass steps on by themselves wherever they can, from some moment on."""
        if not self._environment.pushes:
            return
        legs = self._relay.legs
        edges = list(pairwise(legs))
        if self._goes_round and self._relay.can_go_round:
            edges.append((legs[-1], legs[0]))
        for source, target in edges:
            if source is target:
                source.onward = target
                continue
            may = self._router.may_push(source.hop.peer, target.hop.peer)
            if may and source.onward is not target and source.linking is not target:
                source.linking = target
                task = asyncio.create_task(self._link(source, target), name=f"link to {target.hop.peer}")
                self._linking.add(task)
                task.add_done_callback(self._linking.discard)

    def go_round(self) -> None:
        """Let the last hop begin further rounds at the first, from some moment on."""
        if not self._goes_round:
            self._goes_round = True
            self.link()

    def close(self) -> None:
        self._standbys.close()
        for task in self._linking:
            task.cancel()

    def _judge(self, fault: HopError, *, is_over: bool) -> None:
        """
        Raises:
            HopError: the time for finding other hops `is_over`, or too many found the requests wrong.
        """
        self._router.judge(fault)
        self._refusals += isinstance(fault, RequestRefused)
        if is_over or self._refusals > MAX_REFUSALS:
            raise fault

    def _lost(self) -> tuple[int, int] | None:
        """The first legs next to each other that are lost."""
        legs = self._relay.legs
        first = next((at for at, leg in enumerate(legs) if leg.fault is not None), None)
        if first is None:
            return None
        end = first
        while end < len(legs) and legs[end].fault is not None:
            end += 1
        return first, end

    async def _replace_lost(self, first: int, end: int, asked: Asked, timeout: float) -> None:
        gone = self._relay.legs[first:end]
        span = Span(gone[0].hop.span.start, gone[-1].hop.span.end)
        fault = gone[0].fault
        assert fault is not None
        logger.info("blocks %s are lost to a session: %s", span, fault)
        self.changes.lost([leg.hop for leg in gone], fault.reason)
        hops = await self._router.detour(
            span,
            asked.max_tokens,
            like=gone[0].hop.announcement,
            timeout=max(timeout, 0.0),
            beside=self._beside(gone),
        )
        self._replace(first, end, await self._opened(first, hops, asked))
        self.changes.taken(hops)

    def _beside(self, gone: Sequence[Leg]) -> list[Hop]:
        """The hops that stay where these legs go; one that is lost as well counts until it is replaced."""
        return [leg.hop for leg in self._relay.legs if leg not in gone]

    async def _opened(
        self, first: int, hops: Sequence[Hop], asked: Asked, *, empty: bool = False
    ) -> list[Leg]:
        """Legs to `hops`, the first of which takes place `first`; `empty` ones begin with nothing kept."""
        before = [leg.hop for leg in self._relay.legs[:first]]
        self._note_replaced(hops[0].span.start)
        legs = [self.leg([*before, *hops[: at + 1]]) for at in range(len(hops))]
        for leg in legs:
            if empty:
                leg.chain = None
        try:
            await concurrently(*(leg.open(self._environment.transport, asked, self._relay) for leg in legs))
        except BaseException:
            for leg in legs:
                leg.abort()
            raise
        return legs

    def _standing_in(self, leg: Leg, *, lacking: int | None = None) -> Leg | None:
        """The leg's standby, ready to take its place, if there is one that lacks so many tokens at most."""
        tokens = self._standbys.held(leg)
        if not tokens or (lacking is not None and leg.length - tokens > lacking):
            return None
        standby = self._standbys.take(leg)
        self._note_replaced(leg.block)
        standby.stand_in(tokens, leg, self._relay)
        self.stood_in_tokens += tokens
        logger.info("a standby has %d tokens of those that peer %s held", tokens, leg.hop.peer)
        return standby

    def _put_in(self, leg: Leg, other: Leg) -> None:
        at = self._relay.legs.index(leg)
        self._replace(at, at + 1, [other])

    def _replace(self, first: int, end: int, legs: Sequence[Leg]) -> None:
        self.count += 1
        known = max(leg.length for leg in self._relay.legs[first:end])
        before = {leg: leg.length for leg in (*self._relay.legs[:first], *self._relay.legs[end:])}
        self._relay.replace(first, end, legs)
        again = (before.get(leg, known) - leg.length for leg in self._relay.legs)
        self.replayed_tokens += sum(max(tokens, 0) for tokens in again)

    async def _move(self, leg: Leg, asked: Asked, patience: float) -> None:
        hop = leg.hop
        if (standby := self._standing_in(leg, lacking=SOON_COMPUTED)) is not None:
            self._put_in(leg, standby)
            self.changes.moved(hop, LEAVES, [standby.hop])
            return
        hops = await self._router.detour(
            hop.span,
            asked.max_tokens,
            like=hop.announcement,
            timeout=patience,
            beside=self._beside([leg]),
        )
        at = self._relay.legs.index(leg)
        try:
            legs = await self._opened(at, hops, asked, empty=_are_alike(hops, hop))
        except HopError as fault:
            self._router.judge_opening(fault)
            raise
        if _are_alike(hops, hop):
            try:
                tokens = await leg.hand_over(legs[0])
                legs[0].adopted(min(tokens, leg.length), leg)
                self.handed_over_tokens += legs[0].length
            except HopError as fault:
                logger.info("a session is replayed, since it was not handed over: %s", fault)
            except BaseException:
                legs[0].abort()
                raise
        self._replace(at, at + 1, legs)
        self.changes.moved(hop, LEAVES, hops)

    async def _link(self, source: Leg, target: Leg) -> None:
        try:
            await source.link(target)
        except HopError as fault:
            logger.info("steps go through this client to peer %s: %s", target.hop.peer, fault)
            if source.fault is None and target.fault is None:
                self._router.push_failed(source.hop.peer, target.hop.peer)
        finally:
            if source.linking is target:
                source.linking = None

    def _may_be_named(self, hop: Hop) -> bool:
        """Whether what the hop will hold comes from the peers before it alone: none of them was replaced."""
        return self._replaced_from is None or hop.span.start <= self._replaced_from

    def _note_replaced(self, block: int) -> None:
        self._replaced_from = block if self._replaced_from is None else min(self._replaced_from, block)
        for leg in self._relay.legs:
            if leg.hop.span.start > self._replaced_from:
                leg.chain = None


def _are_alike(hops: Sequence[Hop], hop: Hop) -> bool:
    """Whether `hops` are one that can hold what `hop` holds, as it is."""
    form = hop.announcement.dtype, hop.announcement.quantization
    return len(hops) == 1 and (hops[0].announcement.dtype, hops[0].announcement.quantization) == form
