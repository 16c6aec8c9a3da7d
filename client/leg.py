"""One session's stream to one hop: its opening, its steps, its end, and where their time went.

Owns what was agreed on with the hop, and checks whatever it answers. Must not know of the other hops, nor
why a step is made.
"""

import asyncio
import secrets
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from swarm.client.faults import NoCapacity, RemoteFault, blaming
from swarm.client.page_chain import PageChain
from swarm.client.route import Hop
from swarm.errors import SwarmError
from swarm.kernels.codecs import from_wire, is_finite, to_wire
from swarm.net.calls import MessageStream
from swarm.net.messages import (
    AnyMessage,
    Close,
    Codec,
    Dtype,
    Open,
    Opened,
    ResponseType,
    Result,
    Step,
    body_bytes,
)
from swarm.net.transport import Transport
from swarm.page_keys import KEY_BYTES, PAGE_TOKENS


@dataclass(frozen=True)
class Deadlines:
    """Seconds granted to a hop: for its answer to `Open`, to a step (and more for each token), to `Close`."""

    open: float = 15.0
    step: float = 30.0
    step_token: float = 0.1
    close: float = 1.0

    def for_step(self, tokens: int) -> float:
        return self.step + self.step_token * tokens


@dataclass
class HopTimes:
    """Milliseconds a hop took, summed over steps: on the network, in its queue, computing."""

    steps: int = 0
    rtt_ms: float = 0.0
    queue_ms: float = 0.0
    compute_ms: float = 0.0

    def add(self, elapsed_ms: float, result: Result) -> None:
        self.steps += 1
        self.rtt_ms += max(0.0, elapsed_ms - result.queue_ms - result.compute_ms)
        self.queue_ms += result.queue_ms
        self.compute_ms += result.compute_ms

    def mean(self) -> "HopTimes":
        steps = max(self.steps, 1)
        return HopTimes(self.steps, self.rtt_ms / steps, self.queue_ms / steps, self.compute_ms / steps)


@dataclass(frozen=True, slots=True)
class Asked:
    """What a session asks of every hop at its opening: room for `max_tokens`, and what it begins with."""

    model_id: str
    hidden_size: int
    vocab_size: int
    max_tokens: int
    tokens: Sequence[int]


class Wired(NamedTuple):
    """Hidden states of `shape` [tokens, hidden], or one token id [1], as a hop sent them."""

    data: memoryview
    shape: tuple[int, ...]
    dtype: Dtype
    codec: Codec


@dataclass(frozen=True, slots=True)
class Chunk:
    """The positions `[start, end)` of the sequence `tokens` on their way through the hops.

    They travel as hidden states [count, hidden], or without as the tokens themselves.
    """

    tokens: Sequence[int]
    start: int
    end: int
    hidden: Tensor | Wired | None

    @property
    def count(self) -> int:
        return self.end - self.start

    def ids(self) -> bytes:
        """Little-endian u32 [count]."""
        return struct.pack(f"<{self.count}I", *self.tokens[self.start : self.end])

    def states(self) -> Tensor:
        """Hidden states [count, hidden]."""
        assert self.hidden is not None, "these are still tokens"
        return from_wire(*self.hidden) if isinstance(self.hidden, Wired) else self.hidden

    def token(self) -> int:
        """The token that the last hop finds likeliest after these."""
        assert isinstance(self.hidden, Wired), "no hop was asked yet"
        return int.from_bytes(self.hidden.data, "little")

    def bytes_as(self, dtype: Dtype, codec: Codec) -> memoryview:
        """The hidden states as a hop takes them, which may be as the hop before gave them."""
        if isinstance(self.hidden, Wired) and (self.hidden.dtype, self.hidden.codec) == (dtype, codec):
            return self.hidden.data
        return to_wire(self.states(), dtype, codec)


