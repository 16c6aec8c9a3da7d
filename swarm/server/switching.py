"""Which of several models one server serves: the one that needs it most, and another when that needs it more.

It looks at all of them now and then. Before it goes it says so under both models, listens for a moment
whether others mean the same, and yields to those whose turn comes before its own. Owns when that is done;
which model needs it is decided in `needs`, and a server of one model lives as in `server`.
"""

import asyncio
import logging
from collections.abc import Sequence

from swarm.dht.announcer import Announcer
from swarm.dht.directory import Directory
from swarm.dht.joining import Network
from swarm.errors import SwarmError
from swarm.server.arranging import CALM, REST, Arranging, by_turn
from swarm.server.needs import Need, Switch, most_needed, switch
from swarm.server.placement import Holder, choose_in_turn, settled
from swarm.server.server import Server, Shard
from swarm.server.standing import Standing, standing, strength

logger = logging.getLogger(__name__)

LOOK_PERIOD = 10.0
"""Seconds between two looks at all models."""

BARRED = 3600.0
"""Seconds in which a model that could not be loaded is not tried again."""

HURRY = 15.0, 45.0
"""Seconds for which a model must have lacked blocks, by turn: its own servers come first."""


class Switching:
    """Chooses among the models of `shards`, each as this server would serve it."""

    def __init__(self, shards: Sequence[Shard], network: Network):
        self._shards = shards
        self._network = network
        self._peer = network.transport.peer
        self._directories = [
            Directory(network.store, network.transport, shard.model.model_id, shard.model.num_blocks)
            for shard in shards
        ]
        self._rests_until = 0.0
        self._barred: dict[int, float] = {}

    async def first(self) -> int:
        """The index of the model to begin with.

        Raises:
            StoreUnreachable: what the others serve could not be read.
        """
        for directory in self._directories:
            await directory.refresh()
        return most_needed(self._needs())

    def without(self, index: int) -> int | None:
        """The index of the model to serve instead of that one, which cannot be loaded; None if there is none.

        It is not tried again for a while.
        """
        self._barred[index] = self._now() + BARRED
        needs = self._needs()
        return most_needed(needs) if needs else None

    async def next(self, server: Server, current: int) -> int:
        """The index of the model that needs `server` more than the one that it serves, once one does so for
        long enough. Then it is expected there."""
        arranging = server.arranging
        assert arranging is not None, "a server whose model is chosen chooses its blocks too"
        wished: Switch | None = None
        since = 0.0
        while True:
            await asyncio.sleep(LOOK_PERIOD)
            found = await self._wish(arranging, current)
            if found is None or found != wished:
                wished, since = found, self._now()
            if found is None:
                continue
            calm = by_turn(self._peer, HURRY if found.is_urgent else CALM)
            if self._now() >= since + calm and await self._is_first(server, arranging, current, found):
                self._rests_until = self._now() + REST
                return found.index

    async def _wish(self, arranging: Arranging, current: int) -> Switch | None:
        """The switch that this server is to make, if there is one."""
        try:
            for index, directory in enumerate(self._directories):
                if index != current:
                    await directory.refresh()
        except SwarmError as error:
            logger.warning("peer %s could not read which models need it: %s", self._peer, error)
            return None
        if not arranging.may_leave_model:
            return None
        found = self._compared(arranging, current)
        may_improve = arranging.mobility == "free" and self._now() >= self._rests_until
        return found if found and (found.is_urgent or may_improve) else None

    async def _is_first(self, server: Server, arranging: Arranging, current: int, wished: Switch) -> bool:
        """Say what is meant, and whether that still holds once others have said what they mean."""
        shard, directory = self._shards[wished.index], self._directories[wished.index]
        others = self._others(wished.index)
        span = choose_in_turn(
            others.holders, others.undecided, directory.num_blocks, self._newcomer(wished.index)
        )
        coming = Announcer(self._network.store, self._network.identity, shard.model)
        try:
            await coming.publish(server.coming(shard, span))
            await arranging.mean_to_leave()
            await directory.refresh()
            if self._compared(arranging, current) == wished:
                return True
        except SwarmError as error:
            logger.warning("peer %s could not say that it comes: %s", self._peer, error)
        await coming.withdraw()
        await arranging.mean_to_stay()
        return False

    def _compared(self, arranging: Arranging, current: int) -> Switch | None:
        others = arranging.others()
        needs = self._needs()
        needs[current] = Need(
            self._directories[current].num_blocks,
            (*others.holders, *others.undecided),
            arranging.mine(),
            is_there=True,
        )
        return switch(needs, current)

    def _needs(self) -> dict[int, Need]:
        """Of each model that may be tried, how much it needs this server, as if that served none yet."""
        now = self._now()
        return {
            index: self._need(index)
            for index in range(len(self._shards))
            if self._barred.get(index, now) <= now
        }

    def _need(self, index: int) -> Need:
        others, num_blocks = self._others(index), self._directories[index].num_blocks
        return Need(
            num_blocks,
            tuple(settled(others.holders, others.undecided, num_blocks, self._peer)),
            self._newcomer(index),
        )

    def _others(self, index: int) -> Standing:
        return standing(self._directories[index].announcements, self._peer, self._shards[index].token_bytes)

    def _newcomer(self, index: int) -> Holder:
        """This server in another model, as far as is known."""
        shard = self._shards[index]
        known = strength(shard.known, shard.span, shard.token_bytes)
        return Holder(self._peer, shard.span, known, serves=False)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()
