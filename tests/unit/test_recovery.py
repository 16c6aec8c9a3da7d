"""Sessions on real engines whose hops are lost, hang or leave: they answer as if nothing had happened."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from swarm.blocks.engine import Engine, EngineConfig
from swarm.blocks.head import Head
from swarm.blocks.models import Model, resolve
from swarm.client.draft_model import DraftModel
from swarm.client.experience import PUSH_REST
from swarm.client.facade import Swarm
from swarm.client.options import GenerationOptions, SamplingOptions, SessionOptions
from swarm.client.session import Session
from swarm.dht.announcement import ModelEntry
from swarm.dht.joining import Network
from swarm.dht.memory import MemoryStore
from swarm.net.identity import Identity
from swarm.net.memory import MemoryNetwork
from swarm.net.transport import TransportError
from swarm.net.virtual_time import VirtualTimeLoop, in_virtual_time
from swarm.net.wire import Link
from swarm.server.server import Server, Shard
from swarm.spans import Span
from tests.tiny import tiny_model

LAN = Link(latency=0.02, bandwidth=1e7)
KV_TOKENS = 416
PROMPT = [5 + i * 11 % 90 for i in range(150)]
NEW_TOKENS = 12
SAMPLED = SamplingOptions(temperature=0.7, top_p=0.9, repetition_penalty=1.05, seed=11)


class Silent:
    """Implements `Events`."""

    def listening(self, *_: Any) -> None: ...
    def phase(self, *_: Any, **__: Any) -> None: ...
    def moving(self, *_: Any) -> None: ...
    def model(self, *_: Any, **__: Any) -> None: ...


@dataclass
class Place:
    """One server of the swarm: its life, and how to end it."""

    server: Server
    network: MemoryNetwork
    identity: Identity
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        try:
            await self.server.run(self.stop)
        except* TransportError:
            pass  # it was killed

    def kill(self) -> None:
        self.network.kill(self.identity)


@dataclass
class Several:
    """A swarm of named servers, and a client of it."""

    client: Swarm
    places: dict[str, Place]
    network: MemoryNetwork

    async def open(self, tokens: int = 400) -> Session:
        return await self.client.open_session([], needed=tokens)

    def place(self, session: Session, at: int) -> Place:
        """The server that is hop `at` of the session."""
        return next(one for one in self.places.values() if one.identity.peer == session.route.hops[at].peer)


@asynccontextmanager
async def several(
    model: Model,
    spans: dict[str, Span],
    *,
    engine_of: Callable[[str, Span, EngineConfig], Awaitable[Any]] | None = None,
    **options: Any,
) -> AsyncIterator[Several]:
    """Servers of `spans` and a client, on a network with distances, all on the loop's virtual clock.

    The servers' engines may be others: `engine_of` gives one for each name.
    """
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    network, store = MemoryNetwork(default_link=LAN), MemoryStore(loop.now)
    entry = ModelEntry(
        model_id=model.model_id, name="tiny", num_blocks=model.num_blocks, fingerprint=model.fingerprint
    )
    config = EngineConfig(dtype="float32", device="cpu", kv_tokens=KV_TOKENS)

    def place(name: str, span: Span) -> Place:
        identity = Identity.from_seed(name)

        async def load(span: Span, on_progress: Any, *, kv_tokens: int | None = None) -> Engine:
            if engine_of is not None:
                return await engine_of(name, span, config)
            return await Engine.load(model, span, config, on_progress)

        access = Network(identity, network.transport(identity), store.another())
        server = Server(Shard(entry, model.hidden_size, span, load), access, Silent(), name=name)
        return Place(server, network, identity)

    places = {name: place(name, span) for name, span in spans.items()}
    async with asyncio.TaskGroup() as tasks:
        for one in places.values():
            tasks.create_task(one.run())
        transport = network.transport("client")
        ends = Head.load(model, "float32", "cpu")
        async with Swarm(transport, store, model, ends, timeout=20.0, **options) as client:
            await client.wait_for_route()
            await client.directory.wait_for(lambda: len(serving(client)) == len(spans), 30.0)
            yield Several(client, places, network)
        await asyncio.sleep(2.0)
        for one in places.values():
            engine = one.server.cell.engine
            if engine is not None:
                assert engine.kv_tokens_left == KV_TOKENS, "sessions that have ended hold no memory"
            one.stop.set()


def serving(client: Swarm) -> list[str]:
    return [one.peer for one in client.directory.announcements if one.state == "serving"]


ONCE = {"a": Span(0, 2), "c": Span(2, 4), "e": Span(4, 6)}
TWICE = {
    "a": Span(0, 2),
    "b": Span(0, 2),
    "c": Span(2, 4),
    "d": Span(2, 4),
    "e": Span(4, 6),
    "f": Span(4, 6),
}

Disturb = Callable[[Several, Session, int], Any]


async def answer(
    swarm: Several, disturb: Disturb = lambda *_: None, session: Session | None = None
) -> list[int]:
    """Greedy tokens after PROMPT; `disturb` is called before each step with its number, 0 for the prompt."""
    session = session or await swarm.open()
    tokens, given = list(PROMPT), list(PROMPT)
    for number in range(NEW_TOKENS):
        disturb(swarm, session, number)
        at = len(tokens) - len(given)
        given = await session.next_tokens(given, at)
        tokens += given
    await session.close()
    return tokens[len(PROMPT) :]


@pytest.fixture(scope="module")
def model(checkpoint_of: Callable[[str], tuple[Path, Any]]) -> Model:
    return resolve(str(checkpoint_of("Llama")[0]))


@pytest.fixture(scope="module")
def undisturbed(model: Model) -> list[int]:
    @in_virtual_time
    async def alone() -> list[int]:
        async with several(model, {"whole": Span(0, 6)}) as swarm:
            return await answer(swarm)

    return alone()


def test_pushing_saves_the_way_back_to_the_client(model: Model, undisturbed: list[int]) -> None:
    @in_virtual_time
    async def seconds(push: bool) -> float:
        clock = asyncio.get_running_loop().time
        async with several(model, ONCE, sessions=SessionOptions(push=push)) as swarm:
            session = await swarm.open()
            await session.next_tokens(PROMPT, 0)
            await asyncio.sleep(1.0)
            since = clock()
            for at in range(5):
                await session.next_tokens([1], len(PROMPT) + at)
            took = (clock() - since) / 5
            await session.close()
            assert await answer(swarm) == undisturbed
            return took

    assert seconds(True) == pytest.approx(4 * LAN.latency, rel=0.05)
    assert seconds(False) == pytest.approx(6 * LAN.latency, rel=0.05)


def killing(at: int, when: int) -> Disturb:
    """Kills the session's hop `at` before step `when`."""

    def kill(swarm: Several, session: Session, number: int) -> None:
        if number == when:
            swarm.place(session, at).kill()

    return kill


