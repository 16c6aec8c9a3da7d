"""Who visits the servers of a long run: guests, who ask and check every token, and an intruder, who does not
behave. Each acts at random, of its own seed; what happens is tallied.
"""

import asyncio
import itertools
import os
import random
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from benchmarks.passages import FAMILY, Passage, Question
from swarm.client.conversation import Conversation
from swarm.client.facade import Swarm
from swarm.client.options import GenerationOptions
from swarm.dht.announcement import Announcement
from swarm.errors import SwarmError
from swarm.kernels.codecs import to_wire
from swarm.net.calls import MessageStream, Refused
from swarm.net.identity import Identity
from swarm.net.libp2p import Libp2pTransport
from swarm.net.messages import Close, Open, Opened, Step
from swarm.page_keys import KEY_BYTES, PAGE_TOKENS

ROOM = 320
"""Tokens of a session that lasts for a whole conversation: the longest passages fit."""

WAIT = 30.0
"""Seconds that the intruder waits for an answer at most."""

Act = Callable[[], Awaitable[None]]


@dataclass
class Tally:
    """What happened so far, and the first sentences about what should not have."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def fault(self, kind: str, sentence: str) -> None:
        self.counts[kind] += 1
        if len(self.faults) < 20:
            self.faults.append(sentence)

    def answer(self, question: Question, given: Sequence[int]) -> None:
        """Compare an answer, which may have been stopped early."""
        self.counts["answers"] += 1
        self.counts["tokens"] += len(given)
        if tuple(given) != question.expected[: len(given)]:
            wrong = next(at for at, token in enumerate(given) if token != question.expected[at])
            self.fault(
                "wrong answers", f"Token {wrong} after a prompt of {len(question.prompt)} tokens is wrong."
            )


class Guest:
    """A client whose every answer must be right, however it comes and goes."""

    def __init__(self, name: str, client: Swarm, passages: Sequence[Passage], tally: Tally, seed: str):
        self._name = name
        self._client = client
        self._passages = passages
        self._tally = tally
        self._rng = random.Random(f"{seed} {name}")

    async def act(self) -> None:
        """Do one thing, and be done with it when this returns."""
        acts: list[Act] = [self._ask_once, self._converse, self._leave, self._stop_early]
        act = self._rng.choices(acts, weights=(4, 3, 2, 1))[0]
        self._tally.counts[act.__name__.strip("_").replace("_", " ")] += 1
        try:
            await act()
        except SwarmError as error:
            self._tally.fault("failed answers", f"{self._name}: {error}")

    def _question(self) -> Question:
        return self._rng.choice(self._passages).question(self._rng)

    def _questions(self) -> list[Question]:
        """Some that begin alike, as a rule."""
        family = FAMILY * self._rng.randrange(-(-len(self._passages) // FAMILY))
        alike = self._passages[family : family + FAMILY]
        count = self._rng.randint(2, 5)
        return [self._rng.choice(alike).question(self._rng) for _ in range(count - 1)] + [self._question()]

    async def _ask_once(self) -> None:
        await self._ask(self._question())

    async def _converse(self) -> None:
        """Some questions in one conversation: each rolls the session back to where the last one differs."""
        conversation = self._client.conversation(room=self._rng.choice((0, ROOM, ROOM)))
        try:
            for question in self._questions():
                await self._ask(question, conversation)
                await asyncio.sleep(self._rng.choice((0, 0, 0.5)))
        finally:
            if conversation.session and self._rng.random() < 0.3:
                conversation.session.abort()
            await conversation.close()

    async def _leave(self) -> None:
        """Give an answer up at any moment, in the middle of a step more often than not."""
        asking = asyncio.create_task(self._ask_once(), name=f"{self._name} asks and leaves")
        try:
            await asyncio.wait({asking}, timeout=self._rng.uniform(0.02, 2.0))
        finally:
            asking.cancel()
        with suppress(asyncio.CancelledError):
            await asking

    async def _stop_early(self) -> None:
        question = self._question()
        stream = self._client.stream_tokens(question.prompt, _options(question))
        wanted = self._rng.randint(1, len(question.expected))
        seen = 0
        async for _ in stream:
            seen += 1
            if seen == wanted:
                stream.stop()
        assert stream.generation is not None
        self._tally.answer(question, stream.generation.token_ids)

    async def _ask(self, question: Question, conversation: Conversation | None = None) -> None:
        stream = self._client.stream_tokens(question.prompt, _options(question), conversation)
        answer = await stream.result()
        self._tally.counts["cached tokens"] += answer.cached_tokens
        self._tally.answer(question, answer.token_ids)


def _options(question: Question) -> GenerationOptions:
    return GenerationOptions(max_new_tokens=len(question.expected), ignore_eos=True)


class Intruder:
    """A peer that speaks the protocol by hand: too much, at wrong places, and leaves without a word."""

    def __init__(
        self,
        addresses: Sequence[str],
        hidden_size: int,
        kv_tokens: int,
        servers: Callable[[], Sequence[Announcement]],
        tally: Tally,
        seed: str,
    ):
        """`servers` gives who serves now; each of them has room for `kv_tokens` tokens in all."""
        self._addresses = addresses
        self._hidden_size = hidden_size
        self._kv_tokens = kv_tokens
        self._servers = servers
        self._tally = tally
        self._rng = random.Random(f"{seed} intruder")
        self._numbers = itertools.count(1)

    async def act(self) -> None:
        """Do one thing as a peer nobody has seen before, and be gone when this returns."""
        acts: list[Act] = [self._ask_too_much, self._crowd, self._scribble, self._vanish, self._babble]
        act = self._rng.choice(acts)
        self._tally.counts[f"intruder: {act.__name__.strip('_').replace('_', ' ')}"] += 1
        self._transport = await Libp2pTransport.start(
            Identity.generate(), initial_peers=self._addresses, host_maddrs=(), routes_for_others=False
        )
        try:
            await act()
        except SwarmError as error:
            if isinstance(error, Refused) and error.error.code == "no_capacity":
                self._tally.counts["intruder: found no room"] += 1
            else:
                self._tally.fault("intruder: failed", f"intruder, {act.__name__}: {error}")
        finally:
            await self._transport.close()

    async def _ask_too_much(self) -> None:
        """Requests that break the rules, each of which must be refused with its code."""
        calls, server = await self._reach()
        await self._refused(calls, self._asked(server, self._kv_tokens + PAGE_TOKENS), "no_capacity")
        asked = self._asked(server, PAGE_TOKENS)
        opened = await self._opened(calls, asked)
        await self._refused(calls, self._asked(server, PAGE_TOKENS), "bad_request")
        await self._refused(calls, self._step(self._asked(server, 1), 0, 1, opened), "unknown_session")
        await self._refused(calls, self._step(asked, 1, 1, opened), "bad_request")
        await self._refused(calls, self._step(asked, 0, 1, opened, width=3), "bad_request")
        step, body = self._step(asked, 0, 1, opened)
        await calls.call(step, body, timeout=WAIT, max_body=len(body))
        await self._refused(calls, self._step(asked, 1, PAGE_TOKENS, opened), "bad_request")

    async def _crowd(self) -> None:
        """Take all the room there is, and hold it for a moment."""
        server = self._server()
        room, opened = self._kv_tokens, 0
        while room >= PAGE_TOKENS:
            calls, _ = await self._reach(server)
            try:
                await self._opened(calls, self._asked(server, room))
                opened += 1
            except Refused as refused:
                if refused.error.code != "no_capacity":
                    raise
                room //= 2
        self._tally.counts["sessions that crowded"] += opened
        await asyncio.sleep(self._rng.uniform(0.5, 3.0))

    async def _scribble(self) -> None:
        """Steps of noise at all positions, under names of pages made up."""
        calls, server = await self._reach()
        asked = self._asked(server, self._rng.randint(1, 6) * PAGE_TOKENS)
        opened, length = await self._opened(calls, asked), 0
        for _ in range(self._rng.randint(1, 12)):
            seq_pos = self._rng.randint(0, length)
            tokens = self._rng.randint(1, asked.max_tokens - seq_pos) if seq_pos < asked.max_tokens else 0
            if tokens:
                step, body = self._step(asked, seq_pos, tokens, opened)
                await calls.call(step, body, timeout=WAIT, max_body=len(body))
                length = seq_pos + tokens
        if self._rng.random() < 0.5:
            await calls.call(Close(session_id=asked.session_id), timeout=WAIT)

    async def _vanish(self) -> None:
        """Be gone while a step runs: by closing the stream, or by ending the whole peer."""
        calls, server = await self._reach()
        asked = self._asked(server, self._rng.randint(1, 8) * PAGE_TOKENS)
        opened = await self._opened(calls, asked)
        step, body = self._step(asked, 0, self._rng.randint(1, asked.max_tokens), opened)
        await calls.send(step, body)
        await asyncio.sleep(self._rng.choice((0.0, 0.0, 0.02, 0.2)))
        if self._rng.random() < 0.5:
            calls.close()

    async def _babble(self) -> None:
        """Frames that are no messages, before and within a session."""
        server = self._server()
        stream = await self._transport.open_stream(server.peer_id, server.addresses)
        if self._rng.random() < 0.5:
            await self._opened(MessageStream(stream), self._asked(server, PAGE_TOKENS))
        with suppress(SwarmError):
            await stream.send(os.urandom(self._rng.randint(1, 200)), os.urandom(self._rng.randint(0, 200)))
            async with asyncio.timeout(WAIT):
                while True:
                    await stream.receive()

    def _server(self) -> Announcement:
        return self._rng.choice(sorted(self._servers(), key=lambda server: server.start))

    async def _reach(self, server: Announcement | None = None) -> tuple[MessageStream, Announcement]:
        server = server or self._server()
        return MessageStream(await self._transport.open_stream(server.peer_id, server.addresses)), server

    def _asked(self, server: Announcement, max_tokens: int) -> Open:
        return Open(
            session_id=secrets.token_hex(16),
            model_id=server.model_id,
            start=server.start,
            end=server.end,
            max_tokens=max_tokens,
        )

    def _step(
        self, asked: Open, seq_pos: int, tokens: int, opened: Opened, width: int | None = None
    ) -> tuple[Step, bytes]:
        """Noise for `tokens` positions from `seq_pos` on, naming the pages that it fills."""
        hidden = torch.randn(tokens, width or self._hidden_size)
        pages = (seq_pos + tokens) // PAGE_TOKENS - seq_pos // PAGE_TOKENS
        step = Step(
            session_id=asked.session_id,
            number=next(self._numbers),
            seq_pos=seq_pos,
            payload_type="hidden_states",
            response_type="hidden_states",
            shape=tuple(hidden.shape),
            dtype=opened.dtype,
            codec=opened.codec,
            page_keys=os.urandom(KEY_BYTES * pages),
        )
        return step, bytes(to_wire(hidden, opened.dtype, opened.codec))

    async def _opened(self, calls: MessageStream, asked: Open) -> Opened:
        answer, _ = await calls.call(asked, timeout=WAIT)
        assert isinstance(answer, Opened)
        return answer

    async def _refused(self, calls: MessageStream, what: Open | tuple[Step, bytes], code: str) -> None:
        message, body = what if isinstance(what, tuple) else (what, b"")
        given = "a result"
        try:
            await calls.call(message, body, timeout=WAIT, max_body=2**24)
        except Refused as refused:
            given = refused.error.code
        self._tally.counts["refusals checked"] += 1
        if given != code:
            self._tally.fault("wrong refusals", f"A request was answered with {given} instead of {code}.")
