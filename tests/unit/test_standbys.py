"""Standbys in a toy swarm: who takes over when a hop is lost, at any moment, and from what nobody goes on."""

import asyncio
import random
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from swarm.client.options import SessionOptions
from swarm.client.session import Session
from swarm.errors import SwarmError
from swarm.net import messages
from swarm.net.messages import AnyMessage, Opened
from swarm.server.giving_way import end_standbys, standbys_of
from swarm.spans import Span
from tests.faulty import ACTS, Act, Faults, Odds, Rule
from tests.stepping import run_stepping
from tests.toy_swarm import Toy, ToyServer, identity_of, letters
from tests.trial import DEADLINE, PROMPT, SIX, THREE, answer, trial

STANDBY = SessionOptions(standby=True)
STANDING = (
    messages.Open,
    messages.Opened,
    messages.Mirror,
    messages.Mirrored,
    messages.Feed,
    messages.Fed,
    messages.Adopt,
    messages.Adopted,
    messages.Held,
    messages.Unfed,
)
"""What is said between those that copy and are copied."""

NINE = SIX | {"a3": Span(0, 2), "b3": Span(2, 4), "c3": Span(4, 6)}


@pytest.mark.parametrize("lost", [(0,), (1,), (2,), (0, 1), (0, 1, 2)])
@pytest.mark.parametrize("push", [True, False])
def test_a_standby_goes_on_with_what_it_holds(lost: tuple[int, ...], push: bool) -> None:
    def kill(toy: Toy, session: Session) -> None:
        for server in [hop(toy, session, at) for at in lost]:
            server.kill()

    async def ask() -> Session:
        _, session = await asked_twice(kill, sessions=SessionOptions(standby=True, push=push))
        assert asyncio.get_running_loop().time() < 6.0, "nobody waits for another"
        return session

    session = run_stepping(ask())
    assert session.recoveries == len(lost)
    assert session.stood_in_tokens == 64 * len(lost)
    assert session.replayed_tokens <= 32 * len(lost), "what the standbys held is not computed again"


def kept(toy: Toy) -> dict[str, int]:
    """How many standbys each server has."""
    return {name: sum(asked.standby for asked in server.opened) for name, server in toy.servers.items()}


async def asked_twice(
    disturb: Callable[[Toy, Session], Any],
    spans: dict[str, Span] = SIX,
    *,
    rest: float = 2.0,
    sessions: SessionOptions = STANDBY,
    faults: Faults | None = None,
) -> tuple[Toy, Session]:
    """A chat of two turns with `disturb` in between, once all that there was could be copied."""
    async with trial(spans, faults or Faults(0), sessions=sessions) as toy:
        conversation = toy.swarm.conversation(room=500)
        first = await answer(toy, conversation=conversation)
        await asyncio.sleep(rest)
        session = conversation.session
        assert session is not None
        await asyncio.gather(*filter(None, [disturb(toy, session)]))
        await answer(toy, [*PROMPT, *first.token_ids, 65, 66], conversation=conversation)
        await conversation.close()
        return toy, session


def hop(toy: Toy, session: Session, at: int = 1) -> ToyServer:
    return next(one for one in toy.servers.values() if one.peer == session.route.hops[at].peer)


def test_there_are_none_unless_they_are_wanted_nor_for_little() -> None:
    def nothing(toy: Toy, session: Session) -> None:
        assert not any(kept(toy).values())

    run_stepping(asked_twice(nothing, sessions=SessionOptions()))

    async def little() -> None:
        async with trial(SIX, Faults(0), sessions=STANDBY) as toy:
            await answer(toy, PROMPT[:40])
            assert not any(kept(toy).values())

    run_stepping(little())


def test_it_is_told_who_took_over() -> None:
    gone: list[str] = []

    def kill(toy: Toy, session: Session) -> None:
        gone.append(hop(toy, session).name)
        hop(toy, session).kill()

    toy, session = run_stepping(asked_twice(kill))
    (change,) = session.changes
    assert [one.announcement.name for one in change.gone] == gone
    assert [toy[one.announcement.name].span for one in change.taken_by] == [Span(2, 4)]
    assert change.taken_by[0] == session.route.hops[1]


