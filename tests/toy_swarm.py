"""A swarm in one process whose model is arithmetic: servers that speak the messages, and its two ends.

Hidden states have four channels: the token, how many blocks it went through, the sum of all tokens up to
it, and how many there are. A block refuses what its KV does not continue, so an answer proves that each
block saw each token once, in order. Pages are kept with the tokens that are in them: one found under the
wrong key makes a wrong answer.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import msgspec
import torch
from torch import Tensor

from swarm.client.facade import PAGE_SECRET, Swarm
from swarm.dht.announcement import Announcement, ModelEntry, Throughput
from swarm.dht.announcer import Announcer
from swarm.dht.memory import MemoryStore
from swarm.kernels.codecs import from_wire, to_wire
from swarm.net import messages
from swarm.net.calls import MessageStream
from swarm.net.identity import Identity
from swarm.net.memory import MemoryNetwork
from swarm.net.messages import Close, Closed, Open, Opened, Ping, Pong, Result, Step
from swarm.net.transport import PeerId, Stream, StreamClosed
from swarm.net.virtual_time import VirtualTimeLoop
from swarm.page_keys import KEY_BYTES, PAGE_TOKENS, page_keys, split_keys
from swarm.spans import Span

HIDDEN = 4
EOS = 256
NUM_BLOCKS = 6
EVERYBODY = ""
MODEL_ID = "toy-0123"

NextToken = Callable[[int, int], int]
"""The token after `count` tokens whose sum is `total`."""


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
        values = ids.float()
        return torch.stack([values, torch.zeros_like(values), values, torch.ones_like(values)], dim=1)

    def logits(self, hidden: Tensor) -> Tensor:
        scores = torch.zeros(len(hidden), 257)
        for row, (_, blocks, total, count) in enumerate(hidden.int().tolist()):
            assert blocks == NUM_BLOCKS, "each block must run each token once"
            scores[row, self.next_token(total, count)] = 10.0
        return scores

    def expected(self, prompt: Sequence[int], count: int) -> list[int]:
        """What a greedy answer of `count` tokens must be."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(self.next_token(sum(tokens), len(tokens)))
        return tokens[len(prompt) :]


