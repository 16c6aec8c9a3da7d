"""Trials: a toy swarm under faults, in which answers must be exact and at whose end nothing may be left."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import combinations
from typing import Any

from swarm.client.conversation import Conversation
from swarm.client.generation import Generation
from swarm.client.options import GenerationOptions, SamplingOptions
from swarm.errors import SwarmError
from swarm.spans import Span
from tests.faulty import Faults
from tests.toy_swarm import GREEDY, Toy, letters, toy_swarm

THREE = {"a": Span(0, 2), "b": Span(2, 4), "c": Span(4, 6)}
SIX = {**THREE, "a2": Span(0, 2), "b2": Span(2, 4), "c2": Span(4, 6)}
CROSSED = {"a": Span(0, 3), "b": Span(3, 6), "x": Span(0, 2), "y": Span(1, 5), "z": Span(4, 6)}
SWARMS = (SIX, CROSSED, {**THREE, "all": Span(0, 6), "most": Span(0, 5)})

PROMPT = [65 + at % 26 for at in range(80)]
"""Three steps for hops that take 32 tokens at a time."""

SAMPLED = SamplingOptions(temperature=2.0, top_p=0.95, seed=5)
"""The likeliest token is one of three that come."""

COUNT = 12
LATENCY = 0.010
TIMEOUT = 60.0
"""Seconds that a route is waited for."""

DEADLINE = 300.0
"""Seconds within which every answer has an end, whatever happens."""

MOMENT = 1.0
"""Seconds within which servers must know that a session is over."""


@asynccontextmanager
async def trial(spans: dict[str, Span], faults: Faults, **options: Any) -> AsyncIterator[Toy]:
    """A toy swarm with `faults`. Once the body is done, all is healed, and soon all must be free."""
    try:
        async with toy_swarm(spans, wrap=faults.wrap, **{"timeout": TIMEOUT, **options}) as toy:
            faults.names |= {server.peer: name for name, server in toy.servers.items()}
            faults.names[toy.network.peer("client")] = "client"
            peers = ["client", *(server.peer for server in toy.servers.values())]
            for one, other in combinations(peers, 2):
                toy.network.set_link(one, other, latency=LATENCY)
            for server in toy.servers.values():
                server.max_step_tokens = 32
                server.tells = letters
            yield toy
            faults.is_calm = True
            toy.network.heal()
            await asyncio.sleep(MOMENT + faults.latest)
            held = {name: sessions for name, sessions in toy.sessions.items() if sessions}
            assert not held, "sessions outlive their client"
        await asyncio.sleep(0)  # what was cancelled last ends
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"tasks are left: {sorted(task.get_name() for task in left)}"
    except BaseException as failure:
        failure.add_note("\n".join([f"seed {faults.seed}", *faults.log]))
        raise


async def answer(
    toy: Toy,
    prompt: Sequence[int] = PROMPT,
    count: int = COUNT,
    conversation: Conversation | None = None,
    *,
    speculate: bool = True,
    sampling: SamplingOptions = GREEDY,
) -> Generation:
    """The answer to `prompt`, which must be that of an undisturbed run.

    Without drafts hops go by themselves wherever they can.
    """
    options = GenerationOptions(count, sampling, ignore_eos=True, speculate=speculate)
    async with asyncio.timeout(DEADLINE):
        found = await toy.swarm.stream_tokens(prompt, options, conversation).result()
    assert list(found.token_ids) == toy.ends.expected(prompt, count, sampling)
    return found


async def answer_or_error(
    toy: Toy,
    prompt: Sequence[int] = PROMPT,
    count: int = COUNT,
    *,
    speculate: bool = True,
    sampling: SamplingOptions = GREEDY,
) -> bool:
    """Whether there was an answer, an exact one; an error for people is the other end that it may have."""
    try:
        await answer(toy, prompt, count, speculate=speculate, sampling=sampling)
    except SwarmError:
        return False
    return True


def at_step(number: int, act: Callable[[], object]) -> Callable[[int], Awaitable[None]]:
    """Calls `act` in a server's step of that number, as its `before_step`, and lets its news spread."""

    async def before_step(steps: int) -> None:
        if steps == number:
            act()
            await asyncio.sleep(0)

    return before_step


def servers_of(found: Generation) -> list[str]:
    return [hop.name for hop in found.route]
