"""Audits: having another hop compute what one gave, and finding out who is wrong where they differ.

Owns the audits that wait and the one that runs, in the background, and their count. Who is caught is told to
the owner, with evidence where the hop has signed what it gave. Must not know of sessions.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from torch import Tensor

from swarm.client.comparing import Comparison, Gaps, opinions_differ
from swarm.client.evidence import Evidence, vouch_for
from swarm.client.faults import HopError, RemoteFault
from swarm.client.hop_stream import Deadlines
from swarm.client.inputs import Embed
from swarm.client.replay import Opinion, Replay, replayed
from swarm.client.route import Hop
from swarm.client.sensitivity import Sensitivity, jittered, sensitivity
from swarm.client.testimony import Given, Testimony
from swarm.client.verdict import judge
from swarm.errors import SwarmError
from swarm.net.identity import Identity
from swarm.net.transport import PeerId, Transport
from swarm.net.vouchers import Voucher
from swarm.spans import Span

logger = logging.getLogger(__name__)

MAX_WAITING = 8
MAX_WAITING_BYTES = 256 * 2**20
"""Audits that may wait, and bytes of what went into the hops; what comes then is let go."""

OnCaught: TypeAlias = Callable[[Hop, Evidence | None], None]


class Router(Protocol):
    """What must be known of the swarm's routes; `swarm.client.routes.Routes` does."""

    def witnesses(
        self,
        span: Span,
        tokens: int,
        *,
        known: Collection[PeerId],
        beside: Iterable[Hop],
        rng: random.Random,
    ) -> tuple[Hop, ...]: ...

    def judge_opening(self, fault: HopError) -> None: ...

    def doubt(self, hop: Hop) -> None: ...

    def push_failed(self, source: PeerId, target: PeerId) -> None: ...

    def caught(self, peer: PeerId) -> None: ...


@dataclass(frozen=True)
class Case:
    """What a hop gave, and what went in. `beside` run the session's other blocks.

    If `fed_by` is one of those, it brought the hop what went in, or some of it.
    """

    testimony: Testimony
    replay: Replay
    beside: tuple[Hop, ...]
    fed_by: Hop | None


@dataclass
class Counts:
    """Audits so far, by how they ended.

    `unchecked`: nobody else could be asked. `unclear`: two disagree and no third one could tell who is wrong,
    or it is unclear what went in.
    """

    agreed: int = 0
    caught: int = 0
    unchecked: int = 0
    unclear: int = 0


