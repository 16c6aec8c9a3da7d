"""How fast one server is, kept true: its network is measured when it has company, its engine again when
sessions find another speed than it announces. And how busy it is, by what is in its queue.

Owns when that is done. How it is done is known to `gauge` and `network_rate`, what counts as another speed to
`drift`.
"""

import asyncio
import logging
import math
from collections.abc import Callable

import msgspec

from swarm.dht.announcement import Announcement, Throughput
from swarm.dht.directory import Directory
from swarm.errors import SwarmError
from swarm.net.transport import Transport
from swarm.server.cell import Measure, ShardCell
from swarm.server.drift import Seen
from swarm.server.mean_queue import MeanQueue
from swarm.server.network_rate import network_rate
from swarm.server.placement import lot
from swarm.server.span_engine import BatchReport
from swarm.server.together import Together

logger = logging.getLogger(__name__)

LOOK_PERIOD = 5.0
QUEUE_PERIOD = 0.2
"""Seconds between two looks at the queue."""

IDLE = 1.0
"""Seconds without an iteration after which the engine is taken to have time for being measured."""

PAUSE = 600.0
"""Seconds between two measurements of the engine, and until a network is tried again that could not be."""

NETWORK_PERIOD = 3600.0
"""Seconds between two measurements of the network."""


class Strength:
    """The strength of the server of `cell`. `measure` runs an engine; `on_change` is called with news."""

    def __init__(
        self,
        cell: ShardCell,
        directory: Directory,
        transport: Transport,
        measure: Measure,
        on_change: Callable[[], None],
    ):
        self._cell = cell
        self._directory = directory
        self._transport = transport
        self._measure = measure
        self._on_change = on_change
        self._seen = Seen()
        self._together = Together()
        self._mean_queue = MeanQueue()
        self._mean_running = MeanQueue()
        self._running_seconds = 0.0
        self._network = 0.0
        self._ran_at = self._engine_due = self._network_due = 0.0

    @property
    def throughput(self) -> Throughput:
        """What the server announces."""
        return msgspec.structs.replace(self._cell.throughput, network=self._network)

    @property
    def queue(self) -> int:
        """The steps in the queue as the server announces them: as many as would take so long one by one."""
        return math.ceil(self._queued * self._together.part(self._cell.throughput.decode))

    @property
    def mean_queue(self) -> float:
        """The same on average over the last seconds."""
        steps = max(self._mean_queue.steps, self._mean_running.steps)
        return steps * self._together.part(self._cell.throughput.decode)

    def on_batch(self, report: BatchReport) -> None:
        """The engine has run an iteration."""
        self._ran_at = self._now()
        self._running_seconds += report.steps * report.seconds
        self._seen.add(report)
        self._together.add(report)

    async def run(self) -> None:
        """Measure what is due, and watch the queue, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch_queue(), name="watch the queue")
            tasks.create_task(self._measure_due(), name="measure what is due")

    async def _watch_queue(self) -> None:
        """Where what runs holds up the event loop, nobody sees it in the queue: its seconds count as well."""
        looked_at = self._now()
        while True:
            await asyncio.sleep(QUEUE_PERIOD)
            now = self._now()
            self._mean_queue.see(self._queued, now)
            self._mean_running.see(self._running_seconds / (now - looked_at), now)
            self._running_seconds, looked_at = 0.0, now

    async def _measure_due(self) -> None:
        while True:
            await asyncio.sleep(LOOK_PERIOD)
            if self._cell.phase == "serving":
                await self._measure_network()
                await self._measure_engine()

    async def _measure_network(self) -> None:
        peers = self._company()
        if self._now() < self._network_due or not peers:
            return
        rate = await network_rate(self._transport, peers)
        self._network_due = self._now() + (NETWORK_PERIOD if rate else PAUSE)
        if rate:
            self._network = rate
            self._on_change()

    async def _measure_engine(self) -> None:
        engine, now = self._cell.engine, self._now()
        is_idle = engine is not None and not engine.queue and now >= self._ran_at + IDLE
        if engine is None or not is_idle or now < self._engine_due:
            return
        before = self._cell.throughput
        if not self._seen.differs(before):
            return
        try:
            found = await self._measure(engine)
        except SwarmError as error:  # sessions took all its memory, or it was let go
            logger.info("the speed of this server cannot be measured now: %s", error)
            return
        self._engine_due = self._now() + PAUSE
        self._seen.forget()
        if self._cell.engine is engine:
            logger.info("this server computes %s blocks a second, not %s", found.decode, before.decode)
            self._cell.throughput = found
            self._on_change()

    @property
    def _queued(self) -> int:
        return self._cell.engine.queue if self._cell.engine else 0

    def _company(self) -> list[Announcement]:
        """The other servers, in an order of this peer's own."""
        peer = self._transport.peer
        others = [one for one in self._directory.announcements if one.peer != peer and one.state == "serving"]
        return sorted(others, key=lambda one: lot(peer, one.peer))

    def _now(self) -> float:
        return asyncio.get_running_loop().time()
