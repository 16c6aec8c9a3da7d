"""The routes of one client: which peers to avoid for a while, waiting for a route, waking who sleeps for one.

Owns what this client has learned of peers from their answers. The fastest route itself is found in `route`,
what is announced is the directory's. Must not know of sessions or of what travels along a route.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeVar

from swarm.client.concurrently import concurrently
from swarm.client.faults import HopError, NoCapacity, RemoteFault, SessionLost, WarmingUp
from swarm.client.route import Costs, NoRoute, Route, find_route
from swarm.client.waking import wake
from swarm.dht.announcement import Announcement
from swarm.dht.directory import Directory
from swarm.errors import SwarmError
from swarm.net.transport import PeerId, Transport, TransportError

T = TypeVar("T")

logger = logging.getLogger(__name__)

FAULT_AVOIDED = 10.0
BUSY_AVOIDED = 2.0
"""Seconds for which routes avoid a peer after a fault, and after it had no room and gave no time."""

ROUTE_PAUSE = 1.0
"""Seconds between two looks at why there is no route yet."""

WAKING_PATIENCE = 15.0
"""Seconds that a peer which sleeps has to answer."""

RTT_PATIENCE = 1.5
"""Seconds that a new client waits at most for the round trips to its servers to be measured."""

OnWaiting: TypeAlias = Callable[[SwarmError], None]
"""Called with the reason each time that a route has to be waited for."""


class ServedModel(Protocol):
    """What must be known of a model here; `swarm.blocks.models.Model` has it."""

    @property
    def name(self) -> str: ...
    @property
    def model_id(self) -> str: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def config(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Avoided:
    """Why routes avoid a peer, and until when in the loop's time.

    A peer that is warming up is avoided only as long as it announces what it `said` then.
    """

    until: float
    reason: str
    said: Announcement | None = None


class Routes:
    """The routes through one model. `timeout` is how many seconds one is waited for."""

    def __init__(
        self,
        directory: Directory,
        transport: Transport,
        model: ServedModel,
        *,
        timeout: float,
        on_waiting: OnWaiting = lambda reason: None,
    ):
        self.timeout = timeout
        self.failure: TransportError | None = None
        """Why this client's own network has failed; None while it has not."""
        self._directory = directory
        self._transport = transport
        self._model = model
        self._on_waiting = on_waiting
        self._avoided: dict[PeerId, Avoided] = {}

    def find(self, tokens: int = 1) -> Route:
        """The fastest route now for a session of `tokens` tokens.

        Raises:
            NoRoute: some blocks have no server with room.
        """
        announcements = self._directory.announcements
        self._forget_avoided(announcements)
        return find_route(
            announcements,
            self._model.num_blocks,
            costs=Costs(rtt=self._directory.rtt),
            model=self._model.name,
            tokens=tokens,
            excluded={peer: avoided.reason for peer, avoided in self._avoided.items()},
            woken=[peer for peer, avoided in self._avoided.items() if avoided.said is not None],
        )

    async def wait(self, tokens: int = 1) -> Route:
        """`find`, waited for up to `timeout` seconds.

        Raises:
            NoRoute: none came up.
        """

        async def found() -> Route:
            return self.find(tokens)

        await self.until_routed(found, tokens)
        await self._directory.wait_for(self._knows_distances, RTT_PATIENCE)
        return self.find(tokens)

    def judge(self, fault: HopError) -> None:
        """Hear of a hop that failed, so that routes avoid it for a while.

        Raises:
            TransportError: it was not the peer's fault: this client's own network has failed.
        """
        if self.failure is not None:
            raise self.failure
        if isinstance(fault, RemoteFault) and not isinstance(fault, SessionLost):
            logger.info("avoiding peer %s: it %s", fault.hop.peer, fault.reason)
            self._avoid(fault, FAULT_AVOIDED)
        elif isinstance(fault, WarmingUp):
            self._avoid(fault, fault.retry_after or BUSY_AVOIDED, said=fault.hop.announcement)
        elif isinstance(fault, NoCapacity):
            self._avoid(fault, fault.retry_after or BUSY_AVOIDED)

    def judge_opening(self, fault: HopError) -> None:
        """`judge`, where a stream that ends at once is the peer's refusal."""
        self.judge(fault)
        if isinstance(fault, SessionLost):
            self._avoid(fault, BUSY_AVOIDED)

    async def until_routed(self, attempt: Callable[[], Awaitable[T]], tokens: int) -> T:
        """Repeat `attempt`, which needs a route for `tokens`, until it succeeds or the time is up.

        Meanwhile other peers are asked, and woken where they sleep.

        Raises:
            NoRoute, RemoteFault, NoCapacity: as the last attempt.
        """
        clock = asyncio.get_running_loop().time
        deadline = clock() + self.timeout
        while True:
            try:
                return await attempt()
            except (NoRoute, RemoteFault, NoCapacity) as error:
                if clock() >= deadline:
                    raise
                reason = error
            if isinstance(reason, NoRoute):
                await self._wait_for_route(reason, tokens, deadline - clock())

    async def _wait_for_route(self, reason: NoRoute, tokens: int, patience: float) -> None:
        """Wait a moment, `patience` seconds at most, for a route that there is not for `reason`."""
        if reason.to_wake:
            self._on_waiting(reason)
            timeout = min(WAKING_PATIENCE, patience)
            await concurrently(*(self._wake(server, timeout) for server in reason.to_wake))
        pause = min(ROUTE_PAUSE, patience)
        if not await self._directory.wait_for(lambda: self._may_route(tokens), pause) and not reason.to_wake:
            self._on_waiting(reason)

    async def _wake(self, server: Announcement, timeout: float) -> None:
        try:
            await wake(self._transport, server, timeout)
        except HopError as answer:
            self.judge_opening(answer)

    def _may_route(self, tokens: int) -> bool:
        try:
            self.find(tokens)
        except NoRoute:
            return False
        return True

    def _knows_distances(self) -> bool:
        serving = (server for server in self._directory.announcements if server.state == "serving")
        return all(self._directory.rtt(server.peer_id) is not None for server in serving)

    def _avoid(self, fault: HopError, seconds: float, said: Announcement | None = None) -> None:
        until = asyncio.get_running_loop().time() + seconds
        self._avoided[fault.hop.peer] = Avoided(until, fault.reason, said)

    def _forget_avoided(self, announcements: Sequence[Announcement]) -> None:
        """Forget what is over by now, of peers of which these are the announcements."""
        now, said = asyncio.get_running_loop().time(), {server.peer_id: server for server in announcements}
        self._avoided = {
            peer: avoided
            for peer, avoided in self._avoided.items()
            if avoided.until > now and avoided.said in (None, said.get(peer))
        }
