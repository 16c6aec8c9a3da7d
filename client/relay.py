"""Bringing a sequence through the legs of a session, chunk by chunk, until the last hop has answered.

Each chunk goes to the first hop that lacks it, and from there straight on as far as hops are linked; where
they are not, the next hop is brought what the one before gave. Where the last is linked to the first, they
may go on from there by themselves. Owns how far each chunk is; that a hop is lost is told to the owner, who
replaces its leg.
"""

import asyncio
import struct
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from swarm.baton import Bell
from swarm.client.faults import HopError, NoCapacity
from swarm.client.inputs import Inputs, Wired
from swarm.client.leg import Leg, Pending
from swarm.client.rounds import Rounds, Told, further_rounds, whole_rounds
from swarm.client.route import Hop
from swarm.client.speculation import Acceptance
from swarm.client.watch import Watch
from swarm.errors import SwarmError
from swarm.net.messages import Onward, ResponseType, Step
from swarm.net.transport import PeerId
from swarm.page_keys import PAGE_TOKENS
from swarm.sampling import Sampling

PREFILL_CHUNK = 128
"""Tokens a prefill step takes at most when there are several hops, so that they compute at the same time."""

WINDOW = 4
"""Steps that one hop may owe answers to."""

MAX_ATTEMPTS = 100
"""How often a step is begun anew since what it needs was forgotten meanwhile."""

AHEAD = 12
"""Chunks that the first hop may be ahead of the last: what waits in between takes memory there."""


LEAST_FORESIGHT = 0.5
"""Hops go on by themselves while at least so many of the tokens they do it with are those that are wanted."""


class HistoryLost(SwarmError):
    """What went into a session's first hop is not kept any more: a hop that lost it cannot be replaced."""

    def __init__(self) -> None:
        super().__init__(
            "A server was lost, and what it had been given is not kept any more.",
            "Begin a new session, or let more be kept: journal_memory and journal_disk.",
        )


class Observer(Protocol):
    """Who learns how hops do, and which edges do not work."""

    def succeeded(self, hop: Hop, tokens: int, queue_ms: float, compute_ms: float) -> None: ...

    def push_failed(self, source: PeerId, target: PeerId) -> None: ...


@dataclass(frozen=True)
class Wanted:
    """What is asked of the last hop: for the last `rows` tokens before `end`.

    Where it tells one token, or can choose it by `sampling`, the hops may go `rounds` more by themselves, but
    none after a token of `ends`.
    """

    end: int
    rows: int
    response_type: ResponseType
    rounds: int = 0
    ends: tuple[int, ...] = ()
    sampling: Sampling | None = None


