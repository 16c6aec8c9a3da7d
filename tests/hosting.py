"""Servers' sessions in an in-process network, with fake engines, and clients that ask them."""

import asyncio
from array import array
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families as parse_text

from swarm.blocks.errors import StepError
from swarm.net import messages
from swarm.net.calls import MessageStream, Refused
from swarm.net.memory import MemoryNetwork, MemoryTransport
from swarm.net.messages import AnyMessage, Error, Fed, Feed, Open, Step
from swarm.net.transport import Stream, StreamClosed
from swarm.net.wire import Link
from swarm.server.admission import Limits
from swarm.server.cell import OnProgress, ShardCell
from swarm.server.metrics import Metrics
from swarm.server.sessions import Sessions
from swarm.spans import Span
from tests.fake_engine import FakeEngine, FakeResult

SPAN = Span(2, 4)
HIDDEN = 3
ONE, TWO, THREE = "1" * 32, "2" * 32, "3" * 32

SERVERS_TASKS = ("session ", "link ", "mirror ", "watch ", "send to ", "stream of ")
"""How the names of all tasks begin that serve streams."""

_numbers: Iterator[int] = count(1)


class Net:
    """A network whose peers are 10 ms apart, and its clients by name."""

    def __init__(self) -> None:
        self.network = MemoryNetwork(default_link=Link(latency=0.01))
        self.clients: dict[str, MemoryTransport] = {}

    def client(self, name: str) -> MemoryTransport:
        if name not in self.clients:
            self.clients[name] = self.network.transport(name)
        return self.clients[name]

    async def close(self) -> None:
        for client in self.clients.values():
            await client.close()


@dataclass
class EndingEngine(FakeEngine):
    """As the real engine, it ends what runs for a session that is closed."""

    closings: dict[str, "asyncio.Future[None]"] = field(default_factory=dict)

    async def step(self, session_id: str, *args: Any, **kwargs: Any) -> FakeResult:
        closing = self.closings[session_id] = asyncio.get_running_loop().create_future()
        running = asyncio.create_task(super().step(session_id, *args, **kwargs))
        try:
            await asyncio.wait((running, closing), return_when=asyncio.FIRST_COMPLETED)
            if closing.done():
                raise StepError("unknown_session", "closed")
            return running.result()
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            del self.closings[session_id]

    async def export_kv(self, session_id: str, first: int, end: int) -> memoryview:
        try:
            return await super().export_kv(session_id, first, end)
        except KeyError:
            raise StepError("unknown_session", "closed") from None

    async def import_kv(self, session_id: str, first: int, end: int, data: memoryview) -> None:
        try:
            await super().import_kv(session_id, first, end, data)
        except KeyError:
            raise StepError("unknown_session", "closed") from None

    def close_session(self, session_id: str) -> None:
        super().close_session(session_id)
        if (closing := self.closings.get(session_id)) is not None and not closing.done():
            closing.set_result(None)


@dataclass
class Host:
    """One server's sessions."""

    net: Net
    engine: FakeEngine
    cell: ShardCell
    sessions: Sessions
    metrics: Metrics
    transport: MemoryTransport

    @property
    def peer(self) -> Any:
        return self.transport.peer

    @property
    def network(self) -> MemoryNetwork:
        return self.net.network

    @property
    def clients(self) -> dict[str, MemoryTransport]:
        return self.net.clients

    async def stream(self, client: str = "client") -> Stream:
        return await self.net.client(client).open_stream(self.peer)

    async def client(self, client: str = "client") -> MessageStream:
        return MessageStream(await self.stream(client))

    def refusals(self) -> dict[tuple[str, str], int]:
        """How many requests were refused so far, by their kind and the code."""
        samples = (
            sample
            for family in parse_text(generate_latest(self.metrics.registry).decode())
            for sample in family.samples
            if sample.name == "swarm_refusals_total" and sample.value
        )
        return {(sample.labels["request"], sample.labels["code"]): int(sample.value) for sample in samples}


