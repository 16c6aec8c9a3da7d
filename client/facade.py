"""The facade: a swarm and its model as a user of the library sees them, from async code.

Owns one client's access to a swarm: the directory, its routes, and the compute thread. Must not know how
the network came up; how an answer is made stands in `generation`.
"""

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self, TypeAlias, Unpack
from weakref import WeakSet

import torch
from torch import Tensor

from swarm.client.answer import TextEnds
from swarm.client.auditor import Auditor, Counts
from swarm.client.conversation import Conversation
from swarm.client.draft_model import DraftModel
from swarm.client.drafting import prompt_lookup
from swarm.client.evidence import Evidence, save
from swarm.client.faults import HopError, NoRoom
from swarm.client.gaps import gaps
from swarm.client.generation import (
    Generation,
    TextStream,
    chat_prompt,
    raw_prompt,
)
from swarm.client.hop_stream import Deadlines
from swarm.client.journal import JournalStore
from swarm.client.leg import Asked
from swarm.client.options import GenerationOptions, Options, SessionOptions, generation_options
from swarm.client.peers import PeerReport
from swarm.client.privacy import Privacy
from swarm.client.recovery import Environment
from swarm.client.route import Hop, NoRoute, Route
from swarm.client.routes import OnWaiting, Routes, ServedModel
from swarm.client.session import Session
from swarm.client.span_session import SpanSession
from swarm.dht.directory import Directory
from swarm.dht.store import RecordStore
from swarm.errors import InputError, SwarmError
from swarm.net.identity import Identity
from swarm.net.transport import Transport
from swarm.spans import Span

logger = logging.getLogger(__name__)

CHAT_ROOM = 2048
"""Tokens a chat's first session is opened for, so that a few turns fit without opening another."""

UNBOUNDED_CONTEXT = 2**20

PAGE_SECRET = "page keys"
"""The purpose of the secret of a client's identity by which hops find its pages again."""

Message: TypeAlias = dict[str, str]


