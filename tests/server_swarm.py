"""Servers' whole lives in one process: a network and its records in memory, fake engines, a virtual clock."""

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pytest

from swarm.dht.announcement import Announcement, ModelEntry, PeerState
from swarm.dht.directory import list_peers
from swarm.dht.memory import MemoryStore
from swarm.net import messages
from swarm.net.calls import MessageStream, Refused
from swarm.net.memory import MemoryNetwork
from swarm.net.transport import PeerId, Transport
from swarm.net.virtual_time import VirtualTimeLoop
from swarm.net.wire import Link
from swarm.server.cell import OnProgress
from swarm.server.moving import FitsBeside, LoadSpan
from swarm.server.server import Network, Server, Shard
from swarm.spans import Span
from tests.fake_engine import FakeEngine

FIRST = Span(0, 3)
MODEL = ModelEntry(model_id="m", name="tiny", num_blocks=6, fingerprint="f")


@dataclass
class Recorded:
    """Implements `Events`."""

    seen: list[Any] = field(default_factory=list)

    def listening(self, peer: PeerId, addresses: Sequence[str]) -> None:
        self.seen.append(("listening", tuple(addresses)))

    def metrics(self, url: str) -> None:
        self.seen.append(("metrics", url))

    def phase(self, phase: PeerState, span: Span, progress: float, *, asleep: bool = False) -> None:
        self.seen.append(("asleep" if asleep else phase, progress))

    def moving(self, span: Span, to: Span) -> None:
        self.seen.append(("moving", (span, to)))

    def model(self, name: str, *, is_first: bool) -> None:
        self.seen.append(("model", name))


class World:
    """A network and its records, servers in it, and somebody who looks at them."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        self.network = MemoryNetwork(default_link=Link(latency=0.01))
        self.store = MemoryStore(loop.now)
        self.engines: dict[str, FakeEngine] = {}
        """The newest of each server, or the one that it is about to load."""

    def server(
        self,
        name: str,
        span: Span = FIRST,
        load: LoadSpan | None = None,
        *,
        is_fixed: bool = True,
        fits_beside: FitsBeside | None = None,
    ) -> "Life":
        self.engines[name] = FakeEngine()
        fresh = [self.engines[name]]

        async def slowly(span: Span, on_progress: OnProgress, *, kv_tokens: int | None = None) -> FakeEngine:
            for fraction in (0.5, 1.0):
                await asyncio.sleep(5)
                on_progress(fraction)
            self.engines[name] = fresh.pop() if fresh else FakeEngine()
            return self.engines[name]

        return Life(self, name, Shard(MODEL, 3, span, load or slowly, is_fixed, fits_beside=fits_beside))

    async def listed(self) -> list[Announcement]:
        return await list_peers(self.store, MODEL)

    async def spans(self) -> dict[str, tuple[Span, PeerState]]:
        """What each server is listed with, by its name."""
        return {one.name: (one.span, one.state) for one in await self.listed()}

    async def states(self) -> list[PeerState]:
        return [announcement.state for announcement in await self.listed()]


class Life:
    """One server while it runs."""

    def __init__(self, world: World, name: str, shard: Shard):
        self.transport = world.network.transport(name)
        self.store = world.store.another()
        self.events = Recorded()
        self.stop = asyncio.Event()
        network = Network(self.transport.identity, self.transport, self.store)
        self.server = Server(shard, network, self.events, name=name)

    async def __aenter__(self) -> "Life":
        self.task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    async def leave(self) -> None:
        self.stop.set()
        await self.task

    async def _run(self) -> None:
        async with self.transport:
            await self.server.run(self.stop)


class Reached(Protocol):
    """Whoever can be reached."""

    @property
    def transport(self) -> Transport: ...


async def opened(
    world: World, life: "Reached", client: str = "client", span: Span = FIRST, session_id: str = "1" * 32
) -> MessageStream:
    transport = world.network.transport(client)
    stream = MessageStream(await transport.open_stream(life.transport.peer))
    asked = messages.Open(session_id=session_id, model_id="m", start=span.start, end=span.end, max_tokens=20)
    await stream.call(asked, timeout=5)
    return stream


def step(number: int = 1, seq_pos: int = 0) -> messages.Step:
    return messages.Step(
        session_id="1" * 32,
        number=number,
        seq_pos=seq_pos,
        payload_type="hidden_states",
        response_type="hidden_states",
        shape=(1, 3),
        dtype="float32",
    )


async def heard(client: MessageStream, seconds: float = 30.0) -> Any:
    async with asyncio.timeout(seconds):
        message, _ = await client.receive(1000)
    return message


async def refused(asking: Coroutine[Any, Any, Any]) -> messages.Error:
    with pytest.raises(Refused) as refusal:
        await asking
    return refusal.value.error
