"""The facade: a swarm and its model as a user of the library sees them, from async code.

Owns one client's access to a swarm: the directory, the choice of routes and which peers to avoid for a
while, and the compute thread. Must not know how the network came up; how an answer is made stands in
`generation`.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Protocol, Self, TypeAlias, TypeVar, Unpack

from swarm.client.conversation import Conversation
from swarm.client.faults import ConnectionLost, NoCapacity, RemoteFault
from swarm.client.generation import (
    Generation,
    TextEnds,
    TextStream,
    chat_prompt,
    raw_prompt,
)
from swarm.client.options import GenerationOptions, Options, generation_options
from swarm.client.peers import PeerReport
from swarm.client.route import Costs, NoRoute, Route, find_route
from swarm.client.session import Deadlines, Session
from swarm.dht.directory import Directory
from swarm.dht.store import RecordStore
from swarm.errors import SwarmError
from swarm.net.transport import PeerId, Transport, TransportError

T = TypeVar("T")

logger = logging.getLogger(__name__)

FAULT_AVOIDED = 10.0
BUSY_AVOIDED = 2.0
"""Seconds for which routes avoid a peer after a fault, and after it had no room and gave no time."""

ROUTE_PAUSE = 1.0
"""Seconds between two looks at why there is no route yet."""

RTT_PATIENCE = 1.5
"""Seconds that a new client waits at most for the round trips to its servers to be measured."""

CHAT_ROOM = 2048
"""Tokens a chat's first session is opened for, so that a few turns fit without opening another."""

UNBOUNDED_CONTEXT = 2**20

Message: TypeAlias = dict[str, str]
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
    def config(self) -> dict[str, Any]: ...


