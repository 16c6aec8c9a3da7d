"""Servers that are killed, and servers that leave, in the middle of answers: no answer breaks or differs."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

import swarm
from benchmarks.churn import Churn, run
from benchmarks.seats import Seat, seated
from swarm.client.facade import Chat
from swarm.spans import Span
from tests.forks import FORKS

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

SHORT = Churn(seconds=120.0, standby=True)
CHATS = 8
TALKING = 120.0
"""Seconds within which all chats must have come to their end."""

ANSWER = {"max_new_tokens": 24, "ignore_eos": True}
QUESTIONS = ("Tell me a story about {} ships.", "And then?", "How does it end?")
SPANS = (Span(0, 10), Span(10, 20), Span(10, 20), Span(20, 30))


async def test_servers_are_killed_and_come_back_while_clients_talk(tmp_path: Path) -> None:
    """`python -m benchmarks.churn --minutes 2 --standby`; the long form tells how long pauses are."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    found = await run(replace(SHORT, seed=seed), tmp_path, FORKS)
    assert not found["broken"], found
    assert found["losses"] >= 6
    assert found["counts"]["answers"] >= SHORT.clients
    assert found["counts"]["recoveries"] or found["answers_hit"] <= 1  # that one may have been about to end


async def test_a_server_leaves_in_the_middle_of_eight_chats(tmp_path: Path) -> None:
    """Whichever of two holders serves the chats is asked to leave while all of them are in an answer."""
    options = ["--kv-tokens", "32768", "--no-prefix-cache"]
    async with (
        seated("smollm2-135m", "float16", SPANS, tmp_path, *options, launcher=FORKS) as seats,
        swarm.connect(seats.addresses, dtype="float16") as client,
    ):
        chats = [client.chat(**ANSWER) for _ in range(CHATS)]
        begun = [asyncio.Event() for _ in chats]
        undisturbed = await asyncio.gather(*map(talk, chats, range(CHATS), begun))
        for chat, event in zip(chats, begun, strict=True):
            await chat.reset()
            event.clear()
        async with asyncio.timeout(TALKING), asyncio.TaskGroup() as tasks:
            talks = [tasks.create_task(talk(*each)) for each in zip(chats, range(CHATS), begun, strict=True)]
            for event in begun:
                await event.wait()
            leaving = busiest(chats, [seat for seat in seats.all if seat.span == SPANS[1]])
            await leaving.end(politely=True)
        assert [one.result() for one in talks] == undisturbed
        assert leaving.servers[-1].exit_code == 0
        assert any(chat.session and chat.session.handed_over_tokens for chat in chats)
        for chat in chats:
            await chat.close()


async def talk(chat: Chat, number: int, begun: asyncio.Event) -> list[tuple[int, ...]]:
    """The answers to three questions, as tokens; `begun` is set after the first of them."""
    answers = []
    for question in QUESTIONS:
        answers.append((await chat.ask(question.format(number)).result()).token_ids)
        begun.set()
    return answers


def busiest(chats: Sequence[Chat], seats: Sequence[Seat]) -> Seat:
    """Of `seats` the one that serves most chats."""
    peers = [hop.peer for chat in chats if chat.session for hop in chat.session.route.hops]
    return max(seats, key=lambda seat: peers.count(seat.peer))
