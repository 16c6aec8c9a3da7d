"""A swarm in one process whose model is arithmetic: real servers over toy engines, and the model's two ends.

See `toy_engine` for what hidden states say. Pages are kept with the tokens that are in them: one found under
the wrong key makes a wrong answer.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any, TypeAlias

import msgspec
import torch
from torch import Tensor

from swarm.client.facade import PAGE_SECRET, Swarm
from swarm.client.options import SamplingOptions
from swarm.client.sampling import Sampler
from swarm.dht.announcement import Announcement, ModelEntry, Throughput
from swarm.dht.announcer import Announcer
from swarm.dht.memory import MemoryStore
from swarm.net import messages
from swarm.net.identity import Identity
from swarm.net.memory import MemoryNetwork
from swarm.net.messages import AnyMessage, Close, Feed, Open, Opened, Step
from swarm.net.transport import MAX_BODY_BYTES, Buffer, FrameError, PeerId, Stream, Takes, Transport
from swarm.net.virtual_time import VirtualTimeLoop
from swarm.server.cell import OnProgress, ShardCell
from swarm.server.metrics import Metrics
from swarm.server.sessions import Sessions
from swarm.spans import Span
from tests.toy_engine import HIDDEN, NUM_BLOCKS, NextToken, Script, ToyEngine, embedded, logits_of

EOS = 256
MODEL_ID = "toy-0123"

GREEDY = SamplingOptions()

Wrap: TypeAlias = Callable[[Transport], Transport]
"""Puts something between a peer and its network."""

identity_of = cache(Identity.from_seed)


@cache
def metrics() -> Metrics:
    """Those of all toy servers together: making them takes longer than all else that a server needs."""

    async def load(on_progress: OnProgress) -> ToyEngine:
        raise AssertionError("this cell stays empty")

    return Metrics(ShardCell(Span(0, 1), load))


def letters(total: int, count: int) -> int:
    return 97 + (7 * total + count) % 26


def scripted(prompt_tokens: int, text: bytes) -> NextToken:
    """Answers a prompt of that length with `text`, then ends."""

    def token(total: int, count: int) -> int:
        at = count - prompt_tokens
        return text[at] if at < len(text) else EOS

    return token


class ToyTokenizer:
    """Bytes are tokens; 256 ends a text."""

    chat_template: str | None = "toy"
    eos_token_id = EOS

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        return SimpleNamespace(input_ids=list(text.encode()))

    def decode(self, token_ids: list[int], **_: bool) -> str:
        return bytes(token for token in token_ids if token < 256).decode(errors="replace")

    def apply_chat_template(self, messages: list[dict[str, str]], **_: bool) -> str:
        return "".join(f"{message['role'][0]}:{message['content']}\n" for message in messages) + "a:"


@dataclass
class ToyEnds:
    """Embeds a token as [token, 0, token, 1]; the head reads totals and asks `next_token`."""

    next_token: NextToken = letters
    tokenizer: ToyTokenizer = field(default_factory=ToyTokenizer)
    generation_config: Any = field(default_factory=lambda: SimpleNamespace(eos_token_id=[EOS]))

    def embed(self, ids: Tensor) -> Tensor:
        return torch.from_numpy(embedded(ids.numpy()))

    def logits(self, hidden: Tensor) -> Tensor:
        assert (hidden[:, 1] == NUM_BLOCKS).all(), "each block must run each token once"
        totals = hidden[:, 2:].int().tolist()
        return torch.stack([logits_of(self.next_token(*total)) for total in totals])

    def expected(self, prompt: Sequence[int], count: int, options: SamplingOptions = GREEDY) -> list[int]:
        """What an answer of `count` tokens must be."""
        tokens, sampler = list(prompt), Sampler(options, first=len(prompt))
        for _ in range(count):
            logits = logits_of(self.next_token(sum(tokens), len(tokens)))
            tokens.append(sampler.choose(tokens, logits))
        return tokens[len(prompt) :]


@dataclass
class ToyServer(Script):
    """Serves a span with a toy engine, as told by its fields, and remembers what it was asked.

    `refuse` answers opens, `claims` is what it says it holds, whatever it does; `lie` changes what it says.
    What the engine does and remembers are the fields of `Script`. The access that `wrap` gives to the network
    is the one it uses. `fed` changes what other servers bring it, as if those told their clients otherwise.
    """

    network: MemoryNetwork
    name: str
    span: Span
    wrap: Wrap = lambda transport: transport
    claims: int | None = None
    lie: Callable[[AnyMessage], AnyMessage] | None = None
    fed: Callable[[memoryview], bytes] | None = None
    refuse: list[messages.Error] = field(default_factory=list)
    refused: list[Open] = field(default_factory=list)
    opened: list[Open] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    received: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.identity = identity_of(self.name)
        self.is_up = False
        self.leaving: asyncio.Task[None] | None = None
        self._join()

    @property
    def peer(self) -> PeerId:
        return self.identity.peer

    @property
    def tokens_stepped(self) -> int:
        return sum(tokens for _, tokens in self.steps)

    def announcement(self, **changes: Any) -> Announcement:
        fields: dict[str, Any] = {
            "peer": self.peer,
            "model_id": MODEL_ID,
            "start": self.span.start,
            "end": self.span.end,
            "state": "serving",
            "progress": 1.0,
            "throughput": Throughput(decode=100.0),
            "kv_tokens_left": 10_000,
            "name": self.name,
            **changes,
        }
        return Announcement(**fields)

    async def start(self) -> None:
        """Begin to serve."""
        await self.cell.fill()
        await self.transport.listen(self.on_stream)
        self.is_up = True

    def kill(self) -> None:
        """End as in a crash: whatever it held is gone."""
        self.is_up = False
        self.network.kill(self.identity)
        self.pages.clear()

    async def revive(self) -> None:
        """Begin anew, with nothing, after it was killed or has left."""
        await self.transport.close()
        self._join()
        await self.start()

    async def leave(self, grace: float = 30.0, patience: float = 4.0) -> None:
        """Leave as a server does that is asked to, unless it dies meanwhile."""
        self.cell.move("draining")
        await self.sessions.drain(grace, patience)
        if self.is_up:
            self.is_up = False
            self.cell.move("left")
            await self.transport.close()

    def leave_meanwhile(self) -> None:
        """`leave` in a task that ends with the swarm."""
        self.leaving = asyncio.create_task(self.leave(), name=f"{self.name} leaves")

    async def close(self) -> None:
        if self.leaving is not None:
            self.leaving.cancel()
            await asyncio.gather(self.leaving, return_exceptions=True)
        await self.transport.close()

    async def on_stream(self, stream: Stream) -> None:
        await self.sessions.on_stream(Tapped(stream, self))

    def hears(self, message: AnyMessage) -> AnyMessage | None:
        """Note what is asked; the answer where the test gives it in the server's place."""
        match message:
            case Open() if self.refuse:
                self.refused.append(message)
                return self.refuse.pop(0)
            case Open():
                self.opened.append(message)
            case Close():
                self.closed.append(message.session_id)
            case Step():
                self.received.append(message)
        return None

    def says(self, message: AnyMessage) -> AnyMessage:
        """What goes out in place of what the server says."""
        if self.lie is not None:
            return self.lie(message)
        if isinstance(message, Opened) and self.claims is not None:
            return msgspec.structs.replace(message, held=self.claims)
        if isinstance(message, messages.Error) and message.number is not None and self.refused_with:
            error, self.refused_with = self.refused_with, None
            return msgspec.structs.replace(error, number=message.number)
        return message

    def _join(self) -> None:
        """Make what a process has that starts now."""
        self.memory = self.network.transport(self.identity)
        self.transport = self.wrap(self.memory)
        self.engine = engine = ToyEngine(self.span, self)

        async def load(on_progress: OnProgress) -> ToyEngine:
            return engine

        self.cell = ShardCell(self.span, load)
        self.sessions = Sessions(
            MODEL_ID, HIDDEN, self.cell, self.transport, metrics=metrics(), identity=self.identity
        )