class Leg:
    """This session's stream to one hop. `opened` is what was agreed on."""

    def __init__(self, hop: Hop, chain: PageChain, deadlines: Deadlines, clock: Callable[[], float]):
        self.hop = hop
        self.prefill = HopTimes()
        self.decode = HopTimes()
        self.opened: Opened
        self._chain = chain
        self._deadlines = deadlines
        self._clock = clock
        self._session_id = secrets.token_hex(16)
        self._hidden_size = self._vocab_size = 0
        self._calls: MessageStream | None = None

    @property
    def takes_token_ids(self) -> bool:
        return self.opened.takes_token_ids and self.hop.span.start == 0

    async def open(self, transport: Transport, asked: Asked) -> None:
        """
        Raises:
            RemoteFault, NoCapacity, RequestRefused: see `swarm.client.faults`.
        """
        hop = self.hop
        keys = self._chain.asked(asked.tokens)
        with blaming(hop):
            stream = await transport.open_stream(hop.peer, hop.announcement.addresses)
            self._calls = MessageStream(stream)
            message = Open(
                session_id=self._session_id,
                model_id=asked.model_id,
                start=hop.span.start,
                end=hop.span.end,
                max_tokens=asked.max_tokens,
                page_keys=keys,
            )
            answer, _ = await self._calls.call(message, timeout=self._deadlines.open)
        if not isinstance(answer, Opened) or answer.dtype == "uint32":
            raise RemoteFault(hop, "answered the opening of a session with something else")
        if answer.held > len(keys) // KEY_BYTES * PAGE_TOKENS:
            raise RemoteFault(hop, "says it holds more of a new session than it was asked for")
        self.opened = answer
        self._hidden_size, self._vocab_size = asked.hidden_size, asked.vocab_size

    async def run(self, chunk: Chunk, wants_token: bool = False) -> Chunk:
        """One step, repeated as long as the hop asks to wait and the deadline allows.

        With `wants_token` the hop, which `opened` must say so, answers with the likeliest next token.

        Raises:
            RemoteFault, NoCapacity, RequestRefused: see `swarm.client.faults`.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._deadlines.for_step(chunk.count)
        step, body = self._step(chunk, "token_ids" if wants_token else "hidden_states")
        while True:
            try:
                return await self._run_once(chunk, step, body, deadline - loop.time())
            except NoCapacity as busy:
                if busy.retry_after is None or loop.time() + busy.retry_after >= deadline:
                    raise
                await asyncio.sleep(busy.retry_after)

    async def run_all(
        self,
        source: "asyncio.Queue[Chunk]",
        target: "asyncio.Queue[Chunk]",
        count: int,
        wants_token: bool = False,
    ) -> None:
        for _ in range(count):
            await target.put(await self.run(await source.get(), wants_token))

    async def close(self) -> None:
        """Say goodbye, so that the hop frees its memory at once; it will anyway when the stream ends."""
        if self._calls is None:
            return
        try:
            await self._calls.call(Close(session_id=self._session_id), timeout=self._deadlines.close)
        except SwarmError:
            pass
        finally:
            self._calls.close()

    def abort(self) -> None:
        if self._calls is not None:
            self._calls.close()

    def _step(self, chunk: Chunk, response_type: ResponseType) -> tuple[Step, bytes | memoryview]:
        """The message and the body that bring `chunk` to this hop, with the names of the pages it fills."""
        if self.takes_token_ids:
            ids = Step(
                session_id=self._session_id,
                seq_pos=chunk.start,
                payload_type="token_ids",
                response_type=response_type,
                shape=(chunk.count,),
                dtype="uint32",
            )
            return ids, chunk.ids()
        dtype, codec = self.opened.dtype, self.opened.codec
        step = Step(
            session_id=self._session_id,
            seq_pos=chunk.start,
            payload_type="hidden_states",
            response_type=response_type,
            shape=(chunk.count, self._hidden_size),
            dtype=dtype,
            codec=codec,
            page_keys=self._chain.named(chunk.tokens, chunk.start, chunk.end),
        )
        return step, chunk.bytes_as(dtype, codec)

    async def _run_once(self, chunk: Chunk, step: Step, body: bytes | memoryview, remaining: float) -> Chunk:
        assert self._calls is not None
        expected = self._expected(chunk, step.response_type)
        started = self._clock()
        with blaming(self.hop):
            answer, data = await self._calls.call(
                step, body, timeout=remaining, max_body=body_bytes(expected)
            )
        result = self._checked(answer, data, expected)
        times = self.decode if chunk.count == 1 else self.prefill
        times.add((self._clock() - started) * 1000, result)
        hidden = Wired(data, result.shape, result.dtype, result.codec)
        return Chunk(chunk.tokens, chunk.start, chunk.end, hidden)

    def _expected(self, chunk: Chunk, response_type: ResponseType) -> Result:
        """What the hop must answer, its times aside."""
        if response_type == "token_ids":
            return Result(
                session_id=self._session_id,
                seq_pos=chunk.start,
                response_type=response_type,
                shape=(1,),
                dtype="uint32",
            )
        return Result(
            session_id=self._session_id,
            seq_pos=chunk.start,
            response_type="hidden_states",
            shape=(chunk.count, self._hidden_size),
            dtype=self.opened.dtype,
            codec=self.opened.codec,
        )

    def _checked(self, result: AnyMessage, body: memoryview, expected: Result) -> Result:
        """The result, if it is what was asked for, and numbers: hops keep what comes of it."""
        if not isinstance(result, Result) or _form(result) != _form(expected):
            raise RemoteFault(self.hop, "answered a step with a result of another shape or kind")
        if result.response_type == "token_ids":
            if int.from_bytes(body, "little") >= self._vocab_size:
                raise RemoteFault(self.hop, "answered with a token that the model does not have")
        elif not is_finite(body, result.shape, result.dtype, result.codec):
            raise RemoteFault(self.hop, "answered with values that are not numbers")
        return result


def _form(result: Result) -> tuple[ResponseType, tuple[int, ...], Dtype, Codec]:
    return result.response_type, result.shape, result.dtype, result.codec
