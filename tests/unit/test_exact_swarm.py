"""Whole swarms in one process, real engines, servers and client: greedy answers equal transformers' own."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from swarm.blocks.engine import Engine, EngineConfig
from swarm.blocks.head import Head
from swarm.blocks.models import Model, resolve
from swarm.client.facade import Swarm
from swarm.client.options import GenerationOptions
from swarm.dht.announcement import ModelEntry
from swarm.dht.joining import Network
from swarm.dht.memory import MemoryStore
from swarm.net.identity import Identity
from swarm.net.memory import MemoryNetwork
from swarm.net.virtual_time import VirtualTimeLoop, in_virtual_time
from swarm.net.wire import Link
from swarm.server.server import Server, Shard
from swarm.spans import Span
from tests.tiny import SPECIAL, greedy_choices

SPANS = (Span(0, 2), Span(2, 5), Span(5, 6))
PROMPTS = ([60], [5 + i * 11 % 90 for i in range(47)])
LAN = Link(latency=0.002, bandwidth=1e8)


class Silent:
    """Implements `Events`."""

    def listening(self, *_: Any) -> None: ...
    def phase(self, *_: Any, **__: Any) -> None: ...
    def moving(self, *_: Any) -> None: ...
    def model(self, *_: Any, **__: Any) -> None: ...


@asynccontextmanager
async def swarm_of(
    model: Model, dtype: str = "float32", spans: tuple[Span, ...] = SPANS
) -> AsyncIterator[Swarm]:
    """Servers of `spans` and a client, on a network with distances, all on the loop's virtual clock."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    network, store, stop = MemoryNetwork(default_link=LAN), MemoryStore(loop.now), asyncio.Event()
    entry = ModelEntry(
        model_id=model.model_id, name="tiny", num_blocks=model.num_blocks, fingerprint=model.fingerprint
    )
    config = EngineConfig(dtype="float32", device="cpu", kv_tokens=416)

    def server(span: Span) -> Server:
        identity = Identity.from_seed(str(span))

        async def load(span: Span, on_progress: Any, *, kv_tokens: int | None = None) -> Engine:
            return await Engine.load(model, span, config, on_progress)

        access = Network(identity, network.transport(identity), store.another())
        return Server(Shard(entry, model.hidden_size, span, load), access, Silent())

    async with asyncio.TaskGroup() as tasks:
        servers = [server(span) for span in spans]
        for one in servers:
            tasks.create_task(one.run(stop))
        async with Swarm(
            network.transport("client"), store, model, Head.load(model, "float32", "cpu")
        ) as client:
            await client.wait_for_route()
            yield client
        await asyncio.sleep(1.0)
        for one in servers:
            assert one.cell.engine is not None
            assert one.cell.engine.kv_tokens_left == 416, "sessions that have ended hold no memory"
        stop.set()


@pytest.mark.parametrize("family", SPECIAL)
def test_greedy_answers_equal_those_of_the_unsplit_model(
    family: str, checkpoint_of: Callable[[str], tuple[Path, Any]]
) -> None:
    folder, reference = checkpoint_of(family)
    model = resolve(str(folder))

    @in_virtual_time
    async def answers() -> list[list[int]]:
        options = GenerationOptions(max_new_tokens=10, ignore_eos=True)
        async with swarm_of(model) as client:
            streams = [client.stream_tokens(prompt, options) for prompt in PROMPTS]
            return [
                list(answer.token_ids) for answer in await asyncio.gather(*(one.result() for one in streams))
            ]

    for prompt, answer in zip(PROMPTS, answers(), strict=True):
        assert answer == greedy_choices(reference, prompt, answer)


def test_a_chat_over_several_turns_equals_answers_from_scratch(
    checkpoint_of: Callable[[str], tuple[Path, Any]],
) -> None:
    model = resolve(str(checkpoint_of("Llama")[0]))

    @in_virtual_time
    async def turns() -> None:
        async with swarm_of(model, spans=(Span(0, 4), Span(4, 6))) as client:
            chat = client.chat(max_new_tokens=9, ignore_eos=True)
            for question in ("Hi", "and now?", "so?"):
                messages = [*chat.messages, {"role": "user", "content": question}]
                kept = await chat.ask(question).result()
                fresh = await client.generate(messages, max_new_tokens=9, ignore_eos=True)
                assert kept.token_ids == fresh.token_ids
            await chat.close()

    turns()