class Tapped:
    """A server's end of a stream, at which its test listens in. Implements `Stream`."""

    def __init__(self, stream: Stream, server: ToyServer):
        self.peer = stream.peer
        self._stream = stream
        self._server = server
        self._is_feed = False

    def offer(self, header: Buffer, body: Buffer = b"") -> bool:
        return False  # what is said can be told only in `send`

    async def send(self, header: Buffer, body: Buffer = b"") -> None:
        await self._stream.send(messages.encode(self._server.says(messages.decode(bytes(header)))), body)

    async def receive(
        self, max_body: int = MAX_BODY_BYTES, takes: Takes | None = None
    ) -> tuple[bytes, memoryview]:
        while True:
            header, body = await self._receive(max_body)
            if takes is None or not takes(header, body):
                return header, body

    async def _receive(self, max_body: int) -> tuple[bytes, memoryview]:
        while True:
            header, body = await self._stream.receive(max_body)
            with suppress(FrameError):
                message = messages.decode(header)
                self._is_feed = self._is_feed or isinstance(message, Feed)
                if self._is_feed and self._server.fed is not None and isinstance(message, Step):
                    body = memoryview(self._server.fed(body))
                answer = self._server.hears(message)
                if answer is not None:
                    await self._stream.send(messages.encode(answer))
                    continue
            return header, body

    def close(self) -> None:
        self._stream.close()