class Swarm:
    """One client in a swarm, for one model. An async context manager; `connect` makes it."""

    def __init__(
        self,
        transport: Transport,
        store: RecordStore,
        model: ServedModel,
        ends: TextEnds,
        *,
        timeout: float = 60.0,
        deadlines: Deadlines | None = None,
        on_waiting: OnWaiting = lambda reason: None,
        resources: AsyncExitStack | None = None,
    ):
        """`resources` are closed with this client, after it."""
        self.model = model
        self.timeout = timeout
        """Seconds that a route through all blocks is waited for."""
        self.directory = Directory(store, transport, model.model_id, model.num_blocks)
        self._transport = transport
        self._ends = ends
        self._deadlines = deadlines or Deadlines()
        self._on_waiting = on_waiting
        self._compute = ThreadPoolExecutor(1, thread_name_prefix="client-compute")
        self._avoided: dict[PeerId, tuple[float, str]] = {}
        self._failure: TransportError | None = None
        self._resources = resources or AsyncExitStack()
        self._is_started = False

    async def start(self) -> None:
        """Begin to watch the swarm; `close` must follow. Safe to call again."""
        if self._is_started:
            return
        self._is_started = True
        self._resources.callback(self._compute.shutdown, wait=False, cancel_futures=True)
        watch = asyncio.create_task(self._watch_network(), name="watch-network")
        self._resources.callback(watch.cancel)
        await self._resources.enter_async_context(self.directory)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Leave the swarm. Safe to call again."""
        await self._resources.aclose()

    async def generate(
        self, prompt: str | Sequence[Message], *, raw: bool = False, **options: Unpack[Options]
    ) -> Generation:
        """The whole answer to `prompt`: a text, or the messages of a chat. See `stream`."""
        return await self.stream(prompt, raw=raw, **options).result()

    def stream(
        self, prompt: str | Sequence[Message], *, raw: bool = False, **options: Unpack[Options]
    ) -> TextStream:
        """The answer as it is written. A text goes through the chat template; `raw` continues it as it is.

        Raises (also while it is iterated):
            InputError: an option or the prompt cannot be used.
            NoRoute: within `timeout` no route through all blocks came up.
            RemoteFault, NoCapacity, RequestRefused: a hop failed; see `swarm.client.faults`.
        """
        tokenizer = self._ends.tokenizer
        if raw and isinstance(prompt, str):
            tokens = raw_prompt(tokenizer, prompt)
        else:
            tokens = chat_prompt(tokenizer, as_messages(prompt))
        return self.stream_tokens(tokens, generation_options(options))

    def stream_tokens(
        self,
        tokens: Sequence[int],
        options: GenerationOptions,
        conversation: Conversation | None = None,
        on_end: Callable[[Generation], None] = lambda answer: None,
    ) -> TextStream:
        """The answer to a prompt given as token ids, within `conversation` or in one of its own."""
        return TextStream(
            conversation or self.conversation(),
            self._ends,
            self._compute,
            tokens,
            options,
            is_last=conversation is None,
            on_end=on_end,
            clock=self._transport.clock,
        )

    def conversation(self, room: int = 0) -> Conversation:
        """A new conversation whose sessions hold at least `room` tokens."""
        return Conversation(
            self._ends, self._compute, self.open_session, context=context_length(self.model), room=room
        )

    def chat(self, **options: Unpack[Options]) -> "Chat":
        """A chat that remembers its turns and keeps what the hops have computed of them."""
        return Chat(self, generation_options(options))

    def prompt_tokens(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of a chat up to where the model answers."""
        return chat_prompt(self._ends.tokenizer, messages)

    def route(self, tokens: int = 1) -> Route:
        """The fastest route now for a session of `tokens` tokens.

        Raises:
            NoRoute: some blocks have no server with room.
        """
        now = asyncio.get_running_loop().time()
        self._avoided = {peer: why for peer, why in self._avoided.items() if why[0] > now}
        return find_route(
            self.directory.announcements,
            self.model.num_blocks,
            costs=Costs(rtt=self.directory.rtt),
            model=self.model.name,
            tokens=tokens,
            excluded={peer: reason for peer, (_, reason) in self._avoided.items()},
        )

    async def wait_for_route(self, tokens: int = 1) -> Route:
        """`route`, waited for up to `timeout` seconds."""

        async def found() -> Route:
            return self.route(tokens)

        await self._until_routed(found)
        await self.directory.wait_for(self._knows_distances, RTT_PATIENCE)
        return self.route(tokens)

    async def open_session(self, max_tokens: int) -> Session:
        """A session of at most `max_tokens` along the fastest route whose peers take it.

        Raises:
            NoRoute, RemoteFault, NoCapacity: none could be opened within `timeout` seconds.
            TransportError: this client's own network has failed.
        """

        async def opened() -> Session:
            return await Session.open(
                self._transport,
                self.route(max_tokens),
                model_id=self.model.model_id,
                max_tokens=max_tokens,
                on_fault=self.judge,
                deadlines=self._deadlines,
            )

        return await self._until_routed(opened)

    def judge(self, fault: SwarmError) -> None:
        """Hear of a hop that failed, so that routes avoid it for a while.

        Raises:
            TransportError: it was not the peer's fault: this client's own network has failed.
        """
        if self._failure is not None:
            raise self._failure
        now = asyncio.get_running_loop().time()
        if isinstance(fault, RemoteFault) and not isinstance(fault, ConnectionLost):
            logger.info("avoiding peer %s: it %s", fault.hop.peer, fault.reason)
            self._avoided[fault.hop.peer] = (now + FAULT_AVOIDED, fault.reason)
        elif isinstance(fault, NoCapacity):
            until = now + (fault.retry_after or BUSY_AVOIDED)
            self._avoided[fault.hop.peer] = (until, fault.reason)

    def peers(self) -> list[PeerReport]:
        """Who serves what of this model, as this client sees it now."""
        return [
            PeerReport(announcement, self.model.name, self.directory.rtt(announcement.peer_id))
            for announcement in self.directory.announcements
        ]

    async def _until_routed(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Repeat `attempt` until it succeeds, other peers are asked, or the time is up."""
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
                pause = max(0.0, min(ROUTE_PAUSE, deadline - clock()))
                if not await self.directory.wait_for(self._may_route, pause):
                    self._on_waiting(reason)

    def _may_route(self) -> bool:
        try:
            self.route()
        except NoRoute:
            return False
        return True

    def _knows_distances(self) -> bool:
        serving = (server for server in self.directory.announcements if server.state == "serving")
        return all(self.directory.rtt(server.peer_id) is not None for server in serving)

    async def _watch_network(self) -> None:
        self._failure = await self._transport.wait_failed()
        logger.error("the network of this client has failed: %s", self._failure)


class Chat:
    """A conversation in turns. A turn that fails or is abandoned leaves the chat as it was before."""

    def __init__(self, swarm: Swarm, options: GenerationOptions):
        self.messages: list[Message] = []
        self._swarm = swarm
        self._options = options
        self._conversation = swarm.conversation(CHAT_ROOM)

    @property
    def session(self) -> Session | None:
        """The session that holds the conversation, None while there is none."""
        return self._conversation.session

    def ask(self, text: str) -> TextStream:
        """The answer to `text` and to all that was said before."""
        messages = [*self.messages, {"role": "user", "content": text}]

        def remember(answer: Generation) -> None:
            self.messages = [*messages, {"role": "assistant", "content": answer.text}]

        tokens = self._swarm.prompt_tokens(messages)
        return self._swarm.stream_tokens(tokens, self._options, self._conversation, on_end=remember)

    async def reset(self) -> None:
        """Forget everything; the next turn looks for a route again."""
        self.messages = []
        await self._conversation.close()

    async def close(self) -> None:
        await self._conversation.close()


def as_messages(prompt: str | Sequence[Message]) -> list[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def context_length(model: ServedModel) -> int:
    """The most tokens that `model` was made for."""
    config = model.config.get("text_config") or model.config
    return int(config.get("max_position_embeddings") or UNBOUNDED_CONTEXT)
