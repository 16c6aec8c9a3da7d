"""Hops that go further rounds by themselves: fewer trips, the same tokens, and no further than is wanted."""

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from swarm.client.inputs import Wired
from swarm.client.options import GenerationOptions, SamplingOptions, SessionOptions
from swarm.client.rounds import Rounds, Told, further_rounds, whole_rounds
from swarm.client.sampling import Sampler
from swarm.net.messages import AnyMessage, Error, Link, Opened, Result, Step
from swarm.net.virtual_time import in_virtual_time
from swarm.page_keys import PAGE_TOKENS
from swarm.spans import Span
from tests.faulty import Faults, Rule
from tests.stepping import run_stepping
from tests.toy_swarm import GREEDY, Toy, ToyServer, letters, scripted, toy_swarm
from tests.trial import LATENCY, PROMPT, SAMPLED, SIX, THREE, answer, at_step, servers_of, trial

WHOLE = {"a": Span(0, 6)}
TWO = {"a": Span(0, 3), "b": Span(3, 6)}
TEXT = b"never more than this, and not a word beyond it: the end."
COUNT = 60
MID_ROUND = 20
"""A step of every server, of an answer of `COUNT` tokens, that hops go on with by themselves."""


def rounds_of(server: ToyServer) -> list[int]:
    """How many rounds were to follow, of each step that the server was asked."""
    return [step.rounds for step in server.received]


async def seconds(spans: dict[str, Span], sampling: SamplingOptions, **options: Any) -> float:
    async with trial(spans, Faults(0), **options) as toy:
        started = asyncio.get_running_loop().time()
        await answer(toy, count=COUNT, speculate=False, sampling=sampling)
        return asyncio.get_running_loop().time() - started


KINDS = pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])


@KINDS
@pytest.mark.parametrize(("spans", "edges"), [(WHOLE, 0), (TWO, 2), (THREE, 3)])
def test_a_token_costs_one_trip_along_the_route(
    spans: dict[str, Span], edges: int, sampling: SamplingOptions
) -> None:
    """The way to the client and back is spared, but once a page and for the first tokens."""

    async def both() -> None:
        alone = await seconds(spans, sampling)
        driven = await seconds(spans, sampling, sessions=SessionOptions(push=False))
        assert driven > COUNT * 2 * len(spans) * LATENCY
        assert alone < (COUNT * edges + 22) * LATENCY

    run_stepping(both())


def test_hops_go_no_further_than_the_answer() -> None:
    async def ask(toy: Toy) -> None:
        toy.ends.next_token = scripted(len(PROMPT), TEXT)
        for server in toy.servers.values():
            server.tells = toy.ends.next_token
        options = GenerationOptions(max_new_tokens=200, speculate=False)
        found = await toy.swarm.stream_tokens(PROMPT, options).result()
        assert (found.text, found.finish_reason) == (TEXT.decode(), "stop")
        await asyncio.sleep(1.0)
        for server in toy.servers.values():
            assert max(rounds_of(server)) > 0
            assert max(at for at, _ in server.steps) == len(PROMPT) + len(TEXT) - 1
            assert len(set(server.steps)) == len(server.steps)

    async def run() -> None:
        async with trial(THREE, Faults(0)) as toy:
            await ask(toy)

    run_stepping(run())


def test_hops_stop_soon_after_an_answer_that_they_do_not_know_to_be_over() -> None:
    """A stop string is the client's: the next turn goes on where the answer ends, not the hops."""

    async def run() -> None:
        async with trial(THREE, Faults(0)) as toy:
            toy.ends.next_token = scripted(len(PROMPT), 2 * TEXT)
            for server in toy.servers.values():
                server.tells, server.seconds = toy.ends.next_token, 0.1
            stop = "beyond"
            conversation = toy.swarm.conversation(room=500)
            options = GenerationOptions(max_new_tokens=60, stop=(stop,), speculate=False)
            found = await toy.swarm.stream_tokens(PROMPT, options, conversation).result()
            assert found.text == TEXT.decode().split(stop)[0]
            await asyncio.sleep(3.0)
            last = max(at for at, _ in toy["a"].steps)
            assert last < len(PROMPT) + len(found.token_ids) + 4, "no more than a second has"
            await answer(toy, [*PROMPT, *found.token_ids, 65], 30, conversation, speculate=False)
            await conversation.close()

    run_stepping(run())