class Relay:
    """The legs of one session, for the sequence `tokens`, which its owner changes.

    `inputs` hold what travelled between hops. `on_news` is called when a leg is lost or its hop about to
    leave.
    """

    def __init__(
        self,
        tokens: Sequence[int],
        inputs: Inputs,
        observer: Observer,
        clock: Callable[[], float],
        on_news: Callable[[], None],
    ):
        self.legs: list[Leg] = []
        self._tokens = tokens
        self._inputs = inputs
        self._observer = observer
        self._clock = clock
        self._on_news = on_news
        self._changed = Bell()
        self._watch = Watch(clock, self._on_not_taken, self._changed.set)
        self._number = 0
        self._wanted = Wanted(0, 0, "hidden_states")
        self._outcome: Wired | None = None
        self._rounds: Rounds | None = None
        self._foresight = Acceptance(prior=1.0)
        self._bug: Exception | None = None
        self._doubts: dict[Leg, tuple[Pending, HopError]] = {}

    @property
    def can_go_round(self) -> bool:
        """Whether the last hop could begin another round with its token."""
        return (
            self.legs[0].takes_token_ids
            and self.legs[-1].opened.gives_token_ids
            and all(leg.opened.goes_round for leg in self.legs)
        )

    def is_ring(self, sampling: Sampling | None) -> bool:
        """Whether all hops can go on by themselves, and the last one is linked to the first.

        With the likeliest tokens, or with such as are chosen by `sampling`.
        """
        if self.legs[-1].onward is not self.legs[0] or not self.can_go_round:
            return False
        return sampling is None or self.legs[-1].opened.samples

    def is_on_its_way(self, token: int, position: int, response_type: ResponseType) -> bool:
        """Whether the hops go on by themselves with that token at that position, so answered."""
        rounds = self._rounds
        if rounds is None or rounds.response_type != response_type:
            return False
        expected = rounds.token(position)
        if expected is not None:
            self._foresight.learn(expected == token)
        return expected == token

    def stop_rounds(self) -> None:
        """Let hops go on by themselves no further than to what they have told."""
        rounds = self._rounds
        if rounds is None:
            return
        number, position = rounds.begins_untold
        if number in rounds:
            for leg in self.legs:
                leg.give_up_from(number)
                leg.rewind(position)
            self._inputs.truncate(position)
            rounds.stop()

    def rewind(self, length: int) -> None:
        """Forget all positions from `length` on."""
        self.stop_rounds()
        self._rounds = None
        for leg in self.legs:
            leg.rewind(length)
        self._inputs.truncate(length)

    async def bring(self, wanted: Wanted) -> Wired:
        """Let every hop hold the tokens up to `wanted.end`, and return the last one's answer.

        Hops before it may have to tell yet what they gave.

        Raises:
            HopError: a hop is lost.
            HistoryLost: the first hop lacks what is not known here.
        """
        self._wanted, self._outcome = wanted, None
        if self._rounds is not None and self._rounds.covers(wanted.end):
            edges, attempts = [wanted.end - 1, wanted.end], 1
        else:
            edges, attempts = self._begin(), 1
        while (outcome := self._heard()) is None:
            self._check()
            self._changed.clear()
            if not await self._send(edges):
                if attempts == MAX_ATTEMPTS:
                    raise RuntimeError("a session has nothing to send and nothing to wait for")
                edges, attempts = self._begin(), attempts + 1
            elif not self._changed.is_set:
                await self._wait()
        await self._go_further()
        return outcome

    def replace(self, first: int, end: int, legs: Sequence[Leg]) -> None:
        """Put `legs` in the place of those from `first` up to `end`; the work goes on from what all hold."""
        self.stop_rounds()
        gone = self.legs[first:end]
        for block in {leg.block for leg in gone[1:]} - {leg.block for leg in legs}:
            self._inputs.forget(block)
        for leg in gone:
            leg.abort()
            self._doubts.pop(leg, None)
        for leg in self.legs:
            if leg.onward in gone:
                leg.onward = None
        for after in self.legs[end:]:
            after.give_up_from(0)
        self.legs[first:end] = legs
        self._plan()

    def distrust(self, leg: Leg, fault: HopError) -> None:
        """What the hop gave is wrong: it is lost, and so is what the hops after it made of that."""
        self.stop_rounds()
        self._rounds = None
        for after in self.legs[self.legs.index(leg) + 1 :]:
            self._doubts.pop(after, None)
            after.give_up_from(0)
            after.rewind(0)
        self._inputs.truncate(0, leg.block + 1)
        leg.fail(fault)

    def close(self) -> None:
        """What hops say from now on of each other is no wonder: they end one after the other."""
        self._watch.close()
        for leg in self.legs:
            leg.onward = None

    def on_result(self, leg: Leg, answered: Pending, result: Wired, pushed: bool, token: int | None) -> None:
        index = self.legs.index(leg)
        self._inputs.used(leg.block, answered.start, answered.end)
        is_last = index + 1 == len(self.legs)
        if not is_last:
            self._pass_on(index, answered, result, pushed)
        elif (answered.end, answered.step.rows, answered.step.response_type) == self._asked_of_last:
            self._outcome = result
        if is_last and self._rounds is not None and answered.number in self._rounds:
            self._end_round(self._rounds, answered, Told(result, token), pushed)
        self._settle_doubts(answered.number)
        self._changed.set()

    def on_refused(self, leg: Leg, refused: Pending, fault: HopError) -> None:
        """Who gave it something bad is to blame, once that shows; until then it is in doubt."""
        if self._is_owed_before(leg, refused.number):
            self._doubts[leg] = (refused, fault)
        else:
            self._believe(leg, refused, fault)
        self._changed.set()

    def on_times(self, leg: Leg, tokens: int, queue_ms: float, compute_ms: float) -> None:
        self._observer.succeeded(leg.hop, tokens, queue_ms, compute_ms)

    def on_news(self, leg: Leg) -> None:
        if leg.is_unfed and leg in self.legs:
            self._break_edge(self.legs[self.legs.index(leg) - 1])
        self._changed.set()
        self._on_news()

    def on_bug(self, bug: Exception) -> None:
        self._bug = bug
        self._changed.set()

    def _heard(self) -> Wired | None:
        if self._outcome is None and self._rounds is not None:
            return self._rounds.given(self._wanted.end)
        return self._outcome

    def _check(self) -> None:
        """
        Raises:
            HopError: a leg is lost.
        """
        broken = self._bug or next((leg.fault for leg in self.legs if leg.fault is not None), None)
        if broken is not None:
            self.stop_rounds()
            raise broken

    @property
    def _asked_of_last(self) -> tuple[int, int, ResponseType]:
        return self._wanted.end, *self._final_answer

    def _pass_on(self, index: int, answered: Pending, result: Wired, pushed: bool) -> None:
        """Keep what a hop gave for the next one, which may begin with it."""
        leg, following = self.legs[index], self.legs[index + 1]
        self._inputs.put(following.block, answered.start, result, answered.valid_end)
        then = answered.step.then
        if then and not pushed and leg.onward is not None and leg.onward.session_id == then[0].session_id:
            self._break_edge(leg)
        elif (pending := following.pending.get(answered.number)) is not None:
            pending.since = self._clock()

    def _end_round(self, rounds: Rounds, answered: Pending, told: Told, pushed: bool) -> None:
        """The last hop has told a token, with which the first may begin another round."""
        rounds.tell(answered.end, told)
        if pushed:
            if (pending := self.legs[0].pending.get(answered.number + 1)) is not None:
                pending.since = self._clock()
        elif told.token in answered.step.ends:
            self.stop_rounds()
        elif rounds.goes_on_after(answered.end):
            self._break_edge(self.legs[-1])

    def _break_edge(self, leg: Leg) -> None:
        """The hop passes nothing on any more: the next one is brought from here what it still lacks."""
        following = leg.onward
        if following is None:
            return
        leg.onward = None
        self.stop_rounds()
        self._observer.push_failed(leg.hop.peer, following.hop.peer)
        for pending in following.pending.values():
            if pending.is_pushed:
                pending.is_pushed, pending.since = False, None

    def _on_not_taken(self, leg: Leg) -> None:
        if leg in self.legs:
            self._break_edge(self.legs[self.legs.index(leg) - 1])
            self._changed.set()

    def _is_owed_before(self, leg: Leg, number: int) -> bool:
        """Whether a hop before has not told yet what it gave in that step."""
        return any(number in before.pending for before in self.legs[: self.legs.index(leg)])

    def _settle_doubts(self, number: int) -> None:
        for leg, (refused, fault) in list(self._doubts.items()):
            if refused.number == number and not self._is_owed_before(leg, number):
                del self._doubts[leg]
                self._believe(leg, refused, fault)

    def _believe(self, leg: Leg, refused: Pending, fault: HopError) -> None:
        """The hop did not run the step; those after it have nothing, or nothing of worth, of it."""
        self.stop_rounds()
        for after in self.legs[self.legs.index(leg) :]:
            self._doubts.pop(after, None)
            after.give_up_from(refused.number)
            after.rewind(refused.start)
        self._inputs.truncate(refused.start, leg.block + 1)
        now = self._clock()
        leg.busy_since = leg.busy_since or now
        deadline = leg.busy_since + leg.deadlines.for_step(refused.tokens)
        wait = fault.retry_after if isinstance(fault, NoCapacity) else None
        if wait is not None and now + wait < deadline:
            leg.resume_at = now + wait
        else:
            leg.fail(fault)

    def _plan(self) -> None:
        """Let each hop begin where the next one needs something that is not known here."""
        for giver, leg in reversed(list(pairwise(self.legs))):
            begin = self._inputs.next_needed(leg.block, leg.sent)
            coming = next(iter(giver.pending.values()), None)
            if coming is None or coming.start > begin:
                giver.rewind(begin)

    def _begin(self) -> list[int]:
        """Plan what each hop is brought; see `_edges`.

        Raises:
            HistoryLost: see `bring`.
        """
        self.legs[-1].rewind(self._wanted.end - self._wanted.rows)
        self._plan()
        first, end = self.legs[0], self._wanted.end
        if first.sent < end and not self._inputs.has(first.block, first.sent, end):
            raise HistoryLost
        return self._edges()

    def _edges(self) -> list[int]:
        """Where the positions that some hop lacks are cut into chunks; the last has all wanted rows."""
        start = min(leg.sent for leg in self.legs)
        size = min(leg.max_chunk for leg in self.legs)
        if len(self.legs) > 1:
            size = min(size, PREFILL_CHUNK)
        end = self._wanted.end
        return [*(at for at in chunk_edges(start, end, size) if at <= end - self._wanted.rows), end]

    async def _send(self, edges: Sequence[int]) -> bool:
        """Start everything that can be started now; False if nothing comes of it, since inputs are lost."""
        try:
            for index, leg in enumerate(self.legs):
                for pending in list(leg.pending.values()):
                    is_due = not pending.is_pushed and pending.since is None
                    if is_due and self._inputs.has(leg.block, pending.start, pending.end):
                        await leg.send(
                            pending, await self._body(leg, self._tokens, pending.start, pending.end)
                        )
                while leg.fault is None and (chunk := self._next_chunk(index, edges)) is not None:
                    await self._start(index, *chunk)
        except LookupError:
            return False
        now = self._clock()
        return any(leg.pending or leg.fault or leg.resume_at > now for leg in self.legs)

    def _next_chunk(self, index: int, edges: Sequence[int]) -> tuple[int, int] | None:
        """The next positions that can be brought to a hop now, if there are any."""
        leg = self.legs[index]
        if leg.sent >= edges[-1] or len(leg.pending) >= WINDOW or self._clock() < leg.resume_at:
            return None
        at = bisect_right(edges, leg.sent)
        start, end = edges[at - 1], edges[at]
        if index == 0:
            return None if at - bisect_right(edges, self.legs[-1].length) > AHEAD else (start, end)
        if any(pending.is_pushed or pending.since is None for pending in leg.pending.values()):
            return None  # what is on its way to it comes first
        return (start, end) if self._inputs.has(leg.block, start, end) else None

    async def _go_further(self) -> None:
        """Begin the step after the wanted one with the token that the last hop has told, if hops wait for it.

        Whoever wanted that one still has to say whether it is the token to go on with.
        """
        start, rounds, first = self._wanted.end, self._rounds, self.legs[0]
        token = None if rounds is None else rounds.last_token(start)
        if token is None or token in self._wanted.ends:
            return
        if first.sent == start and first.fault is None and self._clock() >= first.resume_at:
            await self._start(0, start, start + 1, token)

    async def _start(self, index: int, start: int, end: int, foretold: int | None = None) -> None:
        """Bring a chunk to a hop, to go on from there as far as hops are linked and wait for it.

        It is of the sequence; or the one token that was `foretold` to follow it, if hops can go on from there
        by themselves.
        """
        tokens = self._tokens if foretold is None else (*self._tokens, foretold)
        body = await self._body(self.legs[index], tokens, start, end)
        last = index
        while self._goes_on(last, start, end):
            last += 1
        count = self._rounds_after(start, end) if last - index + 1 == len(self.legs) else None
        if foretold is not None and count is None:
            return
        self._number += 1
        self._rounds = None
        if count is not None:
            self._rounds = Rounds(self._number, end, count, self._wanted.response_type, foretold)
        then: tuple[Onward, ...] = ()
        for at in range(last, index - 1, -1):
            leg = self.legs[at]
            step = self._step(at, tokens, start, end, then, count)
            leg.expect(Pending.of(step, is_pushed=at > index))
            for further in further_rounds(step):
                leg.expect(Pending.of(further, is_pushed=True))
            then = (Onward(leg.session_id, step.response_type, step.rows, step.page_keys), *then)
        pending = self.legs[index].pending[self._number]
        self._number += count or 0
        await self.legs[index].send(pending, body)

    def _rounds_after(self, start: int, end: int) -> int | None:
        """How many rounds the hops may go by themselves after the wanted step, or the one after that.

        None where they cannot go any, however far that would be.
        """
        wanted, ahead = self._wanted, end - self._wanted.end
        is_told = wanted.rows == 1 and (wanted.response_type == "token_ids" or wanted.sampling is not None)
        if not (wanted.rounds and is_told and ahead >= 0 and end - start == 1):
            return None
        if not self.is_ring(wanted.sampling) or any(leg.is_leaving for leg in self.legs):
            return None
        if self._foresight.rate < LEAST_FORESIGHT:
            self._foresight.fade()
            return None
        are_named = any(leg.chain is not None for leg in self.legs[1:])
        return whole_rounds(wanted.rounds - ahead, end) if are_named else wanted.rounds - ahead

    def _goes_on(self, index: int, start: int, end: int) -> bool:
        """Whether the hop can pass these positions on, and the next one lacks them and no others before."""
        if index + 1 == len(self.legs) or self.legs[index].onward is not self.legs[index + 1]:
            return False
        leg = self.legs[index + 1]
        in_order = all(pending.is_pushed for pending in leg.pending.values())
        return in_order and leg.fault is None and start <= leg.sent < end and self._clock() >= leg.resume_at

    def _step(
        self,
        index: int,
        tokens: Sequence[int],
        start: int,
        end: int,
        then: tuple[Onward, ...],
        rounds: int | None,
    ) -> Step:
        leg, count = self.legs[index], end - start
        rows, response_type = self._answer_of(index, end)
        keys = leg.chain.named(tokens, start, end) if leg.chain else b""
        takes_ids = leg.takes_token_ids
        return Step(
            session_id=leg.session_id,
            number=self._number,
            seq_pos=start,
            payload_type="token_ids" if takes_ids else "hidden_states",
            response_type=response_type,
            shape=(count,) if takes_ids else (count, leg.hidden_size),
            dtype="uint32" if takes_ids else leg.opened.dtype,
            codec="raw" if takes_ids else leg.opened.codec,
            page_keys=b"" if takes_ids else keys,
            rows=rows,
            then=then,
            rounds=rounds or 0,
            ends=self._wanted.ends if rounds else (),
            sampling=None if rounds is None else self._wanted.sampling,
        )

    def _answer_of(self, index: int, end: int) -> tuple[int, ResponseType]:
        """Rows and kind of what a hop is asked for: all where others follow, at last what is wanted."""
        if index + 1 < len(self.legs):
            return 0, "hidden_states"
        is_final = end >= self._wanted.end
        return self._final_answer if is_final else (1, "hidden_states")

    @property
    def _final_answer(self) -> tuple[int, ResponseType]:
        """What the last hop is asked for: hidden states where it has no head for the tokens wanted."""
        tells = self.legs[-1].opened.gives_token_ids
        return self._wanted.rows, self._wanted.response_type if tells else "hidden_states"

    async def _body(self, leg: Leg, tokens: Sequence[int], start: int, end: int) -> bytes | memoryview:
        """What goes into a hop at these positions of `tokens`, in the form that it takes."""
        if leg.takes_token_ids:
            return struct.pack(f"<{end - start}I", *tokens[start:end])
        return await self._inputs.read(leg.block, start, end, (leg.opened.dtype, leg.opened.codec))

    async def _wait(self) -> None:
        """Until something was heard, or a hop has been silent for longer than is normal."""
        now = self._clock()
        due = {leg: at for leg in self.legs if (at := self._watch.due_at(leg)) is not None}
        resumed = [leg.resume_at for leg in self.legs if leg.resume_at > now]
        until = min([*due.values(), *resumed], default=None)
        try:
            async with asyncio.timeout(None if until is None else max(until - now, 0.0)):
                await self._changed.wait()
        except TimeoutError:
            for leg, at in due.items():
                if at <= self._clock():
                    self._watch.ask(leg)


def chunk_edges(start: int, end: int, size: int) -> list[int]:
    """Where to cut the positions `[start, end)` into steps of at most `size` tokens: where pages end.

    The first edge is `start`, the last `end`. A `size` below a page's cuts pages too.
    """
    stride = size - size % PAGE_TOKENS or size
    begin = start - start % PAGE_TOKENS if stride >= PAGE_TOKENS else start
    return [start, *range(begin + stride, end, stride), end]
