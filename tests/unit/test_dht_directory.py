"""The directory: merging is pure; the live view runs on the in-process store, network and clock."""

import asyncio
import logging

import msgspec
import pytest

from swarm.dht import directory as room
from swarm.dht.announcement import MODELS_KEY, Announcement, ModelEntry, PeerState, block_key, encode
from swarm.dht.announcer import Announcer
from swarm.dht.directory import (
    Directory,
    Listing,
    in_turn,
    list_models,
    list_peers,
    listed_models,
    merge,
    present,
    sample,
)
from swarm.dht.memory import MemoryStore
from swarm.dht.records import SignedRecord, sign
from swarm.errors import SwarmError
from swarm.net.calls import MessageStream
from swarm.net.identity import Identity
from swarm.net.memory import MemoryNetwork
from swarm.net.messages import Ping, Pong
from swarm.net.transport import Stream, StreamClosed
from swarm.net.virtual_time import VirtualTimeLoop, in_virtual_time
from swarm.spans import Span

NOW = 1000.0
BLOCKS = 6
MODEL = ModelEntry(model_id="m", name="tiny", num_blocks=BLOCKS, fingerprint="f")
ALICE, BOB, CAROL = (Identity.from_seed(name) for name in ("alice", "bob", "carol"))


def says(who: Identity, start: int, end: int, state: PeerState = "serving", **more: object) -> Announcement:
    return Announcement(peer=who.peer, model_id="m", start=start, end=end, state=state, **more)  # type: ignore[arg-type]


def record(
    who: Identity, said: Announcement, expires_at: float = NOW + 30, block: int | None = None
) -> SignedRecord:
    return sign(who, block_key("m", said.start if block is None else block), encode(said), expires_at)


