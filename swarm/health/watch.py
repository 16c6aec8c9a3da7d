"""Watching a swarm: when its records are read, its peers pinged, its history kept, and who is told of it.

Owns the newest `SwarmState` and the background work that makes the next one. What a state says is worked
out in `state`; who shows it is not known here.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence

from swarm.dht.joining import Network
from swarm.errors import SwarmError
from swarm.health.history import History
from swarm.health.inspecting import Inspections
from swarm.health.probes import Probes
from swarm.health.reading import ROUND_TIMEOUT, Records
from swarm.health.state import Reach, Sample, Seen, sample_of, state_of
from swarm.net.transport import PeerId
from swarm.version import VERSION

logger = logging.getLogger(__name__)

PERIOD = 5.0
"""Seconds between two readings of the records."""

INSPECT_PERIOD = 10.0
"""Seconds between two rounds of looking whether peers serve."""

SAMPLE_PERIOD = 60.0
"""Seconds between two samples for the history."""


class Watch:
    """The state of the swarm, made anew every `period` seconds while `run` runs.

    Each state has a `version`, one higher than the one before; `started`, in unix milliseconds, tells one
    watch's versions from another's. Without a `history` none is kept.
    """

    def __init__(
        self,
        network: Network,
        initial_peers: Sequence[str] = (),
        history: History | None = None,
        period: float = PERIOD,
        *,
        is_private: bool = False,
    ):
        self.peer = network.transport.peer
        self.now = network.store.now
        self.started = int(self.now() * 1000)
        self.period = period
        self.probes = Probes(network.transport, network.store.now)
        self.inspections = Inspections(network.transport, network.store.now)
        self.records = Records(network.store)
        self.state = state_of(Seen(self.peer, VERSION, at=self.now()))
        self.version = 0
        self._initial_peers = initial_peers
        self._is_private = is_private
        self._history = history
        self._points: Mapping[str, Sequence[Sample]] = {}
        self._renewing = asyncio.Lock()
        self._changed = asyncio.Condition()
        self._is_unprobed = asyncio.Event()

    @property
    def is_current(self) -> bool:
        """Whether the records were read lately."""
        return (
            self.records.read_at > 0 and self.now() - self.records.read_at < ROUND_TIMEOUT + 2 * self.period
        )

    async def run(self) -> None:
        """Watch until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._read_forever(), name="health: read the records")
            tasks.create_task(self._probe_forever(), name="health: ping the peers")
            tasks.create_task(self._inspect_forever(), name="health: look whether peers serve")
            if self._history is not None:
                tasks.create_task(self._remember_forever(self._history), name="health: keep the history")

    async def refresh(self) -> None:
        """Read the records once, and make the state anew."""
        await self.records.read()
        await self._renew()
        self._is_unprobed.set()

    async def probe(self) -> None:
        """Ping those whose turn it is, and make the state anew."""
        announced = self.records.announcements().values()
        await self.probes.round({one.peer_id: one.addresses for listed in announced for one in listed})
        await self._renew()

    async def inspect(self) -> None:
        """Look whether those whose turn it is serve what they announce, and make the state anew."""
        announced = self.records.announcements().values()
        await self.inspections.round(one for listed in announced for one in listed)
        await self._renew()

    async def remember(self, history: History) -> None:
        """Add what is seen now to the history, and read what charts show."""
        now = self.now()
        try:
            if self.is_current:
                known = [model for model in self.state.models if model.model_id not in self.records.failed]
                await history.add({model.model_id: sample_of(model, now) for model in known}, now)
            self._points = await history.points(now)
        except SwarmError as error:
            logger.warning("%s", error)
        await self._renew()

    async def check(self, peer: PeerId) -> Reach:
        """Whether `peer` can be reached, at the addresses that it announces if it does."""
        announced = self.records.announcements().values()
        known = (one.addresses for listed in announced for one in listed if one.peer == peer)
        return await self.probes.check(peer, next(known, ()))

    async def newer_than(self, version: int) -> int:
        """The version of the state, once it is above `version`."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.version > version)
            return self.version

    async def _renew(self) -> None:
        async with self._renewing:  # so that no older state comes after a newer one
            self.state = await asyncio.to_thread(state_of, self._seen())
            async with self._changed:
                self.version += 1
                self._changed.notify_all()

    def _seen(self) -> Seen:
        return Seen(
            peer=self.peer,
            version=VERSION,
            at=self.now(),
            read_at=self.records.read_at,
            error=self.records.error,
            models=self.records.models,
            announcements=self.records.announcements(),
            reach=self.probes.reaches(),
            inspected=self.inspections.known(),
            history=self._points,
            initial_peers=self._initial_peers,
            is_private=self._is_private,
            dropped=dict(self.records.dropped),
        )

    async def _read_forever(self) -> None:
        while True:
            await self.refresh()
            await asyncio.sleep(self.period)

    async def _probe_forever(self) -> None:
        """A round after each reading; readings that come meanwhile count as one."""
        while True:
            await self._is_unprobed.wait()
            self._is_unprobed.clear()
            await self.probe()

    async def _inspect_forever(self) -> None:
        await self.newer_than(0)
        while True:
            await asyncio.sleep(INSPECT_PERIOD)
            await self.inspect()

    async def _remember_forever(self, history: History) -> None:
        await self.newer_than(0)
        while True:
            await self.remember(history)
            await asyncio.sleep(SAMPLE_PERIOD)
