"""A swarm in one process on a tiny real model: servers with real engines, and one client."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from swarm.blocks.engine import Engine, EngineConfig
from swarm.blocks.head import Head
from swarm.blocks.models import Model, resolve
from swarm.client.blocking import BlockingSwarm
from swarm.client.draft_model import DraftModel
from swarm.client.facade import Swarm
from swarm.client.model.causal_lm import AutoDistributedModelForCausalLM
from swarm.client.options import SessionOptions
from swarm.dht.announcement import Announcement, ModelEntry
from swarm.dht.announcer import Announcer
from swarm.dht.memory import MemoryStore
from swarm.net.identity import Identity
from swarm.net.memory import MemoryNetwork
from swarm.net.virtual_time import VirtualTimeLoop
from swarm.server.cell import ShardCell
from swarm.server.sessions import Sessions
from swarm.spans import Span

SPANS = (Span(0, 2), Span(2, 3), Span(3, 6))


@asynccontextmanager
async def serving(
    model: Model,
    latency: float = 0.0,
    draft_model: DraftModel | None = None,
    *,
    spans: Sequence[Span] = SPANS,
    kv_tokens: int = 600,
    servers: list[Sessions] | None = None,
    push: bool = True,
) -> AsyncIterator[Swarm]:
    """A client, `latency` seconds away from servers of `spans`, whose sessions are added to `servers`."""
    loop = asyncio.get_running_loop()
    network = MemoryNetwork()
    store = MemoryStore(loop.now if isinstance(loop, VirtualTimeLoop) else time.time)
    entry = ModelEntry(
        model_id=model.model_id, name="tiny", num_blocks=model.num_blocks, fingerprint=model.fingerprint
    )
    async with AsyncExitStack() as stack:
        for number, span in enumerate(spans):
            identity = Identity.from_seed(f"{number} {span}")
            config = EngineConfig(dtype="float32", kv_tokens=kv_tokens)
            cell = ShardCell(span, partial(Engine.load, model, span, config))
            await cell.fill()
            stack.callback(cell.close)
            transport = await stack.enter_async_context(network.transport(identity))
            sessions = Sessions(model.model_id, model.hidden_size, cell, transport)
            await transport.listen(sessions.on_stream)
            if servers is not None:
                servers.append(sessions)
            network.set_link("client", identity.peer, latency=latency)
            said = Announcement(
                peer=identity.peer,
                model_id=model.model_id,
                start=span.start,
                end=span.end,
                state="serving",
                throughput=cell.throughput,
                kv_tokens_left=kv_tokens,
            )
            await Announcer(store.another(), identity, entry, period=600.0).publish(said)
        transport = await stack.enter_async_context(network.transport("client"))
        head = await asyncio.to_thread(Head.load, model, "float32")
        options = SessionOptions(push=push)
        swarm = await stack.enter_async_context(
            Swarm(transport, store, model, head, draft_model=draft_model, sessions=options)
        )
        await swarm.directory.refresh()
        yield swarm


@contextmanager
def model_over_swarm(folder: Path, **options: Any) -> Iterator[AutoDistributedModelForCausalLM]:
    """The model in `folder` over a swarm of its own, on a thread; `options` are those of `serving`."""
    stack = AsyncExitStack()

    async def joined() -> Swarm:
        return await stack.enter_async_context(serving(resolve(str(folder)), **options))

    with BlockingSwarm(joined) as swarm:
        yield AutoDistributedModelForCausalLM.of(swarm)
        swarm.thread.run(stack.aclose())