@pytest.mark.parametrize(
    ("old", "unknown", "sampling"),
    [
        *(
            (name, {"goes_round": False, "samples": False}, kind)
            for name in "abc"
            for kind in (GREEDY, SAMPLED)
        ),
        ("c", {"samples": False}, SAMPLED),
    ],
)
def test_hops_are_asked_for_no_rounds_that_they_do_not_know(
    old: str, unknown: dict[str, bool], sampling: SamplingOptions
) -> None:
    def unaware(message: AnyMessage) -> AnyMessage:
        return msgspec.structs.replace(message, **unknown) if isinstance(message, Opened) else message

    async def run() -> None:
        async with trial(THREE, Faults(0)) as toy:
            toy[old].lie = unaware
            await answer(toy, count=COUNT, speculate=False, sampling=sampling)
            for server in toy.servers.values():
                assert not any(rounds_of(server))

    run_stepping(run())


@pytest.mark.parametrize(
    "more",
    [{"repetition_penalty": 1.2}, {"presence_penalty": 1.0}, {"logit_bias": {70: 3.0}}],
    ids=lambda more: next(iter(more)),
)
def test_what_hangs_on_the_tokens_before_is_chosen_by_the_client_alone(more: dict[str, Any]) -> None:
    async def run() -> None:
        async with trial(THREE, Faults(0)) as toy:
            sampling = SamplingOptions(temperature=2.0, seed=1, **more)
            await answer(toy, count=30, speculate=False, sampling=sampling)
            for server in toy.servers.values():
                assert not any(rounds_of(server))

    run_stepping(run())


def test_scored_answers_go_round_too() -> None:
    async def run() -> None:
        async with trial(THREE, Faults(0)) as toy:
            options = GenerationOptions(COUNT, ignore_eos=True, speculate=False, logprobs=2)
            stream = toy.swarm.stream_tokens(PROMPT, options)
            await stream.result()
            told = stream.tokens_after(0, hidden=True)
            assert [one.token for one in told] == toy.ends.expected(PROMPT, COUNT)
            assert all(one.score is not None and one.score.logprob > -0.1 for one in told)
            assert max(rounds_of(toy["a"])) > 10

    run_stepping(run())


@KINDS
@pytest.mark.parametrize("spans", [WHOLE, THREE], ids=["whole", "three"])
def test_hops_are_brought_the_next_round_before_the_client_has_chosen_its_token(
    spans: dict[str, Span], sampling: SamplingOptions
) -> None:
    """However long that takes: its head takes as long as ten rounds of all hops do."""
    head, tokens = 0.1, 100

    async def run() -> None:
        async with trial(spans, Faults(0)) as toy:
            for server in toy.servers.values():
                server.seconds = 0.005
            session = await toy.swarm.open_session(PROMPT, needed=200)
            by_logits = Sampler(sampling).by_logits_alone
            sequence = [*PROMPT, 66]
            await session.step(sequence, 0)
            for _ in range(10):  # until all hops are linked
                sequence += toy.ends.expected(sequence, 1, sampling)
                await session.step(sequence[-1:], len(sequence) - 1, rounds=32, sampling=by_logits)
            on_their_way = 0
            for _ in range(tokens):
                await asyncio.sleep(head)
                sequence += toy.ends.expected(sequence, 1, sampling)
                await session.step(sequence[-1:], len(sequence) - 1, rounds=32, sampling=by_logits)
                on_their_way += session.went_round
            assert on_their_way == tokens
            await session.close()

    run_stepping(run())


def test_a_last_hop_that_samples_a_token_that_there_is_not_is_lost() -> None:
    def lie(message: AnyMessage) -> AnyMessage:
        is_told = isinstance(message, Result) and message.token is not None
        return msgspec.structs.replace(message, token=257) if is_told else message

    async def run() -> None:
        async with trial(SIX, Faults(0)) as toy:
            last = toy[toy.swarm.route().hops[2].announcement.name]
            last.lie = lie
            found = await answer(toy, count=COUNT, speculate=False, sampling=SAMPLED)
            assert found.recoveries == 1
            assert last.name not in servers_of(found)

    run_stepping(run())


