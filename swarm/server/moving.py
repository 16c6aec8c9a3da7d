"""How a server comes to serve other blocks than before: the new ones are loaded while the old ones are still
served where there is memory for both, else after the old ones were let go.

Its clients take their sessions elsewhere meanwhile, and are given the time. Must not know why it moves.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol, TypeAlias

from swarm.blocks.errors import DoesNotFit
from swarm.errors import SwarmError
from swarm.page_keys import PAGE_TOKENS
from swarm.server.cell import Load, OnProgress, ShardCell
from swarm.server.events import Events
from swarm.server.sessions import Sessions
from swarm.server.span_engine import SpanEngine
from swarm.spans import Span

logger = logging.getLogger(__name__)

GRACE, LEAVING_PATIENCE = 30.0, 4.0
"""Seconds for all sessions to go elsewhere, and for the next of them to."""


MayLeave: TypeAlias = Callable[[bool], Awaitable[bool]]


class LoadSpan(Protocol):
    """Loads any span of the model, with KV memory for `kv_tokens` or as much as there is.

    Raises DoesNotFit if there is no memory for it, or another SwarmError.
    """

    async def __call__(
        self, span: Span, on_progress: OnProgress, *, kv_tokens: int | None = None
    ) -> SpanEngine: ...


class FitsBeside(Protocol):
    """Whether `span`, or any other as large, can be loaded now beside all that is loaded, with KV memory for
    `kv_tokens`."""

    async def __call__(self, span: Span, kv_tokens: int) -> bool: ...


class Moving:
    """Moves the shard cell and its sessions. `announce` makes known at once what the cell then serves.

    `fits_beside` tells whether there is memory for two engines; without it none is counted on.
    """

    def __init__(
        self,
        cell: ShardCell,
        sessions: Sessions,
        load: LoadSpan,
        announce: Callable[[], Awaitable[None]],
        events: Events,
        fits_beside: FitsBeside | None = None,
    ):
        self._cell = cell
        self._sessions = sessions
        self._load = load
        self._announce = announce
        self._events = events
        self._fits_beside = fits_beside
        self._came_from: Span | None = None

    def place(self, span: Span) -> None:
        """Let the cell hold `span`; nothing is loaded yet."""
        self._cell.place(span, self._load_of(span))

    async def has_room_beside(self) -> bool:
        """Whether it is known that the serving cell can load as many other blocks beside its own."""
        if self._fits_beside is None:
            return False
        return await self._fits_beside(self._cell.span, self._kv_tokens)

    async def move(self, span: Span, may_leave: MayLeave) -> bool:
        """Have the serving cell serve `span` instead; whether it does, or loads it by now.

        At the last moment it is asked whether it `may_leave` its blocks; with True if it goes on to serve
        those that are in both spans meanwhile.
        """
        before = self._cell.span
        self._events.moving(before, span)
        try:
            return await self._move_beside(span, partial(may_leave, True))
        except DoesNotFit as reason:
            logger.info("blocks %s are let go before %s are loaded: %s", before, span, reason)
        except SwarmError as error:
            logger.warning("blocks %s cannot be loaded, so %s stay: %s", span, before, error)
            return False
        return await self._move_after(span, partial(may_leave, False))

    def turn_back(self) -> bool:
        """What the cell moved to cannot be loaded: it is to hold what it had; False if it has not moved."""
        if self._came_from is None:
            return False
        self.place(self._came_from)
        self._came_from = None
        return True

    def arrived(self) -> None:
        """What the cell moved to is loaded."""
        self._came_from = None

    async def _move_beside(self, span: Span, may_leave: Callable[[], Awaitable[bool]]) -> bool:
        load = partial(self._load, span, kv_tokens=self._kv_tokens)
        engine, throughput = await self._cell.load_beside(load)
        if not await may_leave() or self._cell.phase != "serving":
            engine.close()
            return False
        before = self._cell.swap(span, self._load_of(span), engine, throughput)
        await self._announce()
        self._events.phase(self._cell.phase, span, self._cell.progress)
        await self._sessions.leave(before, GRACE, LEAVING_PATIENCE)
        await self._cell.retire(before)
        return True

    async def _move_after(self, span: Span, may_leave: Callable[[], Awaitable[bool]]) -> bool:
        if not await may_leave() or self._cell.phase != "serving":
            return False
        engine = self._cell.engine
        assert engine is not None, "a cell that serves holds an engine"
        self._came_from = self._cell.span
        self._cell.move("draining")
        await asyncio.gather(self._announce(), self._sessions.leave(engine, GRACE, LEAVING_PATIENCE))
        await self._cell.give_way(span, self._load_of(span))
        return True

    @property
    def _kv_tokens(self) -> int:
        """What all sessions of the serving cell together can hold."""
        assert self._cell.engine is not None, "a cell that serves holds an engine"
        return self._cell.engine.stats.kv_pages * PAGE_TOKENS

    def _load_of(self, span: Span) -> Load:
        return partial(self._load, span)
