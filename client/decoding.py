"""Decoding: the tokens of one answer from a conversation's steps, one at a time or several a step.

Each step brings the newest token and what is drafted to follow it. The model's own token after each of them
is chosen as in plain decoding, and a draft counts as far as it says the same, so the answer is the same
token for token. A refused draft is forgotten by the next step, which begins where the answer ends.
"""

import asyncio
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple, Self

from torch import Tensor

from swarm.client.changes import Change
from swarm.client.conversation import Conversation, Ends, Outcome
from swarm.client.drafting import Drafter
from swarm.client.sampling import Sampler
from swarm.client.scores import TokenScore, score, scores
from swarm.client.session import Session
from swarm.client.speculation import MAX_DRAFT, SpeculationReport, draft_count

NewDrafter = Callable[[Sequence[int], Sampler], Drafter]
"""Makes a drafter for the sequence that begins with these tokens, whose next ones are so chosen. Blocks."""


MAX_ROUNDS, ROUNDS_SECONDS = 32, 1.0
"""Tokens that hops go on by themselves to tell at most, and seconds: no longer do they go on in vain."""

FIRST_ROUNDS = 4
"""As many before it is known how long they take."""

SCORED_ROWS = 64
"""So many of a prompt's tokens are scored at a time: their logits are large."""


@dataclass(frozen=True)
class Scoring:
    """That tokens are to be scored, with so many of the likeliest in the place of each; also the prompt's."""

    top: int
    of_prompt: bool = False


class Losses(NamedTuple):
    """What lost hops cost: how often some were replaced, and how many tokens were sent again for that.

    `changes` counts also what nobody has taken yet.
    """

    recoveries: int = 0
    replayed_tokens: int = 0
    changes: int = 0

    @classmethod
    def of(cls, session: Session) -> Self:
        return cls(session.recoveries, session.replayed_tokens, len(session.changes))