@dataclass
class Toy:
    """A running toy swarm: its network, its servers by name, and one client; `join` makes another."""

    network: MemoryNetwork
    servers: dict[str, ToyServer]
    swarm: Swarm
    ends: ToyEnds
    announce: Callable[..., Any]
    join: Callable[[str], Awaitable[Swarm]]

    def __getitem__(self, name: str) -> ToyServer:
        return self.servers[name]

    @property
    def sessions(self) -> dict[str, list[str]]:
        """The sessions that servers have in their engines, by the servers' names."""
        return {name: list(server.engine.sessions) for name, server in self.servers.items()}


@asynccontextmanager
async def toy_swarm(
    spans: dict[str, Span],
    *,
    next_token: NextToken = letters,
    context: int = 4096,
    timeout: float = 30.0,
    announced: Sequence[str] | None = None,
    wrap: Wrap = lambda transport: transport,
    **options: Any,
) -> AsyncIterator[Toy]:
    """Servers of `spans`, of which those in `announced` (default all) are announced, and a client.

    What a server was brought that did not fit what it holds fails the test at the end.
    """
    loop = asyncio.get_running_loop()
    network = MemoryNetwork()
    store = MemoryStore(loop.now if isinstance(loop, VirtualTimeLoop) else time.time)
    servers = {name: ToyServer(network, name, span, wrap) for name, span in spans.items()}
    entry = ModelEntry(model_id=MODEL_ID, name="toy", num_blocks=NUM_BLOCKS, fingerprint="0123")

    announcers = {
        name: Announcer(store.another(), server.identity, entry, period=1000.0)
        for name, server in servers.items()
    }

    async def announce(name: str, **changes: Any) -> None:
        await announcers[name].publish(servers[name].announcement(**changes))

    for name, server in servers.items():
        await server.start()
        if announced is None or name in announced:
            await announce(name)
    ends = ToyEnds(next_token)
    model = SimpleNamespace(
        name="toy",
        model_id=MODEL_ID,
        num_blocks=NUM_BLOCKS,
        hidden_size=HIDDEN,
        vocab_size=EOS + 1,
        config={"max_position_embeddings": context},
    )

    async def join(client: str) -> Swarm:
        transport = await stack.enter_async_context(network.transport(client))
        secret = transport.identity.secret(PAGE_SECRET)
        swarm = Swarm(wrap(transport), store, model, ends, secret=secret, timeout=timeout, **options)
        await stack.enter_async_context(swarm)
        await swarm.directory.refresh()
        return swarm

    try:
        async with AsyncExitStack() as stack:
            yield Toy(network, servers, await join("client"), ends, announce, join)
    finally:
        for server in servers.values():
            await server.close()
    for server in servers.values():
        assert not server.complaints, f"{server.name}: {server.complaints}"
