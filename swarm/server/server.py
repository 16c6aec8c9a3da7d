"""One server's life in the swarm, in order: listen, be listed, fill the cell, serve, drain, leave.

In between the cell may be evicted, and filled again for the next session, or go on to other blocks. Owns
what this peer says of itself. Network, records and engine come from outside, real or in-memory; how they are
started is `startup`'s business, what people see of it all is `events`'.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from swarm.dht.announcement import MAX_ADDRESSES, Announcement, ModelEntry, Throughput
from swarm.dht.announcer import PERIOD, Announcer
from swarm.dht.directory import Directory
from swarm.dht.joining import Network
from swarm.errors import SwarmError
from swarm.net.relaying import is_relayed
from swarm.net.transport import TransportError
from swarm.server.admission import Limits
from swarm.server.arranging import Arranging
from swarm.server.cell import ShardCell, measured
from swarm.server.copying import Pace
from swarm.server.events import Events
from swarm.server.gauge import Gauge
from swarm.server.metrics import Metrics
from swarm.server.moving import FitsBeside, LoadSpan, Moving
from swarm.server.sessions import Sessions
from swarm.server.span_engine import BatchReport
from swarm.server.strength import Strength
from swarm.spans import Span
from swarm.version import VERSION

logger = logging.getLogger(__name__)

DIRECTORY_PERIOD = 10.0
FRESHEN_PERIOD = 3.0
"""Seconds between two looks at whether the free KV memory or the neighbours still are as announced."""

FLOAT32_BYTES = 4

ANNOUNCE_TIMEOUT = 2.0
DRAIN_TIMEOUT = 30.0
DRAIN_PATIENCE = 4.0
"""Seconds that leaving may take to announce it, and meanwhile for all sessions to move elsewhere, and for the
next of them to, or to go on here; see `stopping`."""


@dataclass(frozen=True)
class Shard:
    """What a server is to serve: blocks `span` of `model`, once `load` has loaded them.

    Unless that `is_fixed`, it is as many blocks, wherever the swarm needs them. `gauge` measures what was
    loaded, and remembers it; without one it is measured each time. `fits_beside` tells whether there is
    memory for two engines; without it none is counted on.
    """

    model: ModelEntry
    hidden_size: int
    span: Span
    load: LoadSpan
    is_fixed: bool = True
    gauge: Gauge | None = None
    fits_beside: FitsBeside | None = None
    dtype: str = "auto"
    quantization: str = "none"

    @property
    def known(self) -> Throughput:
        """How fast it was when it was measured before; zero where it never was."""
        return self.gauge.known() if self.gauge else Throughput()

    @property
    def token_bytes(self) -> int:
        """What each token takes that is passed on."""
        return self.hidden_size * FLOAT32_BYTES


class Server:
    """Serves one shard. `run` is its whole life; `stop` set ends it politely."""

    def __init__(
        self,
        shard: Shard,
        network: Network,
        events: Events,
        *,
        name: str = "",
        limits: Limits | None = None,
        period: float = PERIOD,
        on_unloadable: Callable[[SwarmError], bool] = lambda reason: False,
    ):
        """`on_unloadable` is told why the blocks cannot be loaded; where it gives True, that is no error."""
        self.cell = ShardCell(
            shard.span,
            partial(shard.load, shard.span),
            self._on_cell_change,
            measure=shard.gauge.rates if shard.gauge else measured,
            dtype=shard.dtype,
            quantization=shard.quantization,
        )
        self.metrics = Metrics(self.cell, model=shard.model.name, peer=network.identity.peer)
        self.sessions = Sessions(
            shard.model.model_id,
            shard.hidden_size,
            self.cell,
            network.transport,
            limits,
            self.metrics,
            identity=network.identity,
            pace=Pace(lambda: self._strength.throughput.network),
        )
        self._shard = shard
        self._network = network
        self._events = events
        self._name = name
        self._on_unloadable = on_unloadable
        self._addresses: tuple[str, ...] = ()
        self._announced: Announcement | None = None
        self._announcer = Announcer(network.store, network.identity, shard.model, period)
        self._directory = Directory(
            network.store,
            network.transport,
            shard.model.model_id,
            shard.model.num_blocks,
            span=shard.span,
            period=DIRECTORY_PERIOD,
        )
        self.cell.throughput = shard.known
        self._strength = Strength(
            self.cell,
            self._directory,
            network.transport,
            shard.gauge.measure if shard.gauge else measured,
            self._announcer.changed,
        )
        self._moving = Moving(self.cell, self.sessions, shard.load, self._announce, events, shard.fits_beside)
        self.arranging: Arranging | None = None
        if not shard.is_fixed:
            self.arranging = Arranging(
                self.cell,
                self.sessions,
                self._moving,
                self._directory,
                network.transport,
                self._announce,
                lambda: self._strength.throughput,
                shard.token_bytes,
            )

    async def run(self, stop: asyncio.Event, *, metrics_url: str | None = None) -> None:
        """Serve until `stop` is set, then leave; whatever ends it, the announcement is withdrawn.

        `metrics_url` is where `metrics` can be read, if anywhere.

        Raises:
            SwarmError: this peer could not be listed.
            ExceptionGroup: of a SwarmError, the shard could not be loaded or the network failed.
        """
        await self._network.transport.listen(self.sessions.on_stream)
        self._addresses = tuple(await self._network.transport.addresses())[:MAX_ADDRESSES]
        self._events.listening(self._network.identity.peer, self._addresses)
        if metrics_url is not None:
            self._events.metrics(metrics_url)
        try:
            if self.arranging is not None:
                await self.arranging.place()
            await self._announcer.publish(self.announcement())
            self._tell()
            await self._serve(stop)
        finally:
            await self._leave()

    @property
    def idle_since(self) -> float | None:
        """The loop's time from which on it has been serving without a session; None if it is not."""
        if self.cell.phase != "serving" or self.sessions.count:
            return None
        return max(self.cell.serving_since, self.sessions.last_ended_at)

    async def evict(self) -> None:
        """End all sessions and give the shard's memory back until the next one; nothing unless serving."""
        if self.cell.phase != "serving":
            return
        logger.info("peer %s lets its blocks go", self._network.identity.peer)
        self.sessions.evict()
        await self.cell.evict()

    def announcement(self) -> Announcement:
        """What this peer says of itself now."""
        cell, arranging = self.cell, self.arranging
        self._directory.span = cell.span
        self._announced = Announcement(
            peer=self._network.identity.peer,
            model_id=self._shard.model.model_id,
            start=cell.span.start,
            end=cell.span.end,
            state=cell.phase,
            progress=cell.progress,
            asleep=cell.is_asleep,
            throughput=self._strength.throughput,
            kv_tokens_left=self.sessions.tokens_left,
            queue=self._strength.queue,
            mean_queue=self._strength.mean_queue,
            dtype=cell.dtype,
            quantization=cell.quantization,
            name=self._name,
            version=VERSION,
            addresses=self._addresses,
            relayed=is_relayed(self._addresses),
            rtts=self._directory.next_rtts(cell.span),
            mobility=arranging.mobility if arranging else "fixed",
            serves_on=arranging.serves_on if arranging else False,
            undecided=arranging.is_undecided if arranging else False,
            goes_to=arranging.goes_to if arranging else None,
        )
        return self._announced

    def coming(self, shard: Shard, span: Span) -> Announcement:
        """What this peer says of itself under another model that it means to serve next."""
        return Announcement(
            peer=self._network.identity.peer,
            model_id=shard.model.model_id,
            start=span.start,
            end=span.end,
            state="joining",
            throughput=shard.known,
            dtype=shard.dtype,
            quantization=shard.quantization,
            name=self._name,
            version=VERSION,
            addresses=self._addresses,
            mobility="settled",
            undecided=True,
        )

    async def _serve(self, stop: asyncio.Event) -> None:
        works = {
            "announce": self._announcer.run(self.announcement),
            "fill the cell": self._keep_filled(),
            "look around": self._look_around(),
            "measure": self._strength.run(),
            "watch the network": self._watch_network(),
        }
        if self.arranging is not None:
            works["arrange"] = self.arranging.run()
        async with asyncio.TaskGroup() as tasks:
            background = [tasks.create_task(work, name=name) for name, work in works.items()]
            await stop.wait()
            for task in background:
                task.cancel()

    async def _keep_filled(self) -> None:
        """Fill the cell whenever it is wanted. Who is told that this peer serves finds it announced so."""
        if self.arranging is not None:
            await self.arranging.settle()
        while True:
            await self.cell.wait_wanted()
            try:
                await self.cell.fill()
            except SwarmError as reason:
                if self.arranging is not None and self._moving.turn_back():
                    self.arranging.stay()
                    logger.warning("blocks %s are served again: %s", self.cell.span, reason)
                    continue
                if self._on_unloadable(reason):
                    return
                raise
            self._moving.arrived()
            await self._announce()
            self._tell()

    async def _look_around(self) -> None:
        """Keep the directory fresh, and announce anew when what others plan by has changed."""
        async with self._directory:
            while True:
                await asyncio.sleep(FRESHEN_PERIOD)
                before = self._announced
                with suppress(TransportError):  # that it failed is said where that is watched
                    self._addresses = tuple(await self._network.transport.addresses())[:MAX_ADDRESSES]
                if before is None or self._is_outdated(before):
                    self._announcer.changed()

    def _is_outdated(self, announced: Announcement) -> bool:
        neighbours = self._directory.next_rtts(self.cell.span)
        return (
            announced.kv_tokens_left != self.sessions.tokens_left
            or announced.rtts.keys() != neighbours.keys()
            or announced.addresses != self._addresses
        )

    async def _watch_network(self) -> None:
        raise await self._network.transport.wait_failed()

    async def _leave(self) -> None:
        """Drain, withdraw the announcement, empty the cell. Bounded in time."""
        try:
            if self.cell.phase == "serving":
                self.cell.move("draining")
            if self.cell.phase == "draining":
                await asyncio.gather(self._announce(), self.sessions.drain(DRAIN_TIMEOUT, DRAIN_PATIENCE))
            await self._announcer.withdraw()
            self.cell.move("left")
        finally:
            self.cell.close()

    async def _announce(self) -> None:
        """Announce this peer as it is now, at once or not at all: the announcer goes on trying."""
        try:
            async with asyncio.timeout(ANNOUNCE_TIMEOUT):
                await self._announcer.publish(self.announcement())
        except (SwarmError, TimeoutError) as error:
            peer, phase = self._network.identity.peer, self.cell.phase
            logger.warning("peer %s could not announce that it is %s: %r", peer, phase, error)

    def _on_batch(self, report: BatchReport) -> None:
        self.metrics.on_batch(report)
        self._strength.on_batch(report)

    def _on_cell_change(self) -> None:
        engine = self.cell.engine
        if engine is not None and engine.on_batch is None:
            engine.on_batch = self._on_batch
        self._announcer.changed()
        if self.cell.phase != "serving":
            self._tell()

    def _tell(self) -> None:
        cell = self.cell
        self._events.phase(cell.phase, cell.span, cell.progress, asleep=cell.is_asleep)
