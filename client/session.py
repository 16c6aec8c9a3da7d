"""A session: one sequence's life on the hops of a route.

Owns the streams to its hops and the position up to which they hold the sequence. Each step goes from
hop to hop, driven from here. Knows tensors of hidden states, nothing of tokens or text.
"""

import asyncio
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from swarm.client.concurrently import concurrently
from swarm.client.faults import HopError, NoCapacity, RemoteFault, blaming
from swarm.client.route import Hop, Route
from swarm.errors import SwarmError
from swarm.kernels.codecs import from_wire, to_wire
from swarm.net.calls import MessageStream
from swarm.net.messages import AnyMessage, Close, Open, Opened, Result, Step, body_bytes
from swarm.net.transport import Transport

PREFILL_CHUNK = 128
"""Tokens a prefill step takes at most when there are several hops, so that they compute at the same time."""

OnFault = Callable[[HopError], None]


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


@dataclass(frozen=True)
class _Chunk:
    """Hidden states [tokens, hidden] from `seq_pos` on, and the bytes they came in, if they did."""

    seq_pos: int
    hidden: Tensor
    wire: memoryview | None = None
    dtype: str = ""
    codec: str = ""

    def bytes_as(self, dtype: str, codec: str) -> memoryview:
        if self.wire is not None and (self.dtype, self.codec) == (dtype, codec):
            return self.wire
        return to_wire(self.hidden, dtype, codec)


