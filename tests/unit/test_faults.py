"""Answers stay exact whatever is lost on the way, and whoever; afterwards nothing is left anywhere.

All on a virtual clock, and each run repeats itself from its number.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, get_args

import msgspec
import numpy as np
import pytest

from swarm.client.options import GenerationOptions, SessionOptions
from swarm.errors import SwarmError
from swarm.net import messages
from swarm.net.messages import AnyMessage, Error, Opened, Result
from swarm.spans import Span
from tests.faulty import ACTS, Act, Faults, Odds, Rule
from tests.stepping import SteppingLoop, run_stepping
from tests.toy_swarm import GREEDY, Toy
from tests.trial import (
    COUNT,
    PROMPT,
    SAMPLED,
    SIX,
    SWARMS,
    THREE,
    TIMEOUT,
    answer,
    answer_or_error,
    at_step,
    servers_of,
    trial,
)

MID_PREFILL, MID_ANSWER = 2, 7
"""Which step of a server this is: of the three of the prompt, and of those of the answer."""

Disturb = Callable[[Toy], None]


def middle(toy: Toy) -> str:
    """The name of the server that a session begun now has for the blocks in the middle."""
    return toy.swarm.route().hops[1].announcement.name


def spare(toy: Toy) -> str:
    """The other one."""
    return "b2" if middle(toy) == "b" else "b"


def undisturbed(toy: Toy) -> None:
    return None


def slow(toy: Toy) -> None:
    """A step takes so long that the client asks after it."""

    async def before_step(steps: int) -> None:
        await asyncio.sleep(20.0 if steps == MID_ANSWER else 0.0)

    toy[middle(toy)].before_step = before_step


def killed(toy: Toy) -> None:
    server = toy[middle(toy)]
    server.before_step = at_step(MID_ANSWER, server.kill)


def refusing(toy: Toy) -> None:
    server = toy[middle(toy)]
    full = Error(code="no_capacity", message="full", retry_after=1.0)
    server.before_step = at_step(MID_ANSWER, lambda: server.refuse_steps.append(full))


def leaving(toy: Toy) -> None:
    server = toy[middle(toy)]
    server.before_step = at_step(MID_ANSWER, server.leave_meanwhile)


KINDS: dict[type[messages.Message], Disturb] = {
    messages.Ping: slow,
    messages.Pong: slow,
    messages.Open: undisturbed,
    messages.Opened: undisturbed,
    messages.Step: undisturbed,
    messages.Result: undisturbed,
    messages.Link: undisturbed,
    messages.Linked: undisturbed,
    messages.Feed: undisturbed,
    messages.Fed: undisturbed,
    messages.Unfed: killed,
    messages.Leaving: leaving,
    messages.HandOver: leaving,
    messages.HandedOver: leaving,
    messages.Mirror: killed,
    messages.Mirrored: killed,
    messages.Adopt: leaving,
    messages.Adopted: leaving,
    messages.Held: killed,
    messages.Close: undisturbed,
    messages.Closed: undisturbed,
    messages.Error: refusing,
}
"""In which disturbance each message is said."""

OF_STANDBYS = {messages.Mirror, messages.Mirrored, messages.Held}
"""What is said only where there are standbys."""


async def run(
    faults: Faults,
    disturb: Disturb = undisturbed,
    spans: dict[str, Span] = SIX,
    ask: Callable[[Toy], Awaitable[object]] = answer,
    **options: Any,
) -> Any:
    async with trial(spans, faults, **options) as toy:
        disturb(toy)
        return await ask(toy)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_each_message_may_be_struck(kind: type[messages.Message], act: Act) -> None:
    often = KINDS[kind] is undisturbed
    for skip, seconds in ((0, 0.015), (1, 5.0))[: 2 if often else 1]:
        faults = Faults(skip, [Rule(act, kind, skip=skip, seconds=seconds)])
        sessions = SessionOptions(standby=kind in OF_STANDBYS)
        run_stepping(run(faults, KINDS[kind], sessions=sessions))
        assert faults.seen[kind.__name__] > 0, "the message is never said"
        assert skip or faults.log, "the fault never struck"


@pytest.mark.parametrize("kind", [messages.Step, messages.Result], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("seed", range(20))
def test_any_step_may_be_struck(kind: type[messages.Message], seed: int) -> None:
    rng = random.Random(seed)
    acts = [Rule(rng.choice(ACTS), kind, skip=rng.randrange(40), seconds=rng.uniform(0, 5)) for _ in "xy"]
    run_stepping(run(Faults(seed, acts)))


def test_every_message_has_its_turn() -> None:
    """So that a new one is not forgotten here."""
    outside_sessions = {
        messages.Observe,
        messages.Observed,
        messages.DialBack,
        messages.DialledBack,
        messages.Probe,
        messages.Probed,
    }
    assert set(KINDS) == set(get_args(messages.AnyMessage)) - outside_sessions


@pytest.mark.parametrize("step", [1, MID_PREFILL, 3, 4, MID_ANSWER, MID_ANSWER + 1])
@pytest.mark.parametrize(
    "names", [("a",), ("b",), ("c",), ("a", "b"), ("b", "c"), ("a", "c"), ("a", "b", "c")]
)
def test_lost_hops_are_replaced(names: tuple[str, ...], step: int) -> None:
    def lose(toy: Toy) -> None:
        route = toy.swarm.route().hops
        lost = [toy[route["abc".index(name)].announcement.name] for name in names]

        def kill_all() -> None:
            for server in lost:
                server.kill()

        lost[0].before_step = at_step(step, kill_all)

    found = run_stepping(run(Faults(0), lose))
    assert found.recoveries >= 1


def test_what_takes_a_lost_hops_place_may_be_lost_too() -> None:
    def lose(toy: Toy) -> None:
        first, second = toy[middle(toy)], toy[spare(toy)]
        first.before_step = at_step(MID_ANSWER, first.kill)
        second.before_step = at_step(MID_PREFILL, second.kill)

    found = run_stepping(run(Faults(0), lose, SIX | {"b3": Span(2, 3), "b4": Span(3, 4)}))
    assert {"b3", "b4"} <= set(servers_of(found))


def test_a_hop_that_hangs_is_replaced_soon() -> None:
    async def hang(toy: Toy) -> float:
        server = toy[middle(toy)]
        server.before_step = at_step(MID_ANSWER, lambda: faults.hung.add(server.peer))
        await answer(toy)
        return asyncio.get_running_loop().time()

    faults = Faults(0)
    assert run_stepping(run(faults, ask=hang)) < 15.0
    assert faults.log


@pytest.mark.parametrize(
    "spoil",
    [
        lambda out: out[:, :2],
        lambda out: np.concatenate([out, out]),
        lambda out: out * np.float32("nan"),
        lambda out: out + np.float32("inf"),
    ],
)
@pytest.mark.parametrize("at", [0, 1])
def test_nonsense_is_replaced_and_blamed_on_who_said_it(spoil: Any, at: int) -> None:
    async def lie(toy: Toy) -> None:
        liar = toy[toy.swarm.route().hops[at].announcement.name]
        liar.before_step = at_step(MID_ANSWER, lambda: setattr(liar, "spoil", spoil))
        found = await answer(toy)
        assert found.recoveries == 1
        assert liar.name not in servers_of(found)
        assert all(hop.peer != liar.peer for hop in toy.swarm.route().hops)
        for server in toy.servers.values():
            server.complaints.clear()  # of what the liar passed on

    run_stepping(run(Faults(0), ask=lie))


def lies() -> dict[str, Callable[[AnyMessage], AnyMessage]]:
    """What a peer may say that is not so, and that can be known."""

    def changed(kind: type[messages.Message], **changes: Callable[[Any], Any]) -> Any:
        def lie(message: AnyMessage) -> AnyMessage:
            if not isinstance(message, kind):
                return message
            given = {name: change(getattr(message, name)) for name, change in changes.items()}
            return msgspec.structs.replace(message, **given)

        return lie

    return {
        "position": changed(Result, seq_pos=lambda at: at + 1),
        "number": changed(Result, number=lambda number: number + 1000),
        "session": changed(Result, session_id=lambda _: "f" * 32),
        "form": changed(Result, shape=lambda shape: (shape[0] * shape[-1],)),
        "held": changed(Opened, held=lambda _: 2**20),
        "opened": changed(Opened, session_id=lambda _: "f" * 32),
    }


@pytest.mark.parametrize("lie", lies().values(), ids=lies().keys())
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_peer_that_lies_is_replaced(lie: Callable[[AnyMessage], AnyMessage], at: int) -> None:
    async def ask(toy: Toy) -> None:
        liar = toy[toy.swarm.route().hops[at].announcement.name]
        liar.lie = lie
        assert liar.name not in servers_of(await answer(toy))

    run_stepping(run(Faults(0), ask=ask))


def test_a_peer_that_announces_more_than_it_has_is_passed_over() -> None:
    async def ask(toy: Toy) -> None:
        await toy.announce("a", start=0, end=3, throughput={"decode": 1e6})
        await toy.swarm.directory.refresh()
        await answer(toy)

    run_stepping(run(Faults(0), ask=ask))


@pytest.mark.parametrize("seconds", [0.5, 5.0, 40.0])
@pytest.mark.parametrize("pair", [("a", "b"), ("b", "c"), ("client", "b"), ("client", "a")])
def test_a_partition_that_heals_costs_time_alone(pair: tuple[str, str], seconds: float) -> None:
    async def ask(toy: Toy) -> None:
        sides = [toy[name].identity if name in toy.servers else name for name in pair]
        loop = asyncio.get_running_loop()
        loop.call_later(0.2, toy.network.partition, [sides[0]], [sides[1]])
        loop.call_later(0.2 + seconds, toy.network.heal)
        await answer(toy, count=40)

    run_stepping(run(Faults(0), spans=THREE, ask=ask))


@pytest.mark.parametrize("disturb", ["kill", "evict", "hang", "partition", "restart"])
def test_an_idle_chat_survives(disturb: str) -> None:
    faults = Faults(0)

    async def chat(toy: Toy) -> None:
        conversation = toy.swarm.conversation(room=500)
        found = await answer(toy, conversation=conversation)
        server = toy[servers_of(found)[1]]
        match disturb:
            case "kill":
                server.kill()
            case "evict":
                server.sessions.evict()
            case "hang":
                faults.hung.add(server.peer)
            case "partition":
                toy.network.partition([server.identity], ["client"])
            case "restart":
                server.kill()
                await server.revive()
        await asyncio.sleep(50.0)
        await answer(toy, [*PROMPT, *found.token_ids, 65, 66], conversation=conversation)
        await conversation.close()

    run_stepping(run(faults, ask=chat))


@pytest.mark.parametrize("can_hand_over", [True, False])
def test_who_leaves_hands_over_what_it_holds(can_hand_over: bool) -> None:
    async def ask(toy: Toy) -> None:
        leaver, taker = toy[middle(toy)], toy[spare(toy)]
        leaver.can_hand_over = can_hand_over
        leaving(toy)
        found = await answer(toy)
        assert taker.name in servers_of(found)
        assert bool(taker.adopted) == can_hand_over
        if can_hand_over:
            assert taker.tokens_stepped < COUNT, "what was handed over is not computed again"
        assert asyncio.get_running_loop().time() < 5.0, "nobody waits long for who leaves"

    run_stepping(run(Faults(0), ask=ask))


def test_an_answer_goes_on_at_who_leaves_until_somebody_can_take_it() -> None:
    """Neither waits for the other: the answer for a taker, nor the server for its patience to end."""

    async def ask() -> None:
        spans = THREE | {"late": Span(2, 4)}
        options = GenerationOptions(80, ignore_eos=True, speculate=False)
        async with trial(spans, Faults(0), announced=list(THREE)) as toy:
            toy["b"].seconds = 0.3
            leaving(toy)
            clock, gaps = asyncio.get_running_loop().time, []
            stream, before = toy.swarm.stream_tokens(PROMPT, options), None
            async for _ in stream:
                gaps.append(0.0 if before is None else clock() - before)
                before = clock()
                if len(gaps) == 20:
                    await toy.announce("late")
            assert stream.generation is not None
            assert list(stream.generation.token_ids) == toy.ends.expected(PROMPT, 80)
            assert servers_of(stream.generation) == ["a", "late", "c"]
            assert toy["late"].adopted
            assert max(gaps) < 1.0

    run_stepping(ask())


def test_who_leaves_without_a_taker_serves_until_it_is_gone() -> None:
    async def ask(toy: Toy) -> None:
        leaving(toy)
        assert await answer_or_error(toy, count=8)
        started = asyncio.get_running_loop().time()
        with pytest.raises(SwarmError):
            await answer(toy)
        assert asyncio.get_running_loop().time() - started < 2 * TIMEOUT

    run_stepping(run(Faults(0), spans=THREE, ask=ask))


@pytest.mark.parametrize("name", "abc")
@pytest.mark.parametrize("step", [1, MID_PREFILL, MID_ANSWER])
def test_a_loss_that_nobody_can_make_good_is_an_error_in_time(name: str, step: int) -> None:
    async def ask(toy: Toy) -> None:
        toy[name].before_step = at_step(step, toy[name].kill)
        with pytest.raises(SwarmError):
            await answer(toy)
        assert asyncio.get_running_loop().time() < 1.5 * TIMEOUT

    run_stepping(run(Faults(0), spans=THREE, ask=ask))


def moments(seed: int, count: int) -> list[int]:
    """Some of the first callbacks of a run, of which there are a few hundred to a few thousand."""
    rng = random.Random(seed)
    return [int(10 ** rng.uniform(0, 3.3)) for _ in range(count)]


@pytest.mark.parametrize("disturb", [undisturbed, killed, leaving, slow])
@pytest.mark.parametrize("moment", moments(1, 15))
def test_an_answer_given_up_at_any_moment_leaves_the_chat_as_it_was(disturb: Disturb, moment: int) -> None:
    async def ask(toy: Toy) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SteppingLoop)
        conversation = toy.swarm.conversation(room=500)
        asking = asyncio.create_task(answer(toy, conversation=conversation))
        loop.act_at(moment, asking.cancel)
        await asyncio.wait([asking])
        assert asking.cancelled() or not asking.exception()
        await answer(toy, PROMPT[:50], conversation=conversation)
        await conversation.close()

    run_stepping(run(Faults(0), disturb, ask=ask))


@pytest.mark.parametrize("name", "abc")
@pytest.mark.parametrize("moment", moments(2, 15))
def test_a_server_may_end_at_any_moment(name: str, moment: int) -> None:
    async def ask(toy: Toy) -> None:
        loop, ending = asyncio.get_running_loop(), []
        assert isinstance(loop, SteppingLoop)
        close = toy[name].transport.close
        loop.act_at(moment, lambda: ending.append(asyncio.create_task(close())))
        await answer(toy)
        await asyncio.gather(*ending)

    run_stepping(run(Faults(0), ask=ask))


MISHAPS = ("kill", "restart", "hang", "partition", "leave", "evict", "refuse")


async def befall(toy: Toy, faults: Faults) -> None:
    """One mishap after the other to servers drawn from `faults`."""
    rng = faults.rng
    while True:
        await asyncio.sleep(rng.expovariate(2.0))
        server, mishap = toy[rng.choice(sorted(toy.servers))], rng.choice(MISHAPS)
        faults.note(f"{mishap} {server.name}")
        match mishap:
            case "kill" if server.is_up:
                server.kill()
            case "restart" if server.cell.phase != "draining":
                if server.is_up:
                    server.kill()
                await server.revive()
            case "hang" if len(faults.hung) < 2:
                faults.hung.add(server.peer)
            case "partition":
                other = toy[rng.choice(sorted(toy.servers))]
                if other is not server:
                    toy.network.partition([server.peer], [other.peer, "client"][: rng.randint(1, 2)])
                asyncio.get_running_loop().call_later(rng.uniform(0, 20), toy.network.heal)
            case "leave" if server.is_up:
                await server.leave()
            case "evict":
                server.sessions.evict()
            case "refuse":
                server.refuse_steps.append(Error(code="no_capacity", message="full", retry_after=1.0))


@pytest.mark.parametrize("seed", range(100))
def test_frames_may_be_struck_by_chance(seed: int) -> None:
    rng = random.Random(-seed)
    chances = {act: rng.choice((0.0, 0.002, 0.01)) for act in ACTS}
    faults = Faults(seed, odds=Odds(seconds=rng.choice((0.05, 1.0, 10.0)), **chances))
    ask = partial(
        answer_or_error,
        count=rng.choice((COUNT, 40)),
        speculate=rng.random() < 0.5,
        sampling=rng.choice((GREEDY, SAMPLED)),
    )
    run_stepping(run(faults, spans=rng.choice(SWARMS), ask=ask))


@pytest.mark.parametrize("seed", range(100))
def test_servers_may_have_mishaps(seed: int) -> None:
    faults = Faults(seed, odds=Odds(lose=0.002, delay=0.005, cut=0.002))

    async def ask(toy: Toy) -> None:
        befalling = asyncio.create_task(befall(toy, faults))
        try:
            await answer_or_error(
                toy, count=40, speculate=seed % 2 == 0, sampling=SAMPLED if seed % 3 else GREEDY
            )
        finally:
            befalling.cancel()
            await asyncio.gather(befalling, return_exceptions=True)

    run_stepping(run(faults, spans=SWARMS[seed % len(SWARMS)], ask=ask))


def test_a_run_repeats_itself_from_its_seed() -> None:
    def log(seed: int) -> list[str]:
        faults = Faults(seed, odds=Odds(lose=0.01, delay=0.05, repeat=0.02, cut=0.01))
        run_stepping(run(faults, ask=answer_or_error))
        return faults.log

    assert log(7) == log(7) != log(8)