@pytest.mark.parametrize(
    ("at", "when", "push"),
    [(0, 0, True), (0, 5, True), (1, 1, True), (1, 5, False), (2, 0, False), (2, 5, True)],
)
def test_a_hop_that_dies_is_replaced(
    model: Model, undisturbed: list[int], at: int, when: int, push: bool
) -> None:
    kill = killing(at, when)

    @in_virtual_time
    async def disturbed() -> None:
        async with several(model, TWICE, sessions=SessionOptions(push=push)) as swarm:
            session = await swarm.open()
            assert await answer(swarm, kill, session) == undisturbed
            assert session.recoveries == 1
            held = len(PROMPT) + when - 1 if when else 0
            assert held - 1 <= session.replayed_tokens <= held, "other hops keep what they hold"

    disturbed()


@pytest.mark.parametrize(("at", "when"), [(0, 4), (1, 0), (1, 4), (2, 4)])
def test_a_hop_that_leaves_hands_the_session_over(
    model: Model, undisturbed: list[int], at: int, when: int
) -> None:
    def leave(swarm: Several, session: Session, number: int) -> None:
        if number == when:
            swarm.place(session, at).stop.set()

    @in_virtual_time
    async def disturbed() -> None:
        async with several(model, TWICE) as swarm:
            session = await swarm.open()
            assert await answer(swarm, leave, session) == undisturbed
            assert session.recoveries == 1
            if when:
                assert session.handed_over_tokens >= len(PROMPT)
                assert not session.replayed_tokens

    disturbed()


@pytest.mark.parametrize(("at", "when", "push"), [(0, 5, True), (1, 5, True), (1, 8, False), (2, 5, True)])
def test_a_hop_that_dies_is_replaced_by_its_standby(
    model: Model, undisturbed: list[int], at: int, when: int, push: bool
) -> None:
    kill = killing(at, when)

    @in_virtual_time
    async def disturbed() -> None:
        options = SessionOptions(push=push, standby=True)
        async with several(model, TWICE, sessions=options) as swarm:
            session = await swarm.open(200)
            assert await answer(swarm, kill, session) == undisturbed
            assert (session.recoveries, session.stood_in_tokens) == (1, 128)
            assert session.replayed_tokens <= len(PROMPT) + when - 128

    disturbed()


