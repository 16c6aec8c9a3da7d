"""People who talk while servers come and go: each asks one thing again and again, and must get one answer."""

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean

from swarm.client.conversation import Conversation
from swarm.client.facade import Swarm
from swarm.client.options import GenerationOptions
from swarm.errors import SwarmError

LONGEST_ANSWER = 300.0
"""Seconds after which an answer that has not ended counts as failed."""


@dataclass
class Loss:
    """One server lost at `at`, and how many tokens the answers that ran on it had there, by talker."""

    at: float
    blocks: str
    held: dict[int, int]


@dataclass
class Tally:
    """What happened so far. `prefills` are seconds of one session, `mass_prefills` of all a loss hits."""

    counts: Counter[str] = field(default_factory=Counter)
    losses: list[Loss] = field(default_factory=list)
    journal_bytes: list[int] = field(default_factory=list)
    prefills: list[float] = field(default_factory=list)
    mass_prefills: list[float] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    @property
    def hit(self) -> float:
        """Answers that a loss hits on average."""
        return fmean(len(loss.held) for loss in self.losses) if self.losses else 0.0


class Talker:
    """A client with one prompt, whose answer is known once it was undisturbed."""

    def __init__(
        self, number: int, client: Swarm, prompt: list[int], options: GenerationOptions, tally: Tally
    ):
        self.moments: list[float] = []
        self.number = number
        self.prompt_tokens = len(prompt)
        self._client = client
        self._prompt = prompt
        self._options = options
        self._tally = tally
        self._expected: tuple[int, ...] = ()
        self._conversation: Conversation | None = None

    def holds_on(self, peer: str) -> int:
        """Tokens that `peer` holds for this talker's answer."""
        session = self._conversation.session if self._conversation else None
        on_it = session is not None and any(hop.peer == peer for hop in session.route.hops)
        return len(session.tokens) if session and on_it else 0

    def pause(self, at: float) -> float | None:
        """Seconds of the longest wait for news that includes `at` or began in the second after it."""
        waits = pairwise(self.moments)
        return max((end - start for start, end in waits if start < at + 1.0 and end > at), default=None)

    async def learn(self) -> None:
        """Answer undisturbed."""
        self._expected = await self._answer()

    async def live(self, until: float) -> None:
        """Answer again and again until the loop's time `until`, and compare."""
        loop = asyncio.get_running_loop()
        while loop.time() < until:
            try:
                async with asyncio.timeout(LONGEST_ANSWER):
                    self._compare(await self._answer())
            except (SwarmError, TimeoutError) as error:
                self._tally.counts["failed answers"] += 1
                self._tally.broken.append(f"client {self.number}: {error!r}")
                await asyncio.sleep(1.0)

    async def _answer(self) -> tuple[int, ...]:
        self._conversation = conversation = self._client.conversation()
        try:
            stream = self._client.stream_tokens(self._prompt, self._options, conversation)
            self.moments.append(time.monotonic())
            async for _ in stream:
                self.moments.append(time.monotonic())
            self._note(conversation)
            assert stream.generation is not None
            return stream.generation.token_ids
        finally:
            self._conversation = None
            await conversation.close()

    def _note(self, conversation: Conversation) -> None:
        session = conversation.session
        if session is not None:
            self._tally.counts["recoveries"] += session.recoveries
            self._tally.counts["tokens replayed"] += session.replayed_tokens
            self._tally.counts["tokens handed over"] += session.handed_over_tokens
            self._tally.counts["tokens copied"] += session.copied_tokens
            self._tally.counts["tokens stood in for"] += session.stood_in_tokens
            self._tally.journal_bytes.append(session.journal_bytes)

    def _compare(self, given: tuple[int, ...]) -> None:
        self._tally.counts["answers"] += 1
        self._tally.counts["tokens"] += len(given)
        if given != self._expected:
            pairs = enumerate(zip(given, self._expected, strict=False))
            wrong = next((at for at, (one, other) in pairs if one != other), len(given))
            self._tally.counts["wrong answers"] += 1
            self._tally.broken.append(f"client {self.number}: token {wrong} of {len(given)} differs")