class TestMerge:
    def test_lists_each_peer_once_however_many_blocks_name_it(self) -> None:
        said = says(ALICE, 0, 3)
        records = [record(ALICE, said, block=block) for block in range(3)]
        listings, dropped = merge({}, [*records, record(BOB, says(BOB, 3, 6))], BLOCKS, NOW)
        assert present(listings, NOW) == [said, says(BOB, 3, 6)]
        assert not dropped

    def test_the_newest_wins_in_any_order_and_across_refreshes(self) -> None:
        old, new = record(ALICE, says(ALICE, 0, 3), NOW + 10), record(ALICE, says(ALICE, 2, 5), NOW + 20)
        for records in ([old, new], [new, old]):
            listings, _ = merge({}, records, BLOCKS, NOW)
            assert listings == {ALICE.peer: Listing(says(ALICE, 2, 5), NOW + 20)}
            assert merge(listings, [old], BLOCKS, NOW)[0] == listings

    def test_what_expired_vanishes(self) -> None:
        listings, _ = merge({}, [record(ALICE, says(ALICE, 0, 3), NOW + 10)], BLOCKS, NOW)
        assert present(listings, NOW + 9.9)
        assert not present(listings, NOW + 10)
        assert merge(listings, [], BLOCKS, NOW + 10) == ({}, {})

    def test_who_left_stays_away(self) -> None:
        old = record(ALICE, says(ALICE, 0, 3), NOW + 10)
        left = record(ALICE, says(ALICE, 0, 3, "left"), NOW + 11)
        listings, _ = merge({}, [old, left], BLOCKS, NOW)
        listings, _ = merge(listings, [old], BLOCKS, NOW)
        assert present(listings, NOW) == []

    def test_a_replay_of_what_is_known_is_not_even_read(self) -> None:
        listings, _ = merge({}, [record(ALICE, says(ALICE, 0, 3))], BLOCKS, NOW)
        noise = sign(ALICE, "m.1", b"noise", NOW + 30)
        assert merge(listings, [noise], BLOCKS, NOW) == (listings, {})

    def test_malformed_records_are_dropped_and_counted(self) -> None:
        records = [
            sign(ALICE, "m.1", b"noise", NOW + 30),
            sign(BOB, "m.1", encode(says(ALICE, 0, 3)), NOW + 30),
            record(CAROL, says(CAROL, 0, 3), block=5),
            record(CAROL, says(CAROL, 4, 7)),
        ]
        listings, dropped = merge({}, records, BLOCKS, NOW)
        assert listings == {}
        assert dropped == {"bad_body": 1, "not_its_own": 1, "misplaced": 2}

    def test_a_crowd_is_bounded_and_does_not_push_out_the_known(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(room, "MAX_PEERS", 2)
        listings, _ = merge({}, [record(who, says(who, 0, 3)) for who in (ALICE, BOB)], BLOCKS, NOW)
        news = [record(CAROL, says(CAROL, 0, 3)), record(ALICE, says(ALICE, 3, 6), NOW + 40)]
        listings, dropped = merge(listings, news, BLOCKS, NOW)
        assert present(listings, NOW) == [says(BOB, 0, 3), says(ALICE, 3, 6)]
        assert dropped == {"too_many": 1}


def crowd(count: int, blocks: int = BLOCKS) -> list[Announcement]:
    """Servers of one block each, the first ones of the first blocks."""
    return [
        Announcement(peer=f"peer {number}", model_id="m", start=block, end=block + 1, state="serving")
        for number in range(count)
        for block in [number * blocks // count]
    ]


def test_where_not_all_are_listed_all_blocks_have_their_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MAX_PEERS", 2 * BLOCKS)
    many = [Identity.from_seed(f"peer {number}") for number in range(5 * BLOCKS)]
    by_block = [
        [record(who, says(who, block, block + 1)) for who in many[block::BLOCKS]] for block in range(BLOCKS)
    ]
    listings, _ = merge({}, in_turn(by_block), BLOCKS, NOW)
    assert room.holders(present(listings, NOW), BLOCKS, room.SERVING) == [2] * BLOCKS


def test_peers_draw_samples_of_their_own_that_hold_all_blocks() -> None:
    servers = crowd(600)
    drawn = {who.peer: sample(servers, 60, who.peer) for who in (ALICE, BOB)}
    for peer, some in drawn.items():
        assert len({one.peer for one in some}) == 60
        assert min(room.holders(some, BLOCKS, room.SERVING)) >= 3
        left = [one for one in servers if one != some[0]]
        assert sample(left, 60, peer)[:59] == some[1:], "the others stay who they are"
    assert drawn[ALICE.peer] != drawn[BOB.peer]
    assert sample(servers[:60], 60, ALICE.peer) == servers[:60]


def test_models_are_listed_once_and_as_most_peers_say() -> None:
    wrong = msgspec.structs.replace(MODEL, num_blocks=999)
    other = ModelEntry(model_id="a", name="a", num_blocks=1, fingerprint="g")
    entries = [(ALICE, MODEL), (BOB, wrong), (CAROL, MODEL), (Identity.from_seed("dave"), other)]
    records = [sign(who, MODELS_KEY, encode(entry), NOW) for who, entry in entries]
    noise = sign(Identity.from_seed("eve"), MODELS_KEY, b"noise", NOW)
    assert listed_models([noise, *records]) == [other, MODEL]


class Swarm:
    """A store, a network, and servers that announce themselves and answer pings."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        self.loop = loop
        self.network = MemoryNetwork()
        self.store = MemoryStore(loop.now)
        self.directory = Directory(
            self.store.another(),
            self.network.transport("client"),
            MODEL.model_id,
            MODEL.num_blocks,
        )

    async def serve(self, who: Identity, said: Announcement) -> Announcer:
        await self.network.transport(who).listen(_answer_pings)
        announcer = Announcer(self.store.another(), who, MODEL)
        await announcer.publish(said)
        return announcer

    @property
    def reader(self) -> MemoryStore:
        store = self.directory._store
        assert isinstance(store, MemoryStore)
        return store


async def _answer_pings(stream: Stream) -> None:
    messages = MessageStream(stream)
    try:
        while True:
            asked, _ = await messages.receive()
            assert isinstance(asked, Ping)
            await messages.send(Pong(nonce=asked.nonce))
    except StreamClosed:
        return


@in_virtual_time
async def test_coverage_missing_and_joining() -> None:
    swarm = Swarm()
    await swarm.serve(ALICE, says(ALICE, 1, 3))
    await swarm.serve(BOB, says(BOB, 2, 4))
    await swarm.serve(CAROL, says(CAROL, 3, 5, "joining", progress=0.5))
    view = swarm.directory
    assert view.missing() == [Span(0, 6)], "nothing is known before the first reading"
    await view.refresh()
    assert view.coverage() == [0, 1, 2, 1, 0, 0]
    assert view.missing() == [Span(0, 1), Span(4, 6)]
    assert view.missing({"serving", "joining"}) == [Span(0, 1), Span(5, 6)]
    assert [said.peer for said in view.joining()] == [CAROL.peer]
    assert view.models() == [MODEL]


@in_virtual_time
async def test_the_view_is_kept_fresh() -> None:
    swarm = Swarm()
    async with swarm.directory as view:
        await asyncio.sleep(0.1)
        assert view.announcements == []
        announcer = await swarm.serve(ALICE, says(ALICE, 0, 6))
        await asyncio.sleep(room.PERIOD)
        assert view.announcements == [says(ALICE, 0, 6)]
        await announcer.withdraw()
        await asyncio.sleep(room.PERIOD)
        assert view.announcements == []


@in_virtual_time
async def test_a_peer_that_died_is_forgotten_when_its_announcement_expires() -> None:
    swarm = Swarm()
    await swarm.serve(ALICE, says(ALICE, 0, 6))
    async with swarm.directory as view:
        await asyncio.sleep(29.9)
        assert len(view.announcements) == 1
        await asyncio.sleep(0.2)
        assert view.announcements == []


@in_virtual_time
async def test_waiting_wakes_soon_after_the_change() -> None:
    swarm = Swarm()
    async with swarm.directory as view:
        await asyncio.sleep(1)
        swarm.loop.call_later(
            21.5, lambda: tasks.append(swarm.loop.create_task(swarm.serve(ALICE, says(ALICE, 0, 6))))
        )
        tasks: list[asyncio.Task[Announcer]] = []
        assert await view.wait_for(lambda: not view.missing(), 60)
        assert 22.5 <= swarm.loop.time() <= 22.5 + room.EAGER_PERIOD + 0.1


@in_virtual_time
async def test_in_a_hurry_the_dht_is_read_before_it_is_due() -> None:
    swarm = Swarm()
    async with swarm.directory as view:
        await asyncio.sleep(1)
        await swarm.serve(ALICE, says(ALICE, 0, 6))
        await asyncio.sleep(0.1)
        assert view.announcements == []
        view.hurry()
        await asyncio.sleep(0.1)
        assert view.announcements == [says(ALICE, 0, 6)]


@in_virtual_time
async def test_waiting_ends_at_its_deadline() -> None:
    swarm = Swarm()
    async with swarm.directory as view:
        assert not await view.wait_for(lambda: not view.missing(), 7)
        assert swarm.loop.time() == 7
        assert await view.wait_for(lambda: True, 0)


@in_virtual_time
async def test_a_failing_store_keeps_the_view_and_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    swarm = Swarm()
    await swarm.serve(ALICE, says(ALICE, 0, 6))
    with caplog.at_level(logging.WARNING):
        async with swarm.directory as view:
            await asyncio.sleep(1)
            swarm.reader.reachable = False
            await asyncio.sleep(3 * room.PERIOD)
            assert view.announcements == [says(ALICE, 0, 6)]
            assert isinstance(view.error, SwarmError)
            swarm.reader.reachable = True
            await asyncio.sleep(room.PERIOD)
            assert view.error is None
    assert len(caplog.records) == 1


@in_virtual_time
async def test_round_trips_are_measured_in_the_background() -> None:
    swarm = Swarm()
    swarm.network.set_link("client", ALICE, latency=0.05)
    await swarm.serve(ALICE, says(ALICE, 0, 6))
    async with swarm.directory as view:
        assert view.rtt(ALICE.peer) is None
        assert await view.wait_for(lambda: view.rtt(ALICE.peer) is not None, 2)
        assert view.rtt(ALICE.peer) == pytest.approx(0.1, rel=0.05)


@in_virtual_time
async def test_an_unreachable_peer_does_not_hold_up_the_view() -> None:
    swarm = Swarm()
    swarm.network.partition(["client"], [ALICE])
    await swarm.serve(ALICE, says(ALICE, 0, 3))
    async with swarm.directory as view:
        await asyncio.sleep(0.5)
        await swarm.serve(BOB, says(BOB, 3, 6))
        assert await view.wait_for(lambda: not view.missing(), 2)


@in_virtual_time
async def test_a_server_measures_and_announces_the_way_to_the_next_blocks() -> None:
    swarm = Swarm()
    swarm.network.set_link(ALICE, BOB, latency=0.02)
    bob = await swarm.serve(BOB, says(BOB, 3, 6))
    await swarm.serve(CAROL, says(CAROL, 0, 3))
    span = Span(0, 3)
    transport = swarm.network.transport(ALICE)
    mine = Directory(swarm.store.another(), transport, "m", BLOCKS, span=span)
    await mine.refresh()
    await mine.measure()
    assert [said.peer for said in mine.next_holders(span)] == [BOB.peer]
    assert mine.next_rtts(span) == {BOB.peer: pytest.approx(0.04, rel=0.05)}
    assert mine.rtt(CAROL.peer) is None, "nobody goes on to a peer that does not hold the next block"
    assert mine.next_holders(Span(3, 6)) == [], "after the last block comes the client"

    await Announcer(swarm.store, ALICE, MODEL).publish(says(ALICE, 0, 3, rtts=mine.next_rtts(span)))
    await swarm.directory.refresh()
    told = {said.peer: said.rtts for said in swarm.directory.announcements}
    assert told[ALICE.peer] == {BOB.peer: pytest.approx(0.04, rel=0.05)}
    await bob.withdraw()
    await mine.refresh()
    assert mine.next_holders(span) == []


@in_virtual_time
async def test_errors_inside_come_out_as_they_are() -> None:
    swarm = Swarm()
    with pytest.raises(SwarmError, match="mine"):
        async with swarm.directory:
            raise SwarmError("mine")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(3), Swarm().directory:
            await asyncio.sleep(10)
    assert len(asyncio.all_tasks()) == 1, "nothing is left running"


@in_virtual_time
async def test_lists_everything_in_the_swarm() -> None:
    swarm = Swarm()
    await swarm.serve(ALICE, says(ALICE, 0, 3))
    await swarm.serve(BOB, says(BOB, 2, 6, "joining"))
    leaver = await swarm.serve(CAROL, says(CAROL, 0, 6))
    await leaver.withdraw()
    [model] = await list_models(swarm.store)
    assert model == MODEL
    assert await list_peers(swarm.store, model) == [says(ALICE, 0, 3), says(BOB, 2, 6, "joining")]
    swarm.store.reachable = False
    with pytest.raises(SwarmError):
        await list_models(swarm.store)
