"""When a hop's silence is suspicious, and asking it then whether it is there.

Owns the questions that are under way. Must not know what a step does; what follows from an answer is told
to the owner.
"""

import asyncio
import logging
from collections.abc import Callable

from swarm.client.faults import Gone, HopError
from swarm.client.leg import Leg

logger = logging.getLogger(__name__)


class Watch:
    """Asks legs that owe an answer for too long; `on_not_taken` is told of one that lacks a pushed step.

    `on_asked` is called whenever one was asked, whatever came of it.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        on_not_taken: Callable[[Leg], None],
        on_asked: Callable[[], None],
    ):
        self._clock = clock
        self._on_not_taken = on_not_taken
        self._on_asked = on_asked
        self._excused: dict[Leg, float] = {}
        self._asking: dict[Leg, asyncio.Task[None]] = {}

    def due_at(self, leg: Leg) -> float | None:
        """When its silence becomes suspicious; None where nothing is expected of it, or it is being asked."""
        late = leg.late_since()
        if late is None or leg.fault is not None or leg in self._asking:
            return None
        since, pending = late
        return max(since + leg.patience(pending.tokens), self._excused.get(leg, 0.0))

    def ask(self, leg: Leg) -> None:
        """Ask in the background. Not to be called while it is being asked."""
        self._asking[leg] = asyncio.create_task(self._ask(leg), name=f"ask after {leg.hop.peer}")

    def close(self) -> None:
        for asking in self._asking.values():
            asking.cancel()

    async def _ask(self, leg: Leg) -> None:
        late = leg.late_since()
        try:
            has_it = late is None or await leg.has_taken(late[1])
        except HopError as fault:
            leg.fail(fault)
            return
        finally:
            del self._asking[leg]
            self._on_asked()
        if late is None or leg.late_since() != late:
            return
        since, pending = late
        now = self._clock()
        self._excused[leg] = now + leg.patience(pending.tokens)
        if now - since > leg.deadlines.for_step(pending.tokens):
            leg.fail(Gone(leg.hop, "did not answer in time"))
        elif not has_it and pending.is_pushed:
            logger.info("a step did not come through to peer %s: it is brought there", leg.hop.peer)
            self._on_not_taken(leg)
        elif not has_it:
            leg.fail(Gone(leg.hop, "did not take up a step"))