@pytest.mark.parametrize("sampling", [SamplingOptions(), SAMPLED])
@pytest.mark.parametrize("seed", range(4))
def test_standbys_change_no_token_whoever_dies_and_whatever_is_drafted(
    model: Model, sampling: SamplingOptions, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drafts are mostly wrong, so what was copied is rolled back again and again."""
    monkeypatch.setattr(DraftModel, "took", lambda *_: None)
    options = GenerationOptions(max_new_tokens=40, ignore_eos=True, sampling=sampling)
    rng = random.Random(seed)
    times = sorted(rng.sample(range(5, 30), 2))

    @in_virtual_time
    async def tokens(is_disturbed: bool) -> tuple[Sequence[int], Session]:
        drafts = DraftModel(tiny_model("Llama", 1), 128)
        drafts.seconds_each = 0.001
        own = SessionOptions(standby=True)
        thrice = TWICE | {"g": Span(0, 2), "h": Span(2, 4), "i": Span(4, 6)}
        async with several(model, thrice, sessions=own, draft_model=drafts) as swarm:
            chat = swarm.client.conversation(room=220)
            stream = swarm.client.stream_tokens(PROMPT, options, chat)
            count = 0
            async for _ in stream:
                count += 1
                assert chat.session is not None
                if is_disturbed and times and count >= times[0]:
                    times.pop(0)
                    swarm.place(chat.session, rng.randrange(3)).kill()
            assert stream.generation is not None
            session = chat.session
            assert session is not None
            await chat.close()
            drafts.close()
            return stream.generation.token_ids, session

    expected, _ = tokens(False)
    found, session = tokens(True)
    assert found == expected
    assert session.recoveries >= 1
    assert session.stood_in_tokens


def test_several_hops_die_at_once(model: Model, undisturbed: list[int]) -> None:
    def kill(swarm: Several, session: Session, number: int) -> None:
        if number in (0, 5):
            for at in (number == 5, 1 + (number == 5)):
                swarm.place(session, int(at)).kill()

    @in_virtual_time
    async def disturbed() -> list[int]:
        more = {**TWICE, "g": Span(0, 3), "h": Span(3, 6), "i": Span(1, 5)}
        async with several(model, more) as swarm:
            return await answer(swarm, kill)

    assert disturbed() == undisturbed


def test_a_hop_that_hangs_is_replaced(model: Model, undisturbed: list[int]) -> None:
    def cut(swarm: Several, session: Session, number: int) -> None:
        if number == 3:
            peer = session.route.hops[1].peer
            others = [one.identity for one in swarm.places.values() if one.identity.peer != peer]
            swarm.network.partition([peer], [*others, "client"])

    @in_virtual_time
    async def disturbed() -> None:
        clock = asyncio.get_running_loop().time
        async with several(model, TWICE) as swarm:
            since = clock()
            assert await answer(swarm, cut) == undisturbed
            assert clock() - since < 20.0
            swarm.network.heal()

    disturbed()


def test_an_edge_that_is_cut_leads_through_the_client(model: Model, undisturbed: list[int]) -> None:
    def cut(swarm: Several, session: Session, number: int) -> None:
        if number == 3:
            one, other = session.route.hops[0].peer, session.route.hops[1].peer
            swarm.network.partition([one], [other])

    @in_virtual_time
    async def disturbed() -> None:
        async with several(model, ONCE) as swarm:
            session = await swarm.open()
            assert await answer(swarm, cut, session) == undisturbed
            assert session.recoveries == 0
            swarm.network.heal()

    disturbed()


def test_a_session_that_ends_breaks_no_edge(model: Model) -> None:
    @in_virtual_time
    async def ending() -> None:
        async with several(model, ONCE) as swarm:
            for place in list(swarm.places.values())[1:]:
                swarm.network.set_link("client", place.identity, latency=0.1)
            for _ in range(2):
                session = await swarm.open()
                await session.next_tokens(PROMPT, 0)
                await asyncio.sleep(1.0)
                linked = [leg.onward is not None for leg in session._relay.legs]
                assert linked == [True, True, False]
                await session.close()

    ending()


def test_an_edge_that_works_again_is_pushed_over_again(model: Model) -> None:
    @in_virtual_time
    async def seconds_a_step() -> list[float]:
        clock = asyncio.get_running_loop().time
        took = []
        async with several(model, ONCE) as swarm:
            session = await swarm.open()
            await session.next_tokens(PROMPT, 0)
            await asyncio.sleep(1.0)
            one, other = session.route.hops[0].peer, session.route.hops[1].peer

            async def steps() -> None:
                each = []
                for _ in range(3):
                    since = clock()
                    await session.next_tokens([1], len(session.tokens))
                    each.append(clock() - since)
                took.append(min(each))  # a server may measure its line beside one of them

            await steps()
            swarm.network.partition([one], [other])
            await steps()
            await steps()
            swarm.network.heal()
            await asyncio.sleep(PUSH_REST)
            await session.next_tokens([1], len(session.tokens))
            await asyncio.sleep(1.0)
            await steps()
            assert session.recoveries == 0
            await session.close()
        return took

    whole, _, cut, again = seconds_a_step()
    assert cut > 1.2 * whole
    assert again < 1.05 * whole