class Decoding:
    """The steps of one answer, `session` their session, of which it began with `cached_tokens` of the prompt.

    `drafter` is None where nothing is to be drafted, `scoring` where no token's score is wanted; `clock` is
    in seconds. After the tokens `ends_at` nothing follows. `scores` are those of the tokens it gave, in
    turn; `prompt_scores` those of the prompt's from the second on. `on_route` is called once there is a
    session, and again whenever its hops change.
    """

    def __init__(
        self,
        conversation: Conversation,
        ends: Ends,
        compute: Executor,
        sampler: Sampler,
        drafter: NewDrafter | None,
        clock: Callable[[], float],
        scoring: Scoring | None = None,
        ends_at: Collection[int] = (),
    ):
        self.scores: list[TokenScore] = []
        self.prompt_scores: list[TokenScore] = []
        self.report = SpeculationReport()
        self.session: Session
        self.on_route: Callable[[], None] = lambda: None
        self.cached_tokens = 0
        self._conversation = conversation
        self._ends = ends
        self._compute = compute
        self._sampler = sampler
        self._sampling = sampler.by_logits_alone
        self._new_drafter = drafter
        self._drafter: Drafter | None = None
        self._now = clock
        self._scoring = scoring
        self._ends_at = tuple(ends_at)
        self._turn = 0
        self._before: Losses | None = None

    @property
    def losses(self) -> Losses:
        """Of the answer's steps, its prompt's included."""
        before = self._before or Losses()
        return Losses(*(now - then for now, then in zip(Losses.of(self.session), before, strict=True)))

    @property
    def changes(self) -> Sequence[Change]:
        """What became of the session's hops since the answer began."""
        return self.session.changes[len(self.session.changes) - self.losses.changes :]

    async def begin(self, prompt: Sequence[int], max_new_tokens: int) -> int:
        """Have the hops hold `prompt`; the token after it."""
        await self._prepare_drafts(prompt)
        whole = self._scoring is not None and self._scoring.of_prompt
        rows = len(prompt) if whole else 1
        begun = await self._conversation.begin(
            prompt,
            max_new_tokens,
            likeliest=self._takes_likeliest,
            sampling=self._sampling,
            rows=rows,
            on_route=self._follow,
        )
        self._turn, self.cached_tokens = begun.turn, begun.cached_tokens
        self.session.reset_times()
        outcome = begun.outcome
        if whole and isinstance(outcome, Tensor):
            await self._score_prompt(prompt, outcome)
            outcome = outcome[-1:]
        return self._told(await self._verified(prompt, [], outcome))[0]

    async def next(self, tokens: Sequence[int], room: int) -> list[int]:
        """The tokens after `tokens`, prompt included: one at least, and `room` at most."""
        drafted = await self._draft(min(room - 1, MAX_DRAFT))
        started = self._now()
        outcome = await self._conversation.append(
            self._turn,
            [tokens[-1], *drafted],
            len(tokens) - 1,
            rounds=0 if drafted else min(room - 1, self._most_rounds),
            ends=self._ends_at,
        )
        chosen = await self._verified(tokens, drafted, outcome)
        self._learn_pace(1 + len(drafted), self._now() - started)
        self.report = self.report.and_step(len(drafted), len(chosen) - 1)
        return self._told(chosen)

    @property
    def _takes_likeliest(self) -> bool:
        """Whether nothing but the likeliest tokens is wanted."""
        sampling = self._sampling
        return sampling is not None and sampling.is_greedy and self._scoring is None

    @property
    def _is_foreseen(self) -> bool:
        """Whether hops can go on by themselves."""
        sampling = None if self._takes_likeliest else self._sampling
        return self._sampling is not None and self.session.goes_round(sampling)

    @property
    def _most_rounds(self) -> int:
        """How far hops may go by themselves: as far as they come in `ROUNDS_SECONDS`."""
        pace = self._conversation.pace
        if self._sampling is None:
            return 0
        if not pace.is_known:
            return FIRST_ROUNDS
        return int(ROUNDS_SECONDS / max(pace.plain, ROUNDS_SECONDS / MAX_ROUNDS))

    def _learn_pace(self, rows: int, seconds: float) -> None:
        """A step of so many rows took `seconds`, whoever had it made."""
        pace = self._conversation.pace
        if self.session.went_round:
            pace.learn_round(seconds)
        else:
            pace.learn(rows, seconds)

    def _follow(self, session: Session) -> None:
        """The answer has a session now, or other hops."""
        if self._before is None:
            self.session, self._before = session, Losses.of(session)
        self.on_route()

    def close(self) -> None:
        """The answer has ended. Safe to call again."""
        if self._drafter is not None:
            self._drafter.close()

    async def _score_prompt(self, prompt: Sequence[int], hidden: Tensor) -> None:
        """Score all tokens of `prompt` but the first, by the `hidden` states [prompt, hidden] before them."""
        assert self._scoring is not None
        loop, top = asyncio.get_running_loop(), self._scoring.top

        def scored(at: int, following: Sequence[int]) -> list[TokenScore]:
            return scores(self._ends.logits(hidden[at : at + len(following)]), following, top)

        for at in range(0, len(prompt) - 1, SCORED_ROWS):
            following = prompt[at + 1 : at + 1 + SCORED_ROWS]
            self.prompt_scores += await loop.run_in_executor(self._compute, scored, at, following)

    async def _prepare_drafts(self, prompt: Sequence[int]) -> None:
        if self._new_drafter is not None and prompt:
            loop = asyncio.get_running_loop()
            self._drafter = await loop.run_in_executor(
                self._compute, self._new_drafter, prompt, self._sampler
            )

    def _told(self, chosen: list[int]) -> list[int]:
        """`chosen`, of which the drafter has heard."""
        if self._drafter is not None:
            for token in chosen:
                self._drafter.push(token)
        return chosen

    async def _draft(self, most: int) -> list[int]:
        pace = self._conversation.pace
        if self._drafter is None:
            return []
        if self._is_foreseen and pace.round is None:
            return []  # the hops are to show first how fast they are by themselves
        odds = self._drafter.odds()[: max(most, 0)]
        count = draft_count(odds, pace, self._drafter.seconds_each)
        return await self._drafter.draft(count) if count else []

    async def _verified(self, tokens: Sequence[int], drafted: Sequence[int], outcome: Outcome) -> list[int]:
        """The model's own tokens after `tokens`, given what a step of the last of them and a draft gave."""
        if not isinstance(outcome, Tensor):
            return agreed(drafted, outcome)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._compute, self._chosen, tokens, drafted, outcome)

    def _chosen(self, tokens: Sequence[int], drafted: Sequence[int], hidden: Tensor) -> list[int]:
        """`agreed` for hidden states [drafted + 1, hidden]; runs on the compute thread.

        The head takes row by row, as in plain decoding: many kernels round otherwise where rows are many,
        and what lies behind a refused draft costs nothing.
        """
        logits = (self._ends.logits(row)[-1] for row in hidden.split(1))
        if self._scoring is None:
            return agreed(drafted, own_tokens(self._sampler, tokens, drafted, logits))
        seen, chosen_by = _kept(logits)
        chosen = agreed(drafted, own_tokens(self._sampler, tokens, drafted, chosen_by))
        top = self._scoring.top
        self.scores += [score(row, token, top) for row, token in zip(seen, chosen, strict=True)]
        return chosen


def own_tokens(
    sampler: Sampler, tokens: Sequence[int], drafted: Sequence[int], logits: Iterable[Tensor]
) -> Iterator[int]:
    """The model's token after `tokens`, and after each drafted one, for the `logits` [vocabulary] of each."""
    sequence = list(tokens)
    for row, following in zip_longest(logits, drafted):
        yield sampler.choose(sequence, row)
        sequence.append(following)


def _kept(logits: Iterable[Tensor]) -> tuple[list[Tensor], Iterator[Tensor]]:
    """The same rows again, and those of them that have been taken."""
    taken: list[Tensor] = []

    def rows() -> Iterator[Tensor]:
        for row in logits:
            taken.append(row)
            yield row

    return taken, rows()


def agreed(drafted: Sequence[int], own: Iterable[int]) -> list[int]:
    """The model's `own` tokens, one for each drafted and one more, up to the first that was not drafted.

    What comes after that was computed for another sequence; it is not taken from `own`.
    """
    chosen = []
    for token, guess in zip_longest(own, drafted):
        chosen.append(token)
        if token != guess:
            break
    return chosen