@pytest.mark.parametrize("often", [1, 3, 40])
def test_a_last_hop_that_samples_otherwise_changes_no_token(often: int) -> None:
    """It is asked for no further rounds while most of them are in vain."""

    def otherwise(total: int, count: int) -> int:
        return letters(total, count) if count % often else 66

    async def run() -> None:
        async with trial(THREE, Faults(0)) as toy:
            toy["c"].tells = otherwise
            await answer(toy, count=90, speculate=False, sampling=SamplingOptions(temperature=0.1))
            in_vain = toy["a"].tokens_stepped - len(PROMPT) - 89
            assert in_vain < 40

    run_stepping(run())


def full(server: ToyServer) -> None:
    server.refuse_steps.append(Error(code="no_capacity", message="full", retry_after=0.5))


def nonsense(server: ToyServer) -> None:
    """Hidden states that are no numbers, as far as it gives any: whatever token it told might be right."""
    if server.span.end < 6:
        server.spoil = lambda out: out * float("nan")
    else:
        server.refuse_steps.append(Error(code="internal", message="The model gave no numbers."))


MISHAPS: dict[str, Callable[[ToyServer], Any]] = {
    "dies": ToyServer.kill,
    "leaves": ToyServer.leave_meanwhile,
    "is full": full,
    "gives nonsense": nonsense,
    "lets go": lambda server: server.sessions.evict(),
}


@pytest.mark.parametrize(("mishap", "at"), [(name, at) for name in MISHAPS for at in (0, 1, 2)])
@pytest.mark.parametrize("step", [MID_ROUND, MID_ROUND + 7])
@KINDS
def test_a_hop_may_fail_in_any_round(mishap: str, at: int, step: int, sampling: SamplingOptions) -> None:
    async def run() -> None:
        async with trial(SIX, Faults(0)) as toy:
            server = toy[toy.swarm.route().hops[at].announcement.name]
            server.before_step = at_step(step, lambda: MISHAPS[mishap](server))
            found = await answer(toy, count=COUNT, speculate=False, sampling=sampling)
            assert rounds_of(server)[step - 1] > 0, "the mishap was not in a round"
            assert found.recoveries == (mishap != "is full")
            for other in toy.servers.values():
                other.complaints.clear()  # of what came of nonsense

    run_stepping(run())


@KINDS
@pytest.mark.parametrize("pair", [("a", "b"), ("b", "c"), ("c", "a")])
def test_an_edge_that_breaks_in_a_round_is_led_through_the_client(
    pair: tuple[str, str], sampling: SamplingOptions
) -> None:
    async def run() -> None:
        async with trial(THREE, Faults(0)) as toy:
            one, other = (toy[name] for name in pair)
            cut = at_step(MID_ROUND, lambda: toy.network.partition([one.identity], [other.identity]))
            one.before_step = cut
            started = asyncio.get_running_loop().time()
            found = await answer(toy, count=COUNT, speculate=False, sampling=sampling)
            assert found.recoveries == 0
            assert servers_of(found) == ["a", "b", "c"]
            assert asyncio.get_running_loop().time() - started < 20.0, "it is noticed once"

    run_stepping(run())


@KINDS
@pytest.mark.parametrize("skip", range(0, 12, 3))
def test_a_token_that_gets_lost_between_hops_is_brought_again(skip: int, sampling: SamplingOptions) -> None:
    async def run() -> None:
        faults = Faults(0)
        async with trial(THREE, faults) as toy:
            rule = Rule("lose", Step, source=toy["c"].peer, target=toy["a"].peer, skip=skip)
            faults.rules = (rule,)
            await answer(toy, count=COUNT, speculate=False, sampling=sampling)
            assert not rule.times, "none was lost"

    run_stepping(run())


