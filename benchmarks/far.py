"""A swarm whose members are far apart, on one machine: servers, and clients as they are asked for.

Where network namespaces are allowed, servers are processes with real sockets, and so is each client's libp2p
daemon; elsewhere all of them live in this process, on its in-process network, with the same engines. Knows
how such a swarm comes up, nothing of what is measured.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

import swarm
from benchmarks.distance import Distance, NotAllowed, apart
from benchmarks.servers import STARTING, server_process
from swarm.blocks.engine import Engine, EngineConfig
from swarm.blocks.head import Head
from swarm.blocks.models import Model
from swarm.client.facade import Swarm
from swarm.client.options import SessionKeywords, SessionOptions
from swarm.dht.announcement import ModelEntry
from swarm.dht.joining import Network
from swarm.dht.memory import MemoryStore
from swarm.net.identity import Identity
from swarm.net.memory import MemoryNetwork
from swarm.net.wire import Link
from swarm.processes import ServerProcess, stop_all
from swarm.server.server import Server, Shard
from swarm.spans import Span

NAMESPACES = "network namespaces joined by TUN devices and a delaying switch"
IN_PROCESS = "the in-process network"
LOOPBACK = "loopback"
KV_TOKENS = 4096

Connect = Callable[..., AbstractAsyncContextManager[Swarm]]


@dataclass(frozen=True)
class Way:
    """How far peers are from each other, and how wide the line of each is. None is loopback."""

    rtt_ms: float
    mbit_s: float


@dataclass(frozen=True)
class Far:
    """A swarm that serves. `connect` joins it as a client, with `SessionKeywords`."""

    network: str
    connect: Connect
    servers: list[ServerProcess] = field(default_factory=list)


@asynccontextmanager
async def far_swarm(
    model: Model,
    dtype: str,
    spans: Sequence[Span],
    way: Way | None,
    folder: Path,
    *,
    in_process: bool = False,
) -> AsyncIterator[Far]:
    """One server with one thread for each of `spans`, `way` apart, once all serve; logs go to `folder`.

    Raises:
        NotAllowed: this machine has no namespaces for it, and it was not asked for `in_process`.
    """
    async with AsyncExitStack() as stack:
        if way is not None and in_process:
            yield await stack.enter_async_context(_in_this_process(model, dtype, spans, way))
            return
        distance = None
        if way is not None:
            distance = await stack.enter_async_context(apart(len(spans) + 1, way.rtt_ms, way.mbit_s))
        yield await stack.enter_async_context(_as_processes(model, dtype, spans, distance, folder))


async def can_be_apart() -> str | None:
    """None where processes can be put at a distance; else why not."""
    try:
        async with apart(2, 1.0, 1000.0):
            return None
    except NotAllowed as reason:
        return str(reason)


@asynccontextmanager
async def _as_processes(
    model: Model, dtype: str, spans: Sequence[Span], distance: Distance | None, folder: Path
) -> AsyncIterator[Far]:
    servers = [
        server_process(
            model.name,
            dtype,
            span,
            folder / f"{dtype}-{span}.log".replace(":", "-"),
            ["--kv-tokens", str(KV_TOKENS), "--no-prefix-cache"],
            **({"address": distance.listen_address(place)} if distance else {}),
        )
        for place, span in enumerate(spans)
    ]
    addresses: list[str] = []
    try:
        for place, server in enumerate(servers):
            with distance.at(place) if distance else nullcontext():
                await server.start(["--initial-peers", *addresses] if addresses else ())
            addresses = addresses or (await server.wait_for("listening", STARTING))["addresses"]
        for server in servers:
            await server.wait_for("serving", STARTING)
        yield Far(NAMESPACES if distance else LOOPBACK, _joining(model, dtype, distance, addresses), servers)
    finally:
        await stop_all(servers)


def _joining(model: Model, dtype: str, distance: Distance | None, addresses: Sequence[str]) -> Connect:
    """Clients in the place behind the servers'."""
    place = -1

    @asynccontextmanager
    async def connect(**sessions: Unpack[SessionKeywords]) -> AsyncIterator[Swarm]:
        with distance.at(place) if distance else nullcontext():
            client = await swarm.connect(addresses, model.name, dtype=dtype, **sessions)
        try:
            yield client
        finally:
            await client.close()

    return connect


class _Silent:
    """Implements `Events`."""

    def listening(self, *_: Any) -> None: ...
    def metrics(self, *_: Any) -> None: ...
    def phase(self, *_: Any, **__: Any) -> None: ...
    def moving(self, *_: Any) -> None: ...


@asynccontextmanager
async def _in_this_process(model: Model, dtype: str, spans: Sequence[Span], way: Way) -> AsyncIterator[Far]:
    link = Link(latency=way.rtt_ms / 2000, bandwidth=way.mbit_s * 1e6 / 8)
    network, store, stop = MemoryNetwork(default_link=link), MemoryStore(time.time), asyncio.Event()
    entry = ModelEntry(
        model_id=model.model_id, name=model.name, num_blocks=model.num_blocks, fingerprint=model.fingerprint
    )
    config = EngineConfig(dtype=dtype, device="cpu", kv_tokens=KV_TOKENS, threads=1)
    head, loading = await asyncio.to_thread(Head.load, model, dtype, "cpu"), asyncio.Lock()

    def server(span: Span) -> Server:
        identity = Identity.from_seed(str(span))

        async def load(span: Span, on_progress: Any, *, kv_tokens: int | None = None) -> Engine:
            async with loading:  # torch's default dtype, which loading sets for a while, is the process's
                return await Engine.load(model, span, config, on_progress)

        access = Network(identity, network.transport(identity), store.another())
        return Server(Shard(entry, model.hidden_size, span, load), access, _Silent())

    @asynccontextmanager
    async def connect(**sessions: Unpack[SessionKeywords]) -> AsyncIterator[Swarm]:
        options = SessionOptions(**sessions)
        transport = network.transport(Identity.generate())
        async with transport, Swarm(transport, store.another(), model, head, sessions=options) as client:
            await client.wait_for_route()
            yield client

    async with asyncio.TaskGroup() as tasks:
        for span in spans:
            tasks.create_task(server(span).run(stop), name=f"server of blocks {span}")
        try:
            yield Far(IN_PROCESS, connect)
        finally:
            stop.set()