class _Leg:
    """This session's stream to one hop."""

    def __init__(self, hop: Hop, deadlines: Deadlines, clock: Callable[[], float]):
        self.hop = hop
        self.prefill = HopTimes()
        self.decode = HopTimes()
        self.opened: Opened
        self._deadlines = deadlines
        self._clock = clock
        self._session_id = secrets.token_hex(16)
        self._calls: MessageStream | None = None

    async def open(self, transport: Transport, model_id: str, max_tokens: int) -> None:
        hop = self.hop
        with blaming(hop):
            stream = await transport.open_stream(hop.peer, hop.announcement.addresses)
            self._calls = MessageStream(stream)
            asked = Open(
                session_id=self._session_id,
                model_id=model_id,
                start=hop.span.start,
                end=hop.span.end,
                max_tokens=max_tokens,
            )
            answer, _ = await self._calls.call(asked, timeout=self._deadlines.open)
        if not isinstance(answer, Opened) or answer.dtype == "uint32":
            raise RemoteFault(hop, "answered the opening of a session with something else")
        self.opened = answer

    async def run(self, chunk: _Chunk) -> _Chunk:
        """One step, repeated as long as the hop asks to wait and the deadline allows.

        Raises:
            RemoteFault, NoCapacity, RequestRefused: see `swarm.client.faults`.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._deadlines.for_step(len(chunk.hidden))
        while True:
            try:
                return await self._run_once(chunk, deadline - loop.time())
            except NoCapacity as busy:
                if busy.retry_after is None or loop.time() + busy.retry_after >= deadline:
                    raise
                await asyncio.sleep(busy.retry_after)

    async def _run_once(self, chunk: _Chunk, remaining: float) -> _Chunk:
        dtype, codec, shape = self.opened.dtype, self.opened.codec, tuple(chunk.hidden.shape)
        step = Step(
            session_id=self._session_id,
            seq_pos=chunk.seq_pos,
            payload_type="hidden_states",
            response_type="hidden_states",
            shape=shape,
            dtype=dtype,
            codec=codec,
        )
        started = self._clock()
        assert self._calls is not None
        with blaming(self.hop):
            answer, body = await self._calls.call(
                step, chunk.bytes_as(dtype, codec), timeout=remaining, max_body=body_bytes(step)
            )
        times = self.decode if shape[0] == 1 else self.prefill
        result, hidden = self._checked(answer, body, step)
        times.add((self._clock() - started) * 1000, result)
        return _Chunk(chunk.seq_pos, hidden, body, dtype, codec)

    def _checked(self, result: AnyMessage, body: memoryview, step: Step) -> tuple[Result, Tensor]:
        """The result and its hidden states, if they are what was asked for."""
        asked = (step.response_type, step.shape, step.dtype, step.codec)
        if not isinstance(result, Result) or asked != (
            result.response_type,
            result.shape,
            result.dtype,
            result.codec,
        ):
            raise RemoteFault(self.hop, "answered a step with a result of another shape or kind")
        hidden = from_wire(body, result.shape, result.dtype, result.codec)
        if not torch.isfinite(hidden).all():
            raise RemoteFault(self.hop, "answered with values that are not numbers")
        return result, hidden

    async def run_all(
        self, source: "asyncio.Queue[_Chunk]", target: "asyncio.Queue[_Chunk]", count: int
    ) -> None:
        for _ in range(count):
            await target.put(await self.run(await source.get()))

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


class Session:
    """One sequence along a route. `position` is how many tokens the hops hold.

    A failed or cancelled step leaves the hops in unknown states, so the session ends with it:
    `is_open` turns False and its streams are closed.
    """

    def __init__(self, route: Route, legs: Sequence[_Leg], max_tokens: int, on_fault: OnFault):
        self.route = route
        self.max_tokens = max_tokens
        self.position = 0
        self.is_open = True
        self._legs = legs
        self._on_fault = on_fault

    @classmethod
    async def open(
        cls,
        transport: Transport,
        route: Route,
        *,
        model_id: str,
        max_tokens: int,
        on_fault: OnFault = lambda fault: None,
        deadlines: Deadlines = Deadlines(),
    ) -> Self:
        """Open a session of at most `max_tokens` on every hop of `route` at once.

        `on_fault` is called with a hop's error before it is raised, and may raise another in its place.

        Raises:
            RemoteFault, NoCapacity, RequestRefused: see `swarm.client.faults`.
        """
        session = cls(
            route, [_Leg(hop, deadlines, transport.clock) for hop in route.hops], max_tokens, on_fault
        )
        with session._ending_on_failure():
            await concurrently(*(leg.open(transport, model_id, max_tokens) for leg in session._legs))
        return session

    async def step(self, hidden: Tensor, seq_pos: int) -> Tensor:
        """Run hidden states [tokens, hidden] of the positions from `seq_pos` on through all hops.

        An earlier `seq_pos` than `position` forgets what came after it.

        Returns:
            Hidden states [tokens, hidden] as the last hop gave them.

        Raises:
            RemoteFault, NoCapacity, RequestRefused: see `swarm.client.faults`; the session has ended.
            ValueError: the session has ended before, or the positions do not fit it.
        """
        tokens = len(hidden)
        if not self.is_open:
            raise ValueError("the session has ended")
        if tokens == 0 or seq_pos > self.position or seq_pos + tokens > self.max_tokens:
            raise ValueError(
                f"{tokens} tokens from {seq_pos} on: {self.position} held, {self.max_tokens} allowed"
            )
        size = self._chunk_tokens()
        chunks = [_Chunk(seq_pos + at, hidden[at : at + size]) for at in range(0, tokens, size)]
        with self._ending_on_failure():
            results = await (self._pass(chunks[0]) if len(chunks) == 1 else self._pipeline(chunks))
        self.position = seq_pos + tokens
        return results[0] if len(results) == 1 else torch.cat(results)

    def reset_times(self) -> None:
        for leg in self._legs:
            leg.prefill, leg.decode = HopTimes(), HopTimes()

    def times(self) -> list[tuple[Hop, HopTimes]]:
        """Mean times of each hop for one decode step; of prefill steps where there was no other."""
        return [(leg.hop, (leg.decode if leg.decode.steps else leg.prefill).mean()) for leg in self._legs]

    async def close(self) -> None:
        """Tell the hops that the session is over, waiting a moment at most. Safe to call again."""
        if self.is_open:
            self.is_open = False
            await asyncio.gather(*(leg.close() for leg in self._legs))

    def abort(self) -> None:
        """End at once, without a word to the hops."""
        self.is_open = False
        for leg in self._legs:
            leg.abort()

    def _chunk_tokens(self) -> int:
        allowed = min(leg.opened.max_step_tokens for leg in self._legs)
        return min(allowed, PREFILL_CHUNK) if len(self._legs) > 1 else allowed

    async def _pass(self, chunk: _Chunk) -> list[Tensor]:
        for leg in self._legs:
            chunk = await leg.run(chunk)
        return [chunk.hidden]

    async def _pipeline(self, chunks: Sequence[_Chunk]) -> list[Tensor]:
        """All chunks through all hops, each hop working on the next chunk as soon as it has passed one on."""
        first: asyncio.Queue[_Chunk] = asyncio.Queue(len(chunks))
        for chunk in chunks:
            first.put_nowait(chunk)
        queues = [first, *(asyncio.Queue[_Chunk](len(chunks)) for _ in self._legs)]
        hand_overs = zip(self._legs, queues, queues[1:], strict=False)
        await concurrently(*(leg.run_all(source, target, len(chunks)) for leg, source, target in hand_overs))
        return [queues[-1].get_nowait().hidden for _ in chunks]

    @contextmanager
    def _ending_on_failure(self) -> Iterator[None]:
        """Whatever leaves the body early, cancellation included, ends the session."""
        finished = False
        try:
            yield
            finished = True
        except HopError as fault:
            self._on_fault(fault)
            raise
        finally:
            if not finished:
                self.abort()