@dataclass
class ToyServer:
    """Serves a span as told by its fields, and remembers what it was asked.

    `refuse` answers opens, `refuse_steps` the next steps, `spoil` changes what a step gives, `before_step`
    is awaited before each; `claims` is what it says it holds, whatever it does. A server of the last block
    that `tells` answers with that token where it is asked for one.
    """

    network: MemoryNetwork
    name: str
    span: Span
    dtype: messages.Dtype = "float32"
    codec: messages.Codec = "raw"
    max_step_tokens: int = 64
    takes_token_ids: bool = True
    claims: int | None = None
    tells: NextToken | None = None
    refuse: list[messages.Error] = field(default_factory=list)
    refuse_steps: list[messages.Error] = field(default_factory=list)
    spoil: Callable[[Tensor], Tensor] | None = None
    before_step: Callable[[int], Any] | None = None
    refused: list[Open] = field(default_factory=list)
    opened: list[Open] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    steps: list[tuple[int, int]] = field(default_factory=list)
    received: list[Step] = field(default_factory=list)
    pages: dict[tuple[str, Span, bytes], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.identity = Identity.from_seed(self.name)
        self.transport = self.network.transport(self.identity)

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

    async def on_stream(self, stream: Stream) -> None:
        calls = MessageStream(stream)
        session: ToySession | None = None
        while True:
            try:
                asked, body = await calls.receive()
            except StreamClosed:
                return
            match asked:
                case Ping():
                    await calls.send(Pong(nonce=asked.nonce))
                case Open():
                    if self.refuse:
                        self.refused.append(asked)
                        await calls.send(self.refuse.pop(0))
                        continue
                    self.opened.append(asked)
                    session = self._session(asked, calls.peer)
                    await calls.send(self._opened(asked, session))
                case Close():
                    self.closed.append(asked.session_id)
                    await calls.send(Closed(session_id=asked.session_id))
                case Step():
                    assert session is not None
                    await self._on_step(calls, asked, body, session)

    def _session(self, asked: Open, client: str) -> "ToySession":
        """A session that begins with the pages it names, of those that are kept for it."""
        span = Span(asked.start, asked.end)
        takes_ids = self.takes_token_ids and asked.start == 0
        session = ToySession(span, EVERYBODY if takes_ids else client, takes_ids)
        for key in split_keys(asked.page_keys):
            page = self.pages.get((session.owner, span, key))
            if page is None:
                break
            for block in span.blocks:
                session.kv[block] = torch.cat([session.kv[block], page])
            session.held += PAGE_TOKENS
        return session

    async def _on_step(
        self, calls: MessageStream, step: Step, body: memoryview, session: "ToySession"
    ) -> None:
        self.steps.append((step.seq_pos, step.shape[0]))
        self.received.append(step)
        if self.before_step is not None:
            await self.before_step(len(self.steps))
        if self.refuse_steps:
            await calls.send(self.refuse_steps.pop(0))
            return
        out = self._run(session.span, step.seq_pos, self._hidden(step, body, session), session.kv)
        if self.spoil is not None:
            out = self.spoil(out)
        else:
            self._keep(session, step)
        answer = Result(
            session_id=step.session_id,
            seq_pos=step.seq_pos,
            response_type=step.response_type,
            shape=tuple(out.shape),
            dtype=self.dtype,
            codec=self.codec,
            queue_ms=1.0,
            compute_ms=2.0,
        )
        if step.response_type == "token_ids":
            assert self.tells is not None, "tokens are asked of who said that it tells them"
            token = self.tells(int(out[-1, 2]), int(out[-1, 3]))
            answer = msgspec.structs.replace(answer, shape=(1,), dtype="uint32", codec="raw")
            await calls.send(answer, token.to_bytes(4, "little"))
            return
        await calls.send(answer, bytes(to_wire(out, self.dtype, self.codec)))

    def _hidden(self, step: Step, body: memoryview, session: "ToySession") -> Tensor:
        values = from_wire(body, step.shape, step.dtype, step.codec)
        if step.payload_type == "hidden_states":
            return values.float()
        assert session.takes_token_ids, "token ids are for who said that it takes them"
        return ToyEnds().embed(values)

    def _keep(self, session: "ToySession", step: Step) -> None:
        """Let the pages that `step` has filled be found: what a key names never changes."""
        filled = range(step.seq_pos // PAGE_TOKENS, (step.seq_pos + step.shape[0]) // PAGE_TOKENS)
        tokens = session.kv[session.span.start]
        keys = step.page_keys
        if step.payload_type == "token_ids":
            assert not keys, "the tokens tell"
            keys = page_keys(tokens.int().tolist())[filled.start * KEY_BYTES :]
        for index, key in zip(filled, split_keys(keys), strict=True):
            name = (session.owner, session.span, key)
            page = tokens[index * PAGE_TOKENS : (index + 1) * PAGE_TOKENS].clone()
            assert torch.equal(self.pages.setdefault(name, page), page), "a key names one page"

    def _run(self, span: Span, seq_pos: int, hidden: Tensor, kv: dict[int, Tensor]) -> Tensor:
        for block in span.blocks:
            held = kv[block]
            assert seq_pos <= len(held), "a step leaves a gap"
            assert (hidden[:, 1] == block).all(), "blocks run in order"
            tokens = kv[block] = torch.cat([held[:seq_pos], hidden[:, 0]])
            sums = tokens.cumsum(0)[seq_pos:]
            counts = torch.arange(seq_pos + 1, len(tokens) + 1).float()
            hidden = torch.stack([hidden[:, 0], hidden[:, 1] + 1, sums, counts], dim=1)
        return hidden

    def _opened(self, asked: Open, session: "ToySession") -> Opened:
        return Opened(
            session_id=asked.session_id,
            dtype=self.dtype,
            codec=self.codec,
            max_step_tokens=self.max_step_tokens,
            held=session.held if self.claims is None else self.claims,
            takes_token_ids=session.takes_token_ids,
            gives_token_ids=self.tells is not None,
        )


@dataclass
class ToySession:
    """What a server has of one session: for whom it keeps pages, and the tokens that each block saw."""

    span: Span
    owner: str
    takes_token_ids: bool
    held: int = 0
    kv: dict[int, Tensor] = field(default_factory=lambda: defaultdict(lambda: torch.zeros(0)))


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


@asynccontextmanager
async def toy_swarm(
    spans: dict[str, Span],
    *,
    next_token: NextToken = letters,
    context: int = 4096,
    timeout: float = 30.0,
    announced: Sequence[str] | None = None,
    **options: Any,
) -> AsyncIterator[Toy]:
    """Servers of `spans`, of which those in `announced` (default all) are announced, and a client."""
    loop = asyncio.get_running_loop()
    network = MemoryNetwork()
    store = MemoryStore(loop.now if isinstance(loop, VirtualTimeLoop) else time.time)
    servers = {name: ToyServer(network, name, span) for name, span in spans.items()}
    entry = ModelEntry(model_id=MODEL_ID, name="toy", num_blocks=NUM_BLOCKS, fingerprint="0123")

    announcers = {
        name: Announcer(store.another(), server.identity, entry, period=1000.0)
        for name, server in servers.items()
    }

    async def announce(name: str, **changes: Any) -> None:
        await announcers[name].publish(servers[name].announcement(**changes))

    for name, server in servers.items():
        await server.transport.listen(server.on_stream)
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
        swarm = Swarm(transport, store, model, ends, secret=secret, timeout=timeout, **options)
        await stack.enter_async_context(swarm)
        await swarm.directory.refresh()
        return swarm

    try:
        async with AsyncExitStack() as stack:
            yield Toy(network, servers, await join("client"), ends, announce, join)
    finally:
        for server in servers.values():
            await server.transport.close()
