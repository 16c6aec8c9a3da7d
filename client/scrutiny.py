"""When a session is audited, and with what: what went into each hop so far, and what that gave.

Owns how often. Must not know how an audit goes.
"""

import random
from collections.abc import Sequence
from dataclasses import replace

from swarm.client.auditor import Auditor, Case
from swarm.client.inputs import Inputs, Wired
from swarm.client.leg import Asked, Leg
from swarm.client.replay import Replay

FIRST_AUDIT = 512
"""New tokens after which a session that goes on is audited at the latest for the first time.

Then each time that it has twice as many: all of it is computed once more each time.
"""


class Scrutiny:
    """The audits of one session, which begins with `asked.tokens`. `inputs` are what went into its hops."""

    def __init__(self, auditor: Auditor, asked: Asked, inputs: Inputs, rng: random.Random):
        self._auditor = auditor
        self._asked = asked
        self._inputs = inputs
        self._due = len(asked.tokens or ()) + rng.randint(FIRST_AUDIT // 4, FIRST_AUDIT)
        self._audited: dict[str, int] = {}

    def is_due(self, tokens: int) -> bool:
        """Whether a session of so many tokens is to be audited before it ends."""
        return tokens >= self._due

    async def look(self, legs: Sequence[Leg], tokens: Sequence[int]) -> None:
        """Have audited what there is so far, while the session goes on."""
        self._due = 2 * len(tokens)
        cases = await self.cases(legs, tokens)
        self.submit([replace(case, testimony=case.testimony.copy()) for case in cases])

    async def cases(self, legs: Sequence[Leg], tokens: Sequence[int]) -> list[Case]:
        """What there is to audit of each hop, if anything of `tokens` has come since the last time."""
        before: Sequence[Leg | None] = [legs[-1], *legs[:-1]] if len(legs) > 1 else [None]
        cases = [await self._case(*pair, legs, tokens) for pair in zip(legs, before, strict=True)]
        return [case for case in cases if case is not None]

    def submit(self, cases: Sequence[Case]) -> None:
        for case in cases:
            self._auditor.submit(case)

    async def _case(
        self, leg: Leg, before: Leg | None, legs: Sequence[Leg], tokens: Sequence[int]
    ) -> Case | None:
        testimony = leg.testimony
        if testimony is None or not (testimony.whole and testimony.given):
            return None
        is_fed = testimony.was_fed and before is not None
        if is_fed and not testimony.opened.vouches:
            return None  # nobody knows what it was fed
        if testimony.until > len(tokens):  # it goes on by itself meanwhile
            testimony = testimony.copy()
            testimony.cut(len(tokens))
        end = testimony.until
        if end <= self._audited.get(testimony.session_id, 0):
            return None
        rows = None
        if not leg.takes_token_ids:
            if testimony.opened.held or not self._inputs.has(leg.block, 0, end):
                return None
            form = leg.opened.dtype, leg.opened.codec
            data = await self._inputs.read(leg.block, 0, end, form)
            rows = Wired(data, (end, leg.hidden_size), *form)
        self._audited[testimony.session_id] = end
        replay = Replay(
            self._asked.model_id, self._asked.hidden_size, self._asked.wire, tuple(tokens[:end]), rows
        )
        beside = tuple(other.hop for other in legs if other is not leg)
        return Case(testimony, replay, beside, before.hop if before and is_fed else None)