@pytest.mark.parametrize("at", [0, 1])
def test_nonsense_is_not_gone_on_from(at: int) -> None:
    def spoil(toy: Toy, session: Session) -> None:
        hop(toy, session, at).spoil = lambda out: out * np.float32("nan")

    _, session = run_stepping(asked_twice(spoil))
    assert (session.recoveries, session.stood_in_tokens) == (1, 0)
    assert session.replayed_tokens >= len(PROMPT)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_what_a_liar_gave_is_not_gone_on_from_nor_what_others_made_of_it(at: int) -> None:
    def catch(toy: Toy, session: Session) -> None:
        session.distrust(hop(toy, session, at).peer)

    toy, session = run_stepping(asked_twice(catch))
    assert (session.recoveries, session.stood_in_tokens) == (1, 0)
    assert hop(toy, session, at).tokens_stepped >= len(PROMPT)


def test_what_a_liar_gave_is_computed_again_where_it_was_taken_over() -> None:
    async def catch(toy: Toy, session: Session) -> None:
        liar = hop(toy, session)
        liar.kill()
        await session.next_tokens([7], len(session.tokens))
        assert session.stood_in_tokens == 64
        before = hop(toy, session).tokens_stepped
        session.distrust(liar.peer)
        await session.next_tokens([7], len(session.tokens))
        assert hop(toy, session).tokens_stepped >= before + len(PROMPT)

    _, session = run_stepping(asked_twice(catch))
    assert session.recoveries == 2


def test_a_standby_that_lied_elsewhere_takes_nobodys_place() -> None:
    def catch(toy: Toy, session: Session) -> None:
        for server in toy.servers.values():
            if kept(toy)[server.name]:
                session.distrust(server.peer)
        hop(toy, session).kill()

    _, session = run_stepping(asked_twice(catch, NINE))
    assert session.stood_in_tokens == 0


def test_a_standby_that_is_lost_has_a_successor() -> None:
    async def lose(toy: Toy, session: Session) -> None:
        for name, count in kept(toy).items():
            if count:
                toy[name].kill()
        await asyncio.sleep(10.0)
        await session.next_tokens([7], len(session.tokens))
        await asyncio.sleep(2.0)
        for at in range(3):
            hop(toy, session, at).kill()

    _, session = run_stepping(asked_twice(lose, NINE))
    assert session.stood_in_tokens == 3 * 64
    assert session.recoveries == 3


def test_a_standby_that_gave_way_is_missed_by_nobody() -> None:
    def crowd(toy: Toy, session: Session) -> None:
        for server in toy.servers.values():
            end_standbys(standbys_of(server.sessions._seats))

    _, session = run_stepping(asked_twice(crowd))
    assert (session.recoveries, session.stood_in_tokens) == (0, 0)
    assert session.copied_tokens == 3 * 64


def test_a_hop_that_leaves_is_replaced_by_its_standby() -> None:
    def leave(toy: Toy, session: Session) -> None:
        hop(toy, session).leave_meanwhile()

    _, session = run_stepping(asked_twice(leave))
    assert (session.recoveries, session.stood_in_tokens, session.handed_over_tokens) == (1, 64, 0)
    assert session.replayed_tokens <= 32


def test_a_copy_that_lacks_much_is_completed_where_the_hop_still_can() -> None:
    faults = Faults(0, [Rule("lose", messages.Held, times=100)])

    def leave(toy: Toy, session: Session) -> None:
        hop(toy, session).leave_meanwhile()

    _, session = run_stepping(asked_twice(leave, faults=faults))
    assert (session.recoveries, session.stood_in_tokens) == (1, 0)
    assert session.handed_over_tokens >= len(PROMPT)