@asynccontextmanager
async def hosting(
    name: str = "server",
    net: Net | None = None,
    *,
    engine: FakeEngine | None = None,
    span: Span = SPAN,
    is_filled: bool = True,
    **limits: Any,
) -> AsyncIterator[Host]:
    """A server `name`, which must have ended all it began by the time it leaves."""
    shared, net, held = net is not None, net or Net(), engine or FakeEngine()

    async def load(on_progress: OnProgress) -> FakeEngine:
        return held

    cell = ShardCell(span, load)
    metrics = Metrics(cell)
    async with net.network.transport(name) as transport:
        sessions = Sessions("m", HIDDEN, cell, transport, Limits(**limits), metrics)
        await transport.listen(sessions.on_stream)
        if is_filled:
            await cell.fill()
        yield Host(net, held, cell, sessions, metrics, transport)
        if not shared:
            await net.close()
    assert not sessions.count
    assert not held.sessions, "a session outlived its stream"
    if not shared:
        await nothing_left()


@asynccontextmanager
async def servers(
    *names: str, kind: type[FakeEngine] = FakeEngine, **settings: Any
) -> AsyncIterator[list[Host]]:
    """Servers in one network, each with an engine of that kind, which leave nothing behind."""
    net = Net()
    async with AsyncExitStack() as stack:
        hosts = [
            await stack.enter_async_context(hosting(name, net, engine=kind(), **settings)) for name in names
        ]
        yield hosts
        await net.close()
        await asyncio.sleep(1)
        assert not any(host.transport.streams for host in hosts), "a stream outlived its client"
    await nothing_left()


async def nothing_left() -> None:
    """Fails if something goes on that served a stream."""
    await asyncio.sleep(0.1)
    names = [task.get_name() for task in asyncio.all_tasks()]
    left = [name for name in names if name.startswith(SERVERS_TASKS)]
    assert not left, f"these outlived their streams: {left}"


def opening(session_id: str = ONE, **changes: Any) -> Open:
    asked: dict[str, Any] = {"model_id": "m", "start": 2, "end": 4, "max_tokens": 20} | changes
    return Open(session_id=session_id, **asked)


def stepping(seq_pos: int, tokens: int, session_id: str = ONE, **changes: Any) -> Step:
    """A step with a number above those of all steps made before, if none is given."""
    asked: dict[str, Any] = {
        "number": next(_numbers),
        "payload_type": "hidden_states",
        "response_type": "hidden_states",
        "shape": (tokens, HIDDEN),
        "dtype": "float32",
    } | changes
    return Step(session_id=session_id, seq_pos=seq_pos, **asked)


def values(tokens: int, value: float = 0.0) -> bytes:
    return array("f", [value] * tokens * HIDDEN).tobytes()


async def ask(client: MessageStream, message: AnyMessage, body: bytes = b"") -> Any:
    answer, _ = await client.call(message, body, timeout=30, max_body=10_000)
    return answer


async def refusal(client: MessageStream, message: AnyMessage, body: bytes = b"") -> messages.Error:
    with pytest.raises(Refused) as refused:
        await client.call(message, body, timeout=30, max_body=10_000)
    return refused.value.error


async def opened(host: Host, session_id: str, **changes: Any) -> MessageStream:
    client = await host.client()
    await ask(client, opening(session_id, **changes))
    return client


async def feeding(host: Host, session_id: str, who: str = "feeder") -> MessageStream:
    """A stream of a peer that feeds a session."""
    feed = await host.client(who)
    assert await ask(feed, Feed(session_id=session_id)) == Fed(session_id=session_id)
    return feed


async def hear(client: MessageStream, seconds: float = 30.0) -> Any:
    """The next message that comes, within `seconds`."""
    async with asyncio.timeout(seconds):
        message, _ = await client.receive()
    return message


async def ended(client: MessageStream) -> None:
    """Return once nothing comes any more but reasons for that."""
    with suppress(StreamClosed):
        while True:
            assert isinstance(await hear(client), Error)


async def silence(client: MessageStream, seconds: float = 5.0) -> None:
    """Fails if something comes within `seconds`."""
    with pytest.raises(TimeoutError):
        await hear(client, seconds)
