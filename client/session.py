"""A session: one sequence's life on the hops of a route.

Owns the streams to its hops and the tokens of the sequence that all of them hold. Each step goes from hop
to hop, driven from here. Knows token ids and hidden states, nothing of text.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

from swarm.client.concurrently import concurrently
from swarm.client.faults import HopError
from swarm.client.leg import Asked, Chunk, Deadlines, HopTimes, Leg
from swarm.client.page_chain import chain_for
from swarm.client.route import Hop, Route
from swarm.net.transport import Transport
from swarm.page_keys import PAGE_TOKENS

PREFILL_CHUNK = 128
"""Tokens a prefill step takes at most when there are several hops, so that they compute at the same time."""

OnFault = Callable[[HopError], None]


class Session:
    """One sequence along a route, of which all hops hold `tokens`.

    A failed or cancelled step leaves the hops in unknown states, so the session ends with it:
    `is_open` turns False and its streams are closed.
    """

    def __init__(self, route: Route, legs: Sequence[Leg], max_tokens: int, on_fault: OnFault):
        self.route = route
        self.max_tokens = max_tokens
        self.is_open = True
        self._tokens: list[int] = []
        self._legs = legs
        self._on_fault = on_fault

    @classmethod
    async def open(
        cls,
        transport: Transport,
        route: Route,
        asked: Asked,
        *,
        secret: bytes,
        on_fault: OnFault = lambda fault: None,
        deadlines: Deadlines,
    ) -> Self:
        """Open a session on every hop of `route` at once. It begins with what all hops have kept.

        `secret` is this client's own, 64 bytes at most: by it later sessions find what this one leaves.
        `on_fault` is called with a step's error before it is raised, and may raise another in its place.

        Raises:
            RemoteFault, NoCapacity, RequestRefused: see `swarm.client.faults`.
        """
        hops = route.hops
        legs = [
            Leg(hop, chain_for(hops[: at + 1], secret), deadlines, transport.clock)
            for at, hop in enumerate(hops)
        ]
        session = cls(route, legs, asked.max_tokens, on_fault)
        try:
            await concurrently(*(leg.open(transport, asked) for leg in legs))
        except BaseException:
            session.abort()
            raise
        session._tokens = list(asked.tokens[: min(leg.opened.held for leg in legs)])
        return session

    @property
    def tokens(self) -> Sequence[int]:
        """The tokens of the sequence that all hops hold."""
        return self._tokens

    @property
    def takes_token_ids(self) -> bool:
        """Whether steps need no hidden states, since the first hop embeds tokens itself."""
        return self._legs[0].takes_token_ids

    @property
    def gives_token_ids(self) -> bool:
        """Whether the last hop tells the likeliest next token itself."""
        return self._legs[-1].opened.gives_token_ids

    async def step(self, tokens: Sequence[int], seq_pos: int, hidden: Tensor | None = None) -> Tensor:
        """Run `tokens` from position `seq_pos` on through all hops, forgetting what was there and after.

        `hidden` is what they embed to, [tokens, hidden]; it may be left out where `takes_token_ids`.

        Returns:
            Hidden states [tokens, hidden] as the last hop gave them.

        Raises:
            RemoteFault, NoCapacity, RequestRefused: see `swarm.client.faults`; the session has ended.
            ValueError: the session has ended before, or the positions do not fit it.
        """
        results = [chunk.states() for chunk in await self._run(tokens, seq_pos, hidden)]
        return results[0] if len(results) == 1 else torch.cat(results)

    async def next_token(self, tokens: Sequence[int], seq_pos: int, hidden: Tensor | None = None) -> int:
        """`step`, answered by the last hop with the likeliest token after `tokens`, if `gives_token_ids`."""
        return (await self._run(tokens, seq_pos, hidden, wants_token=True))[-1].token()

    async def _run(
        self, tokens: Sequence[int], seq_pos: int, hidden: Tensor | None, wants_token: bool = False
    ) -> Sequence[Chunk]:
        end = seq_pos + len(tokens)
        if not self.is_open:
            raise ValueError("the session has ended")
        if not tokens or seq_pos > len(self._tokens) or end > self.max_tokens:
            raise ValueError(
                f"{len(tokens)} tokens from {seq_pos} on: {len(self._tokens)} held, {self.max_tokens} allowed"
            )
        if self.takes_token_ids:
            hidden = None
        elif hidden is None or len(hidden) != len(tokens):
            raise ValueError("the first hop takes hidden states, one for each token")
        self._tokens[seq_pos:] = tokens
        with self._ending_on_failure():
            chunks = self._chunks(seq_pos, end, hidden)
            if len(chunks) == 1:
                return [await self._pass(chunks[0], wants_token)]
            return await self._pipeline(chunks, wants_token)

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

    def _chunks(self, start: int, end: int, hidden: Tensor | None) -> list[Chunk]:
        """The positions `[start, end)`, whose embeddings are `hidden`, in steps that fill whole pages."""
        edges = chunk_edges(start, end, self._chunk_tokens())
        return [
            Chunk(self._tokens, at, to, None if hidden is None else hidden[at - start : to - start])
            for at, to in pairwise(edges)
        ]

    def _chunk_tokens(self) -> int:
        allowed = min(leg.opened.max_step_tokens for leg in self._legs)
        return min(allowed, PREFILL_CHUNK) if len(self._legs) > 1 else allowed

    async def _pass(self, chunk: Chunk, wants_token: bool) -> Chunk:
        *before, last = self._legs
        for leg in before:
            chunk = await leg.run(chunk)
        return await last.run(chunk, wants_token)

    async def _pipeline(self, chunks: Sequence[Chunk], wants_token: bool) -> Sequence[Chunk]:
        """All chunks through all hops, each hop working on the next chunk as soon as it has passed one on."""
        first: asyncio.Queue[Chunk] = asyncio.Queue(len(chunks))
        for chunk in chunks:
            first.put_nowait(chunk)
        queues = [first, *(asyncio.Queue[Chunk](len(chunks)) for _ in self._legs)]
        hand_overs = zip(self._legs, queues, queues[1:], strict=False)
        await concurrently(
            *(
                leg.run_all(source, target, len(chunks), wants_token and leg is self._legs[-1])
                for leg, source, target in hand_overs
            )
        )
        return [queues[-1].get_nowait() for _ in chunks]

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


def chunk_edges(start: int, end: int, size: int) -> list[int]:
    """Where to cut the positions `[start, end)` into steps of at most `size` tokens: where pages end.

    The first edge is `start`, the last `end`. A `size` below a page's cuts pages too.
    """
    stride = size - size % PAGE_TOKENS or size
    begin = start - start % PAGE_TOKENS if stride >= PAGE_TOKENS else start
    return [start, *range(begin + stride, end, stride), end]