@pytest.mark.parametrize("kind", [messages.Adopt, messages.Held], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(("at", "right"), [(10, 0), (40, 32)])
def test_what_was_written_anew_is_not_held_before_it_was_copied_anew(
    kind: type[messages.Message], at: int, right: int
) -> None:
    """The hop is lost while the standby holds, or has told of, what stood there before."""
    faults = Faults(0)

    async def rewrite(toy: Toy, session: Session) -> None:
        faults.rules = [Rule("delay", kind, times=100, seconds=20.0)]
        tokens = [*session.tokens[:at], *range(100, 180)]
        told = await session.next_tokens(tokens[at:], at)
        hop(toy, session).kill()
        tokens += [*told, 7]
        told = await session.next_tokens(tokens[-2:], len(tokens) - 2)
        assert told == [letters(sum(tokens), len(tokens))]
        assert session.stood_in_tokens == right

    run_stepping(asked_twice(rewrite, faults=faults))


def test_servers_that_know_no_standbys_are_asked_for_none() -> None:
    def forget(message: AnyMessage) -> AnyMessage:
        return msgspec.structs.replace(message, mirrors=False) if isinstance(message, Opened) else message

    async def ask() -> None:
        async with trial(SIX, faults := Faults(0), sessions=STANDBY) as toy:
            for server in toy.servers.values():
                server.lie = forget
            await answer(toy)
            assert not any(kept(toy).values())
            assert not faults.seen["Mirror"]

    run_stepping(ask())


def test_a_standby_is_no_peer_that_may_not_see_the_blocks() -> None:
    trusted = [identity_of(name).peer for name in ("a", "c")]
    options = SessionOptions(standby=True, trust_first_last=trusted)

    def look(toy: Toy, session: Session) -> None:
        found = kept(toy)
        assert not any(found[name] for name in ("a", "a2", "c", "c2"))
        assert found["b"] + found["b2"] == 1

    run_stepping(asked_twice(look, sessions=options))


def test_no_peer_gets_more_blocks_by_standing_by() -> None:
    def look(toy: Toy, session: Session) -> None:
        is_hop = any(one.announcement.name == "all" for one in session.route.hops)
        assert kept(toy)["all"] == 1 - is_hop

    options = SessionOptions(standby=True, max_share=0.4)
    run_stepping(asked_twice(look, THREE | {"all": Span(0, 6)}, sessions=options))


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("kind", STANDING, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("skip", [0, 3])
def test_each_message_may_be_struck(kind: type[messages.Message], act: Act, skip: int) -> None:
    """A hop is lost soon after: whoever takes over, with however much, the answer is exact."""
    faults = Faults(0, [Rule(act, kind, skip=skip, seconds=3.0)])

    async def lose(toy: Toy, session: Session) -> None:
        hop(toy, session).kill()

    run_stepping(asked_twice(lose, rest=0.2, faults=faults))


async def write_and_rewrite(session: Session, rng: random.Random, steps: int) -> None:
    """Steps of any size, each from where the sequence ends or from somewhere before; all must be exact."""
    tokens: list[int] = []
    for _ in range(steps):
        at = len(tokens)
        if at and rng.random() < 0.3:
            at = rng.randrange(max(at - rng.choice((3, 40, 400)), 0), at)
        given = [rng.randrange(256) for _ in range(min(rng.choice((1, 1, 5, 40)), 600 - at))]
        if not given:
            continue
        tokens[at:] = given
        rows = rng.randint(1, min(len(given), 8))
        async with asyncio.timeout(DEADLINE):
            told = await session.next_tokens(given, at, rows=rows)
        ends = range(len(tokens) - rows + 1, len(tokens) + 1)
        assert told == [letters(sum(tokens[:end]), end) for end in ends]
        await asyncio.sleep(rng.choice((0.0, 0.05, 0.5)))


async def lose_some(toy: Toy, rng: random.Random, faults: Faults) -> None:
    """Kill one or several servers now and then; those that are gone come back."""
    while True:
        await asyncio.sleep(rng.expovariate(0.7))
        up = sorted(server.name for server in toy.servers.values() if server.is_up)
        for name in rng.sample(sorted(toy.servers), rng.choice((1, 1, 2))):
            server = toy[name]
            if not server.is_up:
                await server.revive()
            elif any(toy[other].span == server.span for other in up if other != name):
                faults.note(f"kill {name}")
                server.kill()
                up.remove(name)
            elif server.is_up:
                faults.note(f"evict {name}")
                server.sessions.evict()


@pytest.mark.parametrize("seed", range(60))
def test_hops_and_standbys_may_be_lost_at_any_moment(seed: int) -> None:
    """While copies are under way, one, the other or both, again and again, and with rollbacks in between."""
    rng = random.Random(seed)
    faults = Faults(seed, odds=Odds(delay=rng.choice((0.0, 0.02)), seconds=0.3))

    async def ask() -> None:
        options = SessionOptions(standby=True, push=rng.random() < 0.7)
        async with trial(NINE, faults, sessions=options) as toy:
            for server in toy.servers.values():
                server.seconds = rng.choice((0.0, 0.02))
            session = await toy.swarm.open_session([], needed=600)
            losing = asyncio.create_task(lose_some(toy, rng, faults))
            try:
                await write_and_rewrite(session, rng, 60)
                await session.close()
            except SwarmError as error:
                faults.note(str(error))
            finally:
                losing.cancel()
                await asyncio.gather(losing, return_exceptions=True)

    run_stepping(ask())
