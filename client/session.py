"""A session: one sequence's life on the hops of a route, whoever they are by then.

Owns the tokens of the sequence, and lets one thing happen to it at a time: a step, or a move to other hops.
A hop that is lost is replaced, and the step goes on. Knows token ids and hidden states, nothing of text.
"""

import asyncio
import logging
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Self

from torch import Tensor

from swarm.client.auditor import Case
from swarm.client.changes import Change
from swarm.client.concurrently import concurrently
from swarm.client.experience import LIED
from swarm.client.faults import HopError, Misled, RemoteFault
from swarm.client.inputs import Inputs, Wired
from swarm.client.leg import Asked, HopTimes
from swarm.client.recovery import Environment, Recovery
from swarm.client.relay import Relay, Wanted
from swarm.client.route import Hop, Route
from swarm.client.scrutiny import Scrutiny
from swarm.errors import SwarmError
from swarm.kernels.codecs import from_wire, to_wire
from swarm.net.messages import MAX_ENDS, ResponseType
from swarm.net.transport import PeerId
from swarm.sampling import Sampling

logger = logging.getLogger(__name__)

MOVE_PATIENCE = 3.0
"""Seconds in which others must be found for hops that leave while nothing else is to be done."""


class Session:
    """One sequence along a route, of which all hops hold `tokens`.

    A step that is cancelled, or for which no hops can be found any more, ends the session: `is_open` turns
    False and its streams are closed. It `went_round` if the hops had made the newest step by themselves, for
    which they get ready as soon as it `expects_rounds`.
    """

    def __init__(self, environment: Environment, route: Route, asked: Asked):
        self.max_tokens = asked.max_tokens
        self.is_open = True
        self.went_round = self.expects_rounds = False
        self._environment = environment
        self._asked = asked
        self._tokens: list[int] = []
        self._seconds = route.seconds
        embed = environment.embed if asked.tokens is not None else None
        self._inputs = Inputs(environment.store, self._tokens, asked.hidden_size, embed)
        clock = environment.transport.clock
        self._relay = Relay(self._tokens, self._inputs, environment.router, clock, self._on_news)
        self._recovery = Recovery(self._relay, environment)
        auditor = environment.auditor
        self._scrutiny = (
            Scrutiny(auditor, asked, self._inputs, auditor.rng) if auditor and asked.audited else None
        )
        self._busy = asyncio.Lock()
        self._moving: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, environment: Environment, route: Route, asked: Asked) -> Self:
        """Open a session on every hop of `route` at once. It begins with what all hops have kept.

        Raises:
            RemoteFault, NoCapacity, RequestRefused: see `swarm.client.faults`.
        """
        auditor = environment.auditor
        if auditor is not None and asked.tokens is not None:
            asked = replace(asked, vouch=True, audited=auditor.draws(route.hops, asked.max_tokens))
        if asked.audited:  # by a secret that nobody has heard of hops find nothing: all they give is computed
            environment = replace(environment, secret=secrets.token_bytes(32))
        session = cls(environment, route, asked)
        await session._open(route)
        return session

    @property
    def tokens(self) -> Sequence[int]:
        """The tokens of the sequence that all hops hold."""
        return self._tokens

    @property
    def route(self) -> Route:
        """The hops of this moment."""
        return Route(tuple(leg.hop for leg in self._relay.legs), self._seconds)

    @property
    def takes_token_ids(self) -> bool:
        """Whether steps need no hidden states, since the first hop embeds tokens itself."""
        return self._relay.legs[0].takes_token_ids

    @property
    def gives_token_ids(self) -> bool:
        """Whether the last hop tells the likeliest next tokens itself."""
        return self._relay.legs[-1].opened.gives_token_ids

    def goes_round(self, sampling: Sampling | None = None) -> bool:
        """Whether the hops are ready to go on by themselves: with the likeliest tokens, or by `sampling`."""
        return self._relay.is_ring(sampling)

    @property
    def max_step_tokens(self) -> int:
        """Tokens that a step may have whose results are all wanted."""
        return min(leg.max_chunk for leg in self._relay.legs)

    @property
    def recoveries(self) -> int:
        """How often other hops have taken the place of some."""
        return self._recovery.count

    @property
    def changes(self) -> Sequence[Change]:
        """What became of the hops so far."""
        return self._recovery.changes.all

    def tell_changes(self, on_change: Callable[[], None]) -> None:
        """Call `on_change`, and nobody else any more, whenever `changes` are others."""
        self._recovery.changes.on_change = on_change

    @property
    def replayed_tokens(self) -> int:
        """Tokens that were computed again for that, counted once a hop."""
        return self._recovery.replayed_tokens

    @property
    def handed_over_tokens(self) -> int:
        """Tokens that leaving hops have given to those in their place."""
        return self._recovery.handed_over_tokens

    @property
    def stood_in_tokens(self) -> int:
        """Tokens that standbys held which took the place of lost hops."""
        return self._recovery.stood_in_tokens

    @property
    def copied_tokens(self) -> int:
        """Tokens that hops have copied to standbys."""
        return self._recovery.copied_tokens

    @property
    def journal_bytes(self) -> int:
        """What is kept of the sequence for the loss of a hop, in memory and on disk."""
        return self._inputs.bytes

    async def step(
        self,
        tokens: Sequence[int],
        seq_pos: int,
        hidden: Tensor | None = None,
        rows: int = 1,
        *,
        rounds: int = 0,
        ends: Sequence[int] = (),
        sampling: Sampling | None = None,
    ) -> Tensor:
        """Run `tokens` from position `seq_pos` on through all hops, forgetting what was there and after.

        `hidden` is what they embed to, [tokens, hidden]; it may be left out where `takes_token_ids`.

        After one token for one row the hops may go `rounds` further by themselves, each with the token that
        `sampling` chooses, but not beyond one of `ends`: who goes on with the same ones soon has what they
        give.

        Returns:
            Hidden states [rows, hidden] of the last `rows` tokens as the last hop gave them.

        Raises:
            SwarmError: a hop was lost for which there is no other; the session has ended.
            ValueError: the session has ended before, or the positions do not fit it.
        """
        answer = await self._run(tokens, seq_pos, hidden, rows, "hidden_states", rounds, ends, sampling)
        return from_wire(*answer)

    async def next_tokens(
        self,
        tokens: Sequence[int],
        seq_pos: int,
        hidden: Tensor | None = None,
        rows: int = 1,
        *,
        rounds: int = 0,
        ends: Sequence[int] = (),
    ) -> list[int]:
        """`step`, answered by the last hop with the likeliest token after each row, if `gives_token_ids`.

        It is with these that hops may go further `rounds` by themselves.
        """
        answer = await self._run(tokens, seq_pos, hidden, rows, "token_ids", rounds, ends)
        if answer.dtype != "uint32":  # another hop has taken the place of the one that told tokens
            return await self._environment.likeliest(from_wire(*answer))
        return list(answer.data.cast("B").cast("I"))

    def reset_times(self) -> None:
        for leg in self._relay.legs:
            leg.prefill, leg.decode = HopTimes(), HopTimes()

    def times(self) -> list[tuple[Hop, HopTimes]]:
        """Mean times of each hop for one decode step; of prefill steps where there was no other."""
        return [
            (leg.hop, (leg.decode if leg.decode.steps else leg.prefill).mean()) for leg in self._relay.legs
        ]

    async def close(self) -> None:
        """Tell the hops that the session is over, waiting a moment at most. Safe to call again."""
        if self.is_open:
            scrutiny = self._scrutiny
            cases = await self._last_cases(scrutiny) if scrutiny else []
            self._end()
            await asyncio.gather(*(leg.close() for leg in self._relay.legs))
            if scrutiny:
                scrutiny.submit(cases)

    def abort(self) -> None:
        """End at once, without a word to the hops."""
        self._end()
        for leg in self._relay.legs:
            leg.abort()

    def distrust(self, peer: PeerId) -> None:
        """`peer` gives wrong results: others take its place, and what came of those is computed again."""
        self._recovery.distrust(peer)
        for leg in self._relay.legs:
            if not self.is_open or leg.fault is not None:
                continue
            if leg.hop.peer == peer:
                self._relay.distrust(leg, RemoteFault(leg.hop, LIED))
            elif peer in leg.given_by:
                self._relay.distrust(leg, Misled(leg.hop))

    async def _last_cases(self, scrutiny: Scrutiny) -> list[Case]:
        self._relay.rewind(len(self._tokens))
        try:
            return await scrutiny.cases(self._relay.legs, self._tokens)
        except LookupError:
            return []  # the journals do not hold any more what went in

    async def _open(self, route: Route) -> None:
        hops = route.hops
        legs = self._relay.legs = [self._recovery.leg(hops[: at + 1]) for at in range(len(hops))]
        transport = self._environment.transport
        try:
            async with self._busy:
                await concurrently(*(leg.open(transport, self._asked, self._relay) for leg in legs))
        except BaseException:
            self.abort()
            raise
        self._tokens[:] = (self._asked.tokens or ())[: min(leg.length for leg in legs)]
        self._relay.rewind(len(self._tokens))
        self._recovery.link()

    async def _run(
        self,
        tokens: Sequence[int],
        seq_pos: int,
        hidden: Tensor | None,
        rows: int,
        response_type: ResponseType,
        rounds: int = 0,
        ends: Sequence[int] = (),
        sampling: Sampling | None = None,
    ) -> Wired:
        async with self._busy:
            self._check(tokens, seq_pos, hidden, rows)
            with self._ending_on_failure():
                self.went_round = self._is_on_its_way(tokens, seq_pos, response_type)
                if not self.went_round:
                    self._relay.stop_rounds()
                    await self._recovery.move(self._asked_now)
                    self._relay.rewind(seq_pos)
                self._tokens[seq_pos:] = tokens
                if hidden is not None and not self.takes_token_ids:
                    self._keep_given(seq_pos, hidden)
                if rounds or self.expects_rounds:
                    self._recovery.go_round()
                rounds = min(rounds, self.max_tokens - len(self._tokens))
                last = tuple(ends[:MAX_ENDS])
                wanted = Wanted(len(self._tokens), rows, response_type, rounds, last, sampling)
                while True:
                    try:
                        answer = await self._relay.bring(wanted)
                    except HopError:
                        await self._recovery.heal(self._asked_now())
                    else:
                        break
                self._recovery.has_healed()
                self._recovery.stand_by(self._asked, len(self._tokens))
                if self._scrutiny is not None and self._scrutiny.is_due(len(self._tokens)):
                    with suppress(LookupError):  # the journals may not hold any more what went in
                        await self._scrutiny.look(self._relay.legs, self._tokens)
                return answer

    def _is_on_its_way(self, tokens: Sequence[int], seq_pos: int, response_type: ResponseType) -> bool:
        """Whether the hops go on with these tokens by themselves, and may: none of them leaves."""
        is_next = len(tokens) == 1 and seq_pos == len(self._tokens)
        if not is_next or any(leg.is_leaving for leg in self._relay.legs):
            return False
        return self._relay.is_on_its_way(tokens[0], seq_pos, response_type)

    def _keep_given(self, seq_pos: int, hidden: Tensor) -> None:
        first = self._relay.legs[0]
        form = first.opened
        data = to_wire(hidden, form.dtype, form.codec)
        rows = Wired(data, (len(hidden), self._asked.hidden_size), form.dtype, form.codec)
        self._inputs.put(first.block, seq_pos, rows, seq_pos + len(hidden))

    def _check(self, tokens: Sequence[int], seq_pos: int, hidden: Tensor | None, rows: int) -> None:
        if not self.is_open:
            raise ValueError("the session has ended")
        if not tokens or seq_pos > len(self._tokens) or seq_pos + len(tokens) > self.max_tokens:
            raise ValueError(
                f"{len(tokens)} tokens from {seq_pos} on: {len(self._tokens)} held, {self.max_tokens} allowed"
            )
        if not 1 <= rows <= len(tokens):
            raise ValueError(f"{rows} rows of {len(tokens)} tokens are wanted")
        if not self.takes_token_ids and (hidden is None or len(hidden) != len(tokens)):
            raise ValueError("the first hop takes hidden states, one for each token")

    def _asked_now(self) -> Asked:
        """What a hop is asked that comes later."""
        return self._asked if self._asked.tokens is None else replace(self._asked, tokens=tuple(self._tokens))

    def _on_news(self) -> None:
        """While nothing runs, let what a leaving hop holds go elsewhere in time."""
        is_leaving = any(leg.is_leaving for leg in self._relay.legs)
        if is_leaving and self.is_open and not self._busy.locked() and self._moving is None:
            self._moving = asyncio.create_task(self._move(), name="move a session")

    async def _move(self) -> None:
        try:
            async with self._busy:
                self._relay.rewind(len(self._tokens))
                await self._recovery.move(self._asked_now, MOVE_PATIENCE)
        except SwarmError as error:
            logger.info("a session cannot be moved: %s", error)
        finally:
            self._moving = None

    def _end(self) -> None:
        self.is_open = False
        if self._moving is not None:
            self._moving.cancel()
        self._recovery.close()
        self._relay.close()
        self._inputs.release()

    @contextmanager
    def _ending_on_failure(self) -> Iterator[None]:
        """Whatever leaves the body early, cancellation included, ends the session."""
        finished = False
        try:
            yield
            finished = True
        finally:
            if not finished:
                self.abort()