class Auditor:
    """Audits what it is given, one after the other: the part `rate` of all sessions.

    `on_caught` is called with each hop that gave wrong results, and evidence of it if there is any.
    """

    def __init__(
        self,
        transport: Transport,
        router: Router,
        embed: Embed,
        gaps: Gaps,
        deadlines: Deadlines,
        *,
        rate: float,
        identity: Identity | None = None,
        on_caught: OnCaught = lambda hop, evidence: None,
        rng: random.Random | None = None,
    ):
        self.counts = Counts()
        self.rng = rng or random.SystemRandom()
        self._rate = rate
        self._transport = transport
        self._router = router
        self._embed = embed
        self._compared = Comparison(gaps)
        self._deadlines = deadlines
        self._identity = identity
        self._on_caught = on_caught
        self._waiting: asyncio.Queue[Case] = asyncio.Queue(MAX_WAITING)
        self._waiting_bytes = 0
        self._working: asyncio.Task[None] | None = None

    def draws(self, hops: Sequence[Hop], tokens: int) -> bool:
        """Whether a session of so many tokens that begins now on `hops` is to be audited.

        Where nobody else could be asked of any of them it is not: there would be nothing to compare.
        """
        return self.rng.random() < self._rate and any(self._can_check(hop, hops, tokens) for hop in hops)

    def _can_check(self, hop: Hop, hops: Sequence[Hop], tokens: int) -> bool:
        beside = [other for other in hops if other is not hop]
        try:
            self._router.witnesses(hop.span, tokens, known={hop.peer}, beside=beside, rng=self.rng)
        except SwarmError:
            return False
        return True

    def submit(self, case: Case) -> None:
        """Audit it soon, unless too many wait."""
        if self._working is None:
            self._working = asyncio.create_task(self._work(), name="audit")
        if self._waiting.full() or self._waiting_bytes + case.replay.bytes > MAX_WAITING_BYTES:
            return
        self._waiting_bytes += case.replay.bytes
        self._waiting.put_nowait(case)

    async def settle(self) -> None:
        """Return once nothing waits any more."""
        await self._waiting.join()

    async def close(self) -> None:
        """Let go what waits and what runs."""
        if self._working is not None:
            self._working.cancel()
            await asyncio.gather(self._working, return_exceptions=True)

    async def _work(self) -> None:
        while True:
            case = await self._waiting.get()
            self._waiting_bytes -= case.replay.bytes
            try:
                await self._audit(case)
            except SwarmError as error:
                self.counts.unchecked += 1
                logger.info("an audit of peer %s came to nothing: %s", case.testimony.hop.peer, error)
            except Exception:  # a bug of ours, which must not end all other audits
                logger.exception("an audit of peer %s failed", case.testimony.hop.peer)
            finally:
                self._waiting.task_done()

    async def _audit(self, case: Case) -> None:
        """
        Raises:
            SwarmError: nobody else could be asked.
        """
        if not await self._was_brought(case):
            self.counts.unclear += 1
            return
        audited, compared = case.testimony, self._compared
        first = await self._ask(case, {audited.hop.peer})
        if not await compared.differ(audited, first):
            self.counts.agreed += 1
            return
        found = await self._sensitivity(case.replay, first)
        if not await compared.differ(audited, first, found):
            self.counts.agreed += 1
            return
        logger.info("peer %s and %s do not give the same", audited.hop.peer, ", ".join(first.peers))
        try:
            third = await self._ask(case, {audited.hop.peer, *first.peers})
            found = found.joined(await self._sensitivity(case.replay, third))
        except SwarmError as error:
            logger.info("nobody can tell who is wrong: %s", error)
            self._leave_open(audited.hop, *first.hops)
            return
        if not await compared.differ(audited, first, found):
            self.counts.agreed += 1
            return
        audited_agrees = not await compared.differ(audited, third, found)
        witness_agrees = not opinions_differ(first, third, found)
        match judge(audited_agrees, witness_agrees):
            case "audited":
                await self._catch(case, audited, [first, third], found)
            case "witness" if len(first.hops) == 1:
                await self._catch(case, first.testimonies[0], [third], found)
            case "witness":
                self._leave_open(*first.hops)
            case "unknown":
                self._leave_open(audited.hop, *first.hops, *third.hops)

    async def _ask(self, case: Case, known: set[PeerId]) -> Opinion:
        """What others than those `known` make of the inputs; who fails is told to the router.

        Raises:
            SwarmError: nobody could be asked.
        """
        while True:
            hops = self._router.witnesses(
                case.testimony.hop.span,
                case.replay.end,
                known=known,
                beside=case.beside,
                rng=self.rng,
            )
            try:
                return await self._replayed(hops, case.replay)
            except HopError as fault:
                known = {*known, fault.hop.peer}

    async def _replayed(self, hops: Sequence[Hop], replay: Replay, hidden: Tensor | None = None) -> Opinion:
        """
        Raises:
            HopError: one of the hops failed, which the router was told.
        """
        try:
            return await replayed(self._transport, hops, replay, self._embed, self._deadlines, hidden)
        except HopError as fault:
            self._router.judge_opening(fault)
            raise

    async def _sensitivity(self, replay: Replay, opinion: Opinion) -> Sensitivity:
        """That of the blocks and these inputs, as the hops of an opinion show it.

        Raises:
            HopError: one of them failed.
        """
        inputs = await replay.hidden(self._embed)
        moved = await self._replayed(opinion.hops, replay, jittered(inputs))
        return await asyncio.to_thread(sensitivity, inputs, opinion.hidden, moved.hidden)

    async def _was_brought(self, case: Case) -> bool:
        """Whether the hop vouches for having been brought what is known here.

        If not it was fed otherwise by the hop before, or one of the two lies: who, nobody can tell.
        """
        audited = case.testimony
        if await asyncio.to_thread(vouch_for, audited.vouchers, case.replay.tokens, case.replay.rows):
            return True
        if case.fed_by is None:
            self._router.judge_opening(RemoteFault(audited.hop, "vouched for other inputs than it got"))
        else:
            self._router.push_failed(case.fed_by.peer, audited.hop.peer)
            self._leave_doubt(case.fed_by, audited.hop)
        return False

    async def _catch(
        self, case: Case, liar: Testimony, others: Sequence[Opinion], found: Sensitivity
    ) -> None:
        self.counts.caught += 1
        self._router.caught(liar.hop.peer)
        self._on_caught(liar.hop, await self._evidence(case.replay, liar, others, found))

    async def _evidence(
        self, replay: Replay, liar: Testimony, others: Sequence[Opinion], found: Sensitivity
    ) -> Evidence | None:
        """What the hop has signed that all the others find wrong, if there is anything."""
        for voucher in liar.vouchers:
            rows = liar.rows(voucher.first, voucher.until, voucher.kind)
            if self._identity is None or rows is None:
                continue
            apart = [
                await self._compared.differs_by_voucher(voucher, rows, liar.hop, opinion, found)
                for opinion in others
            ]
            if all(apart):
                return _evidence(voucher, rows, replay, self._identity)
        return None

    def _leave_open(self, *hops: Hop) -> None:
        """One of `hops` is wrong; nobody can tell which."""
        self.counts.unclear += 1
        self._leave_doubt(*hops)

    def _leave_doubt(self, *hops: Hop) -> None:
        for hop in {hop.peer: hop for hop in hops}.values():
            self._router.doubt(hop)


def _evidence(voucher: Voucher, rows: Given, replay: Replay, identity: Identity) -> Evidence:
    tokens: Sequence[int] = replay.tokens[: voucher.until] if voucher.brings_ids else ()
    packed = b"" if replay.rows is None else replay.rows.first(voucher.until)
    return Evidence(
        voucher=voucher.pack(),
        width=replay.hidden_size,
        tokens=tuple(tokens),
        rows=packed,
        ids=tuple(rows.ids),
        auditor=identity.peer,
        at=time.time(),
    ).signed(identity)
