"""How many tokens to draft: from how often drafts were right, and from what a step of many rows takes.

Everything here is arithmetic on what it is told; where drafts come from, and how steps are made, it must
not know.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from operator import mul

MAX_DRAFT = 15
"""Tokens drafted at most: with the one before them 16 rows, the most that hops take as decoding."""

WORTH = 1.1
"""A draft must promise so many times the tokens a second of plain steps, since its odds are estimates."""

ROW_SHARE = 0.2
"""What a further row is taken to cost, of a step of one row, until steps of several rows were seen."""

PRIOR_ROWS = 2.0
"""The weight of that guess: as of one observed step whose rows are this far from the mean."""

STEP_DECAY = 0.9
"""What is left of a step's weight at the next one: about ten steps are remembered."""

OUTLIER = 4.0
"""A step that takes longer than so many times what was expected counts as that long: it has waited."""

TRIAL_DECAY = 0.95
"""What is left of a trial's weight at the next one: about twenty are remembered."""

PRIOR_TRIALS = 4.0


@dataclass
class Acceptance:
    """How often drafts of one kind are right, as `prior` at first and then as the newest were."""

    prior: float
    _trials: float = 0.0
    _hits: float = 0.0

    @property
    def rate(self) -> float:
        return (self._hits + PRIOR_TRIALS * self.prior) / (self._trials + PRIOR_TRIALS)

    def learn(self, was_right: bool) -> None:
        self.fade()
        self._trials += 1
        self._hits += was_right

    def fade(self) -> None:
        """Trust what was seen a little less."""
        self._trials *= TRIAL_DECAY
        self._hits *= TRIAL_DECAY


@dataclass
class StepPace:
    """Seconds that a decode step takes by the rows it has: a line through the newest steps.

    The weighted sums are those of a least-squares fit of seconds over the rows beyond the first. `round` is
    what a round takes that hops go by themselves, None while none is known.
    """

    round: float | None = None
    _weight: float = 0.0
    _rows: float = 0.0
    _rows_squared: float = 0.0
    _seconds: float = 0.0
    _products: float = 0.0

    @property
    def is_known(self) -> bool:
        return self._weight > 0

    def learn(self, rows: int, seconds: float) -> None:
        """A step of `rows` rows took `seconds`."""
        further = rows - 1
        if self.is_known:
            seconds = min(seconds, OUTLIER * self.seconds(rows))
        self._weight = STEP_DECAY * self._weight + 1
        self._rows = STEP_DECAY * self._rows + further
        self._rows_squared = STEP_DECAY * self._rows_squared + further * further
        self._seconds = STEP_DECAY * self._seconds + seconds
        self._products = STEP_DECAY * self._products + further * seconds

    def learn_round(self, seconds: float) -> None:
        """A round that the hops went by themselves took `seconds`."""
        if self.round is None:
            self.round = seconds
        else:
            self.round += (1 - STEP_DECAY) * (min(seconds, OUTLIER * self.round) - self.round)

    @property
    def plain(self) -> float:
        """Seconds that a token takes without drafts, 0 where nothing is known."""
        return self.seconds(1) if self.round is None else min(self.seconds(1), self.round)

    def seconds(self, rows: int) -> float:
        """What a step of `rows` rows is expected to take, 0 where nothing is known."""
        if not self.is_known:
            return 0.0
        further, mean = self._rows / self._weight, self._seconds / self._weight
        guess = ROW_SHARE * mean / (1 + ROW_SHARE * further)
        spread = self._rows_squared - self._weight * further * further
        shared = self._products - self._weight * further * mean
        prior = PRIOR_ROWS**2
        slope = max(0.0, (shared + prior * guess) / (spread + prior))
        return max(0.0, mean + slope * (rows - 1 - further))


def draft_count(odds: Sequence[float], pace: StepPace, seconds_each: float = 0.0) -> int:
    """How many tokens to draft so that the most tokens a second come, 0 where plain steps are as fast.

    `odds` are the chances of each drafted token to be right if those before it are; `seconds_each` is what
    drafting one takes. The first step of all is plain, so that there is something to compare with.
    """
    plain = pace.plain
    if plain <= 0:
        return 0
    tokens = [1.0, *(1.0 + right for right in accumulate(accumulate(odds, mul)))]
    rates = [
        expected / (pace.seconds(1 + count) + seconds_each * count) for count, expected in enumerate(tokens)
    ]
    best = max(range(len(rates)), key=rates.__getitem__)
    return best if rates[best] >= WORTH / plain else 0


@dataclass(frozen=True)
class SpeculationReport:
    """What drafting did for an answer: tokens `drafted`, those of them `accepted`, and all decode `steps`."""

    drafted: int = 0
    accepted: int = 0
    steps: int = 0

    def and_step(self, drafted: int, accepted: int) -> "SpeculationReport":
        """The same with one more step."""
        return replace(
            self,
            drafted=self.drafted + drafted,
            accepted=self.accepted + accepted,
            steps=self.steps + 1,
        )

    def as_json(self) -> dict[str, int]:
        return {"drafted": self.drafted, "accepted": self.accepted, "steps": self.steps}
