"""What a server does from its start to its end: it lives for one model, or for one after the other.

In each life it may be asked for its metrics, and for its memory. Must not know what a life is made of.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack

from swarm.dht.joining import Network
from swarm.errors import SwarmError
from swarm.server.events import Events, LastingEvents
from swarm.server.evicting import evict_on_request, evict_when_idle
from swarm.server.metrics_endpoint import serving
from swarm.server.server import Server, Shard
from swarm.server.switching import Switching

logger = logging.getLogger(__name__)


class Lives:
    """Lives for the models of `shards`; `events_of` are for one that begins with the model of an index.

    Times are in seconds; see `ServerConfig` for the rest.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        network: Network,
        events_of: Callable[[int], Events],
        *,
        name: str = "",
        evict_after: float | None = None,
        metrics_port: int | None = None,
    ):
        self._shards = shards
        self._network = network
        self._events_of = events_of
        self._name = name
        self._evict_after = evict_after
        self._metrics_port = metrics_port
        self._switching = Switching(shards, network) if len(shards) > 1 else None

    async def run(self, stop: asyncio.Event, evictions: asyncio.Event) -> None:
        """Live until `stop` is set; whenever `evictions` is, the memory is given back.

        Raises:
            SwarmError: as `Server.run`. May come in groups.
        """
        if self._switching is None:
            await self._live(0, self._events_of(0), None, stop, evictions)
            return
        first = await self._switching.first()
        events = LastingEvents(self._events_of(first))
        events.model(self._name_of(first), is_first=True)
        following: int | None = first
        while following is not None and not stop.is_set():
            following = await self._live(following, events, self._switching, stop, evictions)
        events.end()

    async def _live(
        self,
        index: int,
        events: Events,
        switching: Switching | None,
        stop: asyncio.Event,
        evictions: asyncio.Event,
    ) -> int | None:
        """Serve that model until `stop` is set, or another needs it more: its index."""
        ending = asyncio.Event()
        following: int | None = None

        def go_elsewhere(reason: SwarmError) -> bool:
            nonlocal following
            following = switching.without(index) if switching is not None else None
            if following is None:
                return False
            logger.warning("%s is not served here: %s", self._name_of(index), reason)
            events.model(self._name_of(following), is_first=False)
            ending.set()
            return True

        server = Server(
            self._shards[index], self._network, events, name=self._name, on_unloadable=go_elsewhere
        )

        async def obey() -> None:
            await stop.wait()
            ending.set()

        async def go_on(switching: Switching) -> None:
            nonlocal following
            following = await switching.next(server, index)
            events.model(self._name_of(following), is_first=False)
            ending.set()

        async with AsyncExitStack() as stack:
            url = None
            if self._metrics_port is not None:
                url = await stack.enter_async_context(serving(server.metrics, self._metrics_port))
            works = {"obey": obey(), "evict on request": evict_on_request(server, evictions)}
            if self._evict_after is not None:
                works["evict when idle"] = evict_when_idle(server, self._evict_after)
            if switching is not None:
                works["look at other models"] = go_on(switching)
            async with asyncio.TaskGroup() as tasks:
                beside = [tasks.create_task(work, name=name) for name, work in works.items()]
                await server.run(ending, metrics_url=url)
                for task in beside:
                    task.cancel()
        if following is not None:
            await server.cell.vacate()
        return following

    def _name_of(self, index: int) -> str:
        return self._shards[index].model.name