class Swarm:
    """One client in a swarm, for one model. An async context manager; `connect` makes it."""

    def __init__(
        self,
        transport: Transport,
        store: RecordStore,
        model: ServedModel,
        ends: TextEnds,
        *,
        secret: bytes | None = None,
        identity: Identity | None = None,
        is_private: bool = False,
        timeout: float = 60.0,
        deadlines: Deadlines | None = None,
        sessions: SessionOptions | None = None,
        draft_model: DraftModel | None = None,
        on_waiting: OnWaiting = lambda reason: None,
        resources: AsyncExitStack | None = None,
    ):
        """`timeout` is the seconds a route is waited for; `resources` are closed with this client, after it.

        Tokens are drafted by `draft_model`, or without one from what was said before.

        By `secret`, 64 bytes at most, hops find again what they kept of this client's sequences; without it
        they find only what this object has left. Evidence of wrong results is signed by `identity`. In a
        swarm that `is_private` nothing is audited unless `sessions` say so.

        Raises:
            InputError: no peer may run anything of this model, by the share that `sessions` allow.
        """
        self.model = model
        self.directory = Directory(store, transport, model.model_id, model.num_blocks)
        self._transport = transport
        self._ends = ends
        self._drafter = draft_model.drafter if draft_model is not None else prompt_lookup
        sessions = sessions or SessionOptions()
        self._routes = Routes(
            self.directory,
            transport,
            model,
            timeout=timeout,
            privacy=Privacy.of(sessions),
            on_waiting=on_waiting,
        )
        self._wire = sessions.wire
        deadlines = deadlines or Deadlines()
        self._sessions: WeakSet[Session] = WeakSet()
        self._evidence = Path(sessions.evidence_folder).expanduser() if sessions.evidence_folder else None
        self._auditor = None
        if (rate := sessions.audited(is_private=is_private)) > 0:
            self._auditor = Auditor(
                transport,
                self._routes,
                self._embed,
                self._gaps,
                deadlines,
                rate=rate,
                identity=identity,
                on_caught=self._on_caught,
            )
        self._environment = Environment(
            transport,
            self._routes,
            JournalStore(sessions.journal_memory, sessions.journal_disk),
            secrets.token_bytes(32) if secret is None else secret,
            deadlines,
            embed=self._embed,
            likeliest=self._likeliest,
            pushes=sessions.push,
            auditor=self._auditor,
            standbys=sessions.standby,
        )
        self._compute = ThreadPoolExecutor(1, thread_name_prefix="client-compute")
        self._resources = resources or AsyncExitStack()
        self._is_started = False

    async def start(self) -> None:
        """Begin to watch the swarm; `close` must follow. Safe to call again."""
        if self._is_started:
            return
        self._is_started = True
        self._resources.callback(self._compute.shutdown, wait=False, cancel_futures=True)
        self._resources.callback(self._environment.store.close)
        if self._auditor is not None:
            self._resources.push_async_callback(self._auditor.close)
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

    @property
    def ends(self) -> TextEnds:
        """The two ends of the model, with its tokenizer."""
        return self._ends

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
        *,
        patience: float | None = None,
    ) -> TextStream:
        """The answer to a prompt given as token ids, within `conversation` or in one of its own.

        For that a session is waited for up to `patience` seconds, if that is given in place of `timeout`.
        """
        return TextStream(
            conversation or self.conversation(patience=patience),
            self._ends,
            self._compute,
            tokens,
            options,
            drafter=self._drafter,
            is_last=conversation is None,
            on_end=on_end,
            clock=self._transport.clock,
        )

    def conversation(self, room: int = 0, *, patience: float | None = None) -> Conversation:
        """A new conversation whose sessions hold at least `room` tokens, opened with `patience`."""
        return Conversation(
            self._ends,
            self._compute,
            partial(self.open_session, patience=patience),
            is_outdone=self._is_outdone,
            context=context_length(self.model),
            room=room,
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
        return self._routes.find(tokens)

    async def wait_for_route(self, tokens: int = 1) -> Route:
        """`route`, waited for up to `timeout` seconds."""
        return await self._routes.wait(tokens)

    async def open_session(
        self, tokens: Sequence[int], *, needed: int, wished: int = 0, patience: float | None = None
    ) -> Session:
        """A session along the fastest route whose peers take it, for a sequence that begins with `tokens`.

        It holds at most `wished` tokens, or where there is no room for so many `needed` ones.

        Raises:
            NoRoute, RemoteFault, NoCapacity: none could be opened within `patience` seconds, or `timeout`.
            TransportError: this client's own network has failed.
        """

        async def opened() -> Session:
            if wished > needed:
                try:
                    return await self._open_session(tokens, wished, is_wish=True)
                except (NoRoute, NoRoom) as reason:
                    logger.debug("no session of %d tokens: %s", wished, reason)
            return await self._open_session(tokens, needed)

        return await self._routes.until_routed(opened, needed, patience)

    async def open_span_session(self, span: Span, max_tokens: int) -> SpanSession:
        """A session on the blocks of `span` for at most `max_tokens` tokens, given as hidden states.

        Raises:
            InputError: the model has no such blocks, or takes fewer tokens.
            NoRoute, RemoteFault, NoCapacity: none could be opened within `timeout` seconds.
            TransportError: this client's own network has failed.
        """
        whole, context = Span(0, self.model.num_blocks), context_length(self.model)
        if not (span.size > 0 and whole.covers(span)):
            raise InputError(f"{self.model.name} has no blocks {span}.", f"Choose within {whole}.")
        if not 0 < max_tokens <= context:
            raise InputError(
                f"No session can hold {max_tokens} tokens.", f"{self.model.name} takes 1 to {context}."
            )

        async def opened() -> Session:
            return await self._open_session(None, max_tokens, span)

        return SpanSession(await self._routes.until_routed(opened, max_tokens, span=span))

    def _is_outdone(self, session: Session, prompt_tokens: int, new_tokens: int) -> bool:
        """Whether a turn is clearly better off in a session on another route."""
        better = self._routes.better(session.route, self._routes.demand(prompt_tokens, new_tokens))
        if better is not None:
            logger.info("a session moves from %s to %s", session.route, better)
        return better is not None

    async def _open_session(
        self,
        tokens: Sequence[int] | None,
        max_tokens: int,
        span: Span | None = None,
        *,
        is_wish: bool = False,
    ) -> Session:
        """One attempt. That a mere wish found no room says nothing against a peer."""
        model = self.model
        known = None if tokens is None else tuple(tokens)
        asked = Asked(model.model_id, model.hidden_size, model.vocab_size, max_tokens, known, self._wire)
        prompt_tokens = len(known or ())
        demand = self._routes.demand(prompt_tokens, max_tokens - prompt_tokens)
        try:
            route = self._routes.find(max_tokens, demand, span)
            session = await Session.open(self._environment, route, asked)
            self._sessions.add(session)
            return session
        except HopError as fault:
            if not (is_wish and isinstance(fault, NoRoom)):
                self._routes.judge_opening(fault)
            raise

    async def _embed(self, tokens: Sequence[int]) -> Tensor:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._compute, self._ends.embed, torch.tensor(tokens))

    async def _likeliest(self, hidden: Tensor) -> list[int]:
        def choose() -> list[int]:
            return [int(self._ends.logits(row)[-1].argmax()) for row in hidden.split(1)]

        return await asyncio.get_running_loop().run_in_executor(self._compute, choose)

    async def _gaps(self, hidden: Tensor, tokens: Sequence[int]) -> list[float]:
        def measure() -> list[float]:
            return gaps(self._ends.logits(hidden), tokens)

        return await asyncio.get_running_loop().run_in_executor(self._compute, measure)

    def _on_caught(self, hop: Hop, evidence: Evidence | None) -> None:
        """Have others in the hop's place wherever it is, and keep the evidence."""
        for session in list(self._sessions):
            session.distrust(hop.peer)
        if evidence is None or self._evidence is None:
            return
        try:
            path = save(evidence, self._evidence)
        except OSError as error:
            logger.warning("the evidence against peer %s cannot be written: %s", hop.peer, error)
        else:
            logger.warning("the evidence against peer %s is in %s", hop.peer, path)

    @property
    def audits(self) -> Counts:
        """How the audits so far have ended."""
        return self._auditor.counts if self._auditor is not None else Counts()

    async def settle_audits(self, timeout: float | None = None) -> None:
        """Return once no audit waits any more, or after so many seconds."""
        if self._auditor is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._auditor.settle()

    def peers(self) -> list[PeerReport]:
        """Who serves what of this model, as this client sees it now."""
        return [
            PeerReport(announcement, self.model.name, self.directory.rtt(announcement.peer_id))
            for announcement in self.directory.announcements
        ]

    async def wait_failed(self) -> SwarmError:
        """Wait until this client's own network fails; what it failed of."""
        return await self._transport.wait_failed()

    async def _watch_network(self) -> None:
        self._routes.failure = await self._transport.wait_failed()
        logger.error("the network of this client has failed: %s", self._routes.failure)


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
