"""Where one server is to be, over its whole life: it chooses its blocks when it joins, and moves where it is
needed more.

It says where it means to go before it does, listens for a moment whether others mean the same, and yields to
those whose turn comes before its own. Owns when that is done; what is best is decided in `placement`, from
what `standing` makes of the directory, and how the server moves is `moving`'s business.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from weakref import ref

from swarm.dht.announcement import Mobility, Throughput
from swarm.dht.directory import Directory
from swarm.errors import SwarmError
from swarm.net.transport import PeerId, Transport
from swarm.server.cell import ShardCell
from swarm.server.moving import Moving
from swarm.server.placement import Holder, Move, choose_in_turn, may_leave, plan, turn
from swarm.server.sessions import Sessions
from swarm.server.span_engine import SpanEngine
from swarm.server.standing import Standing, mobility, standing, strength
from swarm.server.watching import Watch
from swarm.spans import Span

logger = logging.getLogger(__name__)

LOOK_PERIOD = 5.0
"""Seconds between two looks at whether the server is needed elsewhere."""

LISTENING = 0.5, 1.5
"""Seconds in which a server hears of others who mean the same: for whose turn is first, and for the last."""

ROUNDS = 5
"""How often a newcomer changes its mind before it takes what it has."""

CALM = 30.0, 90.0
"""Seconds for which the swarm must have been better off with a move that fills no hole, by turn."""

REST = 600.0
"""Seconds after a move, or an attempt, in which only a hole is worth another."""

PATIENCE = 15.0
"""Seconds in which another server must have said that it goes to fill a hole; then it is not waited for."""

UNWILLING = 300.0
"""Seconds for which a server that did not go is not counted on."""

STAY = 3600.0
"""Seconds for which a server stays that had let its blocks go for others, and could not load them."""


class Arranging:
    """Places the shard cell of one server, and has it moved.

    `mobility`, `serves_on`, `is_undecided` and `goes_to` are for the announcement, which `announce` makes
    known at once. `throughput` is what the server announces; each token that one passes on takes
    `token_bytes`.
    """

    def __init__(
        self,
        cell: ShardCell,
        sessions: Sessions,
        moving: Moving,
        directory: Directory,
        transport: Transport,
        announce: Callable[[], Awaitable[None]],
        throughput: Callable[[], Throughput],
        token_bytes: int,
    ):
        self.mobility: Mobility = "settled"
        self.serves_on = False
        self.is_undecided = True
        self._goal: Span | None = None
        self._is_leaving = False
        self._cell = cell
        self._sessions = sessions
        self._moving = moving
        self._directory = directory
        self._announce = announce
        self._throughput = throughput
        self._token_bytes = token_bytes
        self._peer = transport.peer
        self._watch = Watch(directory, transport)
        self._waited_for: dict[PeerId, float] = {}
        self._unwilling: dict[PeerId, float] = {}
        self._weighed: Callable[[], SpanEngine | None] = lambda: None
        """The engine, which is not kept from being given back, if it still is the one that was weighed."""
        self._wished_since: float | None = None
        self._planned_for: list[Holder] = []
        self._moves: tuple[Move, ...] = ()
        self._rests_until = self._stays_until = 0.0

    async def place(self) -> None:
        """Take the best place there is for the empty cell.

        Raises:
            StoreUnreachable: the directory could not be read.
        """
        await self._directory.refresh()
        self._moving.place(self._choice())

    async def settle(self) -> None:
        """Announced, give way to those who choose at the same time and whose turn is before."""
        for _ in range(ROUNDS):
            await self._listen()
            span = self._choice()
            if span == self._cell.span:
                break
            self._moving.place(span)
            await self._announce()
        self.is_undecided = False
        await self._announce()

    async def run(self) -> None:
        """Move wherever it is worth it, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch.run(), name="watch the others")
            while True:
                await asyncio.sleep(LOOK_PERIOD)
                await self.look()

    async def look(self) -> None:
        """Move if the swarm has been better off with that for long enough."""
        await self._weigh()
        move = await self._wish()
        if move is None:
            self._wished_since = None
            return
        if self._wished_since is None:
            self._wished_since = self._now()
        if move.is_urgent or self._now() >= self._wished_since + by_turn(self._peer, CALM):
            await self._go(move)

    @property
    def goes_to(self) -> Span | None:
        """The blocks that are about to be served. They are its own if it is about to leave the model: nobody
        counts on it any more then, nor takes them for a hole."""
        if self._is_leaving:
            return self._cell.span if self._cell.phase == "serving" else None
        return self._goal if self._goal != self._cell.span else None

    @property
    def may_leave_model(self) -> bool:
        """Whether it is free to serve another model; `mobility` says what that must be worth."""
        has_plans = self._is_leaving or self._goal is not None
        return self._cell.phase == "serving" and self.mobility != "fixed" and not has_plans

    async def mean_to_leave(self) -> None:
        """Say that the model is left soon, and hear of others who mean the same."""
        self._is_leaving = self.is_undecided = True
        await self._announce()
        await self._listen()

    async def mean_to_stay(self) -> None:
        """Take that back."""
        self._is_leaving = self.is_undecided = False
        await self._announce()

    def stay(self) -> None:
        """A move had to be undone: try no other for long."""
        self._stays_until = self._now() + STAY

    async def _go(self, move: Move) -> None:
        """Say so, and do it unless somebody else does it first."""
        if self._is_leaving:
            return
        self._goal, self.is_undecided = move.span, True
        await self._announce()
        await self._listen()
        if await self._wish() == move:
            self.is_undecided = False
            await self._announce()
            logger.info("peer %s goes from blocks %s to %s", self._peer, self._cell.span, move.span)
            if not await self._moving.move(move.span, lambda stay: self._may_leave(move, stay)):
                self._stays_until = self._now() + UNWILLING
            self._rests_until = self._now() + REST
        self._goal, self.is_undecided, self._wished_since = None, False, None
        await self._announce()

    async def _weigh(self) -> None:
        """See once for each engine whether another one as large fits beside it."""
        if self._cell.engine is not None and self._cell.engine is not self._weighed():
            self._weighed = ref(self._cell.engine)
            self.serves_on = await self._moving.has_room_beside()

    async def _listen(self) -> None:
        """Wait until others who mean the same have said so, and read it."""
        await asyncio.sleep(by_turn(self._peer, LISTENING))
        await self._read()

    async def _read(self) -> None:
        try:
            await self._directory.refresh()
        except SwarmError as error:
            logger.warning("peer %s could not read where the others are: %s", self._peer, error)

    def _choice(self) -> Span:
        others = self.others()
        return choose_in_turn(others.holders, others.undecided, self._directory.num_blocks, self.mine())

    async def _wish(self) -> Move | None:
        """The move that is this server's to make, if there is one."""
        self.mobility = self._mobility()
        if self._cell.phase != "serving" or self.mobility == "fixed":
            return None
        while True:
            others = self.others()
            servers = [*others.holders, *others.undecided, self.mine()]
            if servers != self._planned_for:
                self._moves = await asyncio.to_thread(plan, servers, self._directory.num_blocks)
                self._planned_for = servers
            late = self._late(self._moves)
            if not late:
                return next((move for move in self._moves if move.peer == self._peer), None)
            self._unwilling.update(dict.fromkeys(late, self._now() + UNWILLING))

    def _late(self, moves: Sequence[Move]) -> list[PeerId]:
        """Who was to fill a hole, and should have said by now that it goes."""
        now = self._now()
        urgent = [PeerId(move.peer) for move in moves if move.is_urgent and move.peer != self._peer]
        self._waited_for = {peer: self._waited_for.get(peer, now) for peer in urgent}
        return [peer for peer, since in self._waited_for.items() if now > since + PATIENCE]

    async def _may_leave(self, move: Move, stay: bool) -> bool:
        """Whether others serve what this server leaves: all its blocks, unless it can `stay` on those that it
        also goes to. Where blocks are missing no session gets through: then these may be missed for a while.
        """
        await self._read()
        self.serves_on = self.serves_on and stay
        servers = [*self.others().holders, self.mine()]
        return may_leave(servers, self._peer, move.span if stay or move.is_urgent else None)

    def _mobility(self) -> Mobility:
        now, cell = self._now(), self._cell
        if now < self._stays_until:
            return "fixed"
        found = mobility(
            self._sessions.demands(),
            [one for one in self._directory.announcements if one.peer != self._peer],
            (cell.dtype, cell.quantization),
            can_hand_over=cell.engine is not None and cell.engine.can_hand_over,
        )
        return "settled" if found == "free" and now < self._rests_until else found

    def others(self) -> Standing:
        """All other servers of the model, as this one has to count with them."""
        now = self._now()
        self._unwilling = {peer: until for peer, until in self._unwilling.items() if now < until}
        return standing(
            self._directory.announcements,
            self._peer,
            self._token_bytes,
            gone=self._watch.gone(),
            unwilling=self._unwilling,
        )

    def mine(self) -> Holder:
        """This server, as others see it."""
        return Holder(
            self._peer,
            self._cell.span,
            strength(self._throughput(), self._cell.span, self._token_bytes),
            serves=self._cell.phase == "serving",
            may_fill=self.mobility != "fixed",
            may_improve=self.mobility == "free",
            serves_on=self.serves_on,
        )

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def by_turn(peer: PeerId, seconds: tuple[float, float]) -> float:
    """Between the first and the last of `seconds`, the earlier it is `peer`'s turn."""
    first, last = seconds
    return first + (last - first) * turn(peer)