@pytest.mark.parametrize("standby", [False, True])
def test_a_session_that_takes_another_token_than_was_told_is_as_exact(standby: bool) -> None:
    async def run() -> None:
        options = SessionOptions(standby=standby)
        async with trial(SIX, Faults(0), sessions=options) as toy:
            session = await toy.swarm.open_session([], needed=300)
            tokens = list(PROMPT)
            tokens += await session.next_tokens(tokens, 0)
            for number in range(60):
                told = await session.next_tokens(tokens[-1:], len(tokens) - 1, rounds=31)
                assert told == toy.ends.expected(tokens, 1)
                tokens += told if number % 9 else [65 + number % 26]
                if number == 40:
                    dead = session.route.hops[1].announcement.name
                    toy[dead].kill()
            assert session.recoveries == 1
            await session.close()

    run_stepping(run())


@in_virtual_time
async def test_a_link_for_tokens_is_for_hops_that_tell_some() -> None:
    links: list[Link] = []
    async with toy_swarm(THREE) as toy:
        for server in toy.servers.values():
            server.tells = letters
        hears = ToyServer.hears

        def noted(self: ToyServer, message: AnyMessage) -> AnyMessage | None:
            if isinstance(message, Link):
                links.append(message)
            return hears(self, message)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ToyServer, "hears", noted)
            await answer(toy, count=20, speculate=False)
    assert [(link.dtype, link.codec, link.peer) for link in links if link.dtype == "uint32"] == [
        ("uint32", "raw", toy["a"].peer)
    ]


def told(token: int) -> Told:
    return Told(Wired(memoryview(token.to_bytes(4, "little")), (1,), "uint32", "raw"), token)


def test_rounds_know_which_steps_they_are_and_what_those_told() -> None:
    rounds = Rounds(number=7, end=50, count=3, response_type="token_ids")
    assert [number in rounds for number in (6, 7, 10, 11)] == [False, True, True, False]
    assert [rounds.covers(end) for end in (49, 50, 53, 54)] == [False, True, True, False]
    assert rounds.begins_untold == (7, 49)
    rounds.tell(50, told(5))
    assert rounds.begins_untold == (8, 50)
    assert rounds.token(50) == 5
    assert rounds.token(51) is None, "none was told yet"
    rounds.tell(51, told(9))
    assert [rounds.given(end) for end in (50, 51, 52)] == [told(5).given, told(9).given, None]
    rounds.stop()
    assert not rounds.covers(52)
    assert rounds.token(50) == 5, "what it gives is known"
    assert rounds.token(51) is None
    assert rounds.given(50) is not None
    assert rounds.token(50) == 5


def test_rounds_may_begin_with_a_token_that_was_foretold() -> None:
    rounds = Rounds(number=7, end=50, count=0, response_type="hidden_states", foretold=8)
    assert (rounds.token(49), rounds.token(50)) == (8, None)
    assert rounds.last_token(50) is None, "it was not told yet"
    rounds.tell(50, told(5))
    assert rounds.last_token(50) == 5
    assert rounds.token(50) is None, "nobody goes on with it"
    longer = Rounds(number=7, end=50, count=1, response_type="hidden_states")
    longer.tell(50, told(5))
    assert longer.last_token(50) is None, "another round goes on with it"
    assert longer.token(49) is None


def test_what_nobody_was_told_is_none_of_them_once_they_are_stopped() -> None:
    rounds = Rounds(number=7, end=50, count=3, response_type="token_ids")
    rounds.stop()
    assert not any(number in rounds for number in range(6, 12))
    assert not any(rounds.covers(end) for end in range(48, 55))


def test_further_rounds_are_the_same_step_further_on() -> None:
    step = Step(
        session_id="1" * 32,
        number=4,
        seq_pos=31,
        payload_type="hidden_states",
        response_type="hidden_states",
        shape=(1, 8),
        dtype="float16",
        page_keys=b"k" * 16,
        rounds=2,
        ends=(3,),
    )
    one, two = further_rounds(step)
    assert (one.number, one.seq_pos, one.rounds, one.page_keys) == (5, 32, 1, b"")
    assert (two.number, two.seq_pos, two.rounds, two.shape, two.ends) == (6, 33, 0, (1, 8), (3,))


def test_no_round_fills_a_page_that_hops_cannot_name() -> None:
    for end in range(1, 3 * PAGE_TOKENS):
        count = whole_rounds(31, end)
        assert not any((position + 1) % PAGE_TOKENS == 0 for position in range(end, end + count))
        assert count == 31 or (end + count + 1) % PAGE_TOKENS == 0
