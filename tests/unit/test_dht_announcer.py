"""The announcer, on a virtual clock."""

import asyncio
import logging
from collections.abc import Sequence

import msgspec
import pytest

from swarm.dht.announcement import MODELS_KEY, Announcement, ModelEntry, announcement_from, block_key
from swarm.dht.announcer import MIN_INTERVAL, RETRY_AFTER, WITHDRAW_TIMEOUT, Announcer
from swarm.dht.memory import MemoryStore
from swarm.dht.records import RecordError, SignedRecord
from swarm.dht.store import StoreUnreachable
from swarm.net.identity import Identity
from swarm.net.virtual_time import VirtualTimeLoop, in_virtual_time

ALICE = Identity.from_seed("alice")
MODEL = ModelEntry(model_id="m", name="tiny", num_blocks=6, fingerprint="f")
LOADING = Announcement(peer=ALICE.peer, model_id="m", start=2, end=4, state="joining")
PERIOD = 10.0


class Watched(MemoryStore):
    """Notes when it was written to, and can be made to hang."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        super().__init__(loop.now)
        self.loop = loop
        self.writes: list[float] = []
        self.hangs = False

    async def put(self, records: Sequence[SignedRecord]) -> int:
        self.writes.append(self.loop.time())
        if self.hangs:
            await asyncio.sleep(1e6)
        return await super().put(records)

    async def heard(self, block: int = 2) -> Announcement | None:
        found = (await self.get([block_key("m", block)]))[block_key("m", block)]
        return announcement_from(found[0]) if found else None


class Server:
    """Something that is announced while the test runs."""

    def __init__(self, store: Watched):
        self.store = store
        self.now = LOADING
        self.announcer = Announcer(store, ALICE, MODEL, PERIOD)

    async def __aenter__(self) -> "Server":
        self.task = asyncio.create_task(self.announcer.run(lambda: self.now))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    def change(self, **changes: object) -> None:
        self.now = msgspec.structs.replace(self.now, **changes)
        self.announcer.changed()


@in_virtual_time
async def test_publishes_under_every_block_and_in_the_list_of_models() -> None:
    store = Watched()
    assert await Announcer(store, ALICE, MODEL, PERIOD).publish(LOADING) == 3
    found = await store.get([*(block_key("m", block) for block in range(6)), MODELS_KEY])
    assert [key for key, records in found.items() if records] == ["m.2", "m.3", MODELS_KEY]
    assert all(
        record.expires_at == store.now() + 2 * PERIOD for records in found.values() for record in records
    )


@in_virtual_time
async def test_publishes_at_once_and_every_period() -> None:
    async with Server(Watched()) as server:
        await asyncio.sleep(3 * PERIOD + 1)
        assert server.store.writes == [0.0, PERIOD, 2 * PERIOD, 3 * PERIOD]


@in_virtual_time
async def test_changes_are_published_soon_and_together() -> None:
    async with Server(Watched()) as server:
        await asyncio.sleep(5)
        for progress in range(10):
            server.change(progress=progress / 10)
            await asyncio.sleep(0.01)
        await asyncio.sleep(MIN_INTERVAL)
        assert server.store.writes == [0.0, 5.0, 5.0 + MIN_INTERVAL]
        heard = await server.store.heard()
        assert heard is not None
        assert heard.progress == 0.9


@in_virtual_time
async def test_two_announcements_at_the_same_moment_are_in_order() -> None:
    store = Watched()
    announcer = Announcer(store, ALICE, MODEL, PERIOD)
    for progress in (0.1, 0.2):
        assert await announcer.publish(msgspec.structs.replace(LOADING, progress=progress)) == 3
    heard = await store.heard()
    assert heard is not None
    assert heard.progress == 0.2


@in_virtual_time
async def test_a_failing_store_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    store = Watched()
    store.reachable = False
    with caplog.at_level(logging.WARNING):
        async with Server(store) as server:
            await asyncio.sleep(RETRY_AFTER + 0.1)
            store.reachable = True
            await asyncio.sleep(RETRY_AFTER)
            assert await store.heard() == LOADING
            assert not server.task.done()
    assert len(caplog.records) == 2


@in_virtual_time
async def test_withdrawing_says_left_and_nothing_older_comes_back() -> None:
    store = Watched()
    async with Server(store) as server:
        await asyncio.sleep(1)
    await server.announcer.withdraw()
    for block in (2, 3):
        heard = await store.heard(block)
        assert heard is not None
        assert heard.state == "left"
    record = (await store.get(["m.2"]))["m.2"][0]
    assert record.expires_at < store.now() + 2 * PERIOD, "a farewell does not outlive what it takes back"


@in_virtual_time
async def test_withdrawing_is_bounded_and_never_raises() -> None:
    store = Watched()
    announcer = Announcer(store, ALICE, MODEL, PERIOD)
    await announcer.withdraw()
    assert store.writes == [], "there was nothing to withdraw"
    await announcer.publish(LOADING)
    store.hangs = True
    await announcer.withdraw()
    assert store.loop.time() == WITHDRAW_TIMEOUT
    store.hangs, store.reachable = False, False
    await announcer.withdraw()


@in_virtual_time
async def test_withdraws_while_a_publication_hangs() -> None:
    store = Watched()
    announcer = Announcer(store, ALICE, MODEL, PERIOD)
    await announcer.publish(LOADING)
    store.hangs = True
    hanging = asyncio.create_task(announcer.publish(LOADING))
    await asyncio.sleep(0)
    await announcer.withdraw()
    assert store.loop.time() == WITHDRAW_TIMEOUT
    hanging.cancel()
    await asyncio.gather(hanging, return_exceptions=True)


@in_virtual_time
async def test_what_readers_would_refuse_is_not_published() -> None:
    store = Watched()
    announcer = Announcer(store, ALICE, MODEL, PERIOD)
    for changes in ({"progress": 2.0}, {"peer": "another"}, {"name": "n" * 200}):
        with pytest.raises(RecordError):
            await announcer.publish(msgspec.structs.replace(LOADING, **changes))
    assert store.writes == []


@in_virtual_time
async def test_a_second_process_with_the_same_identity_is_noticed() -> None:
    store = Watched()
    await Announcer(store, ALICE, MODEL, 100.0).publish(LOADING)
    with pytest.raises(StoreUnreachable, match="accepted"):
        await Announcer(store, ALICE, MODEL, PERIOD).publish(LOADING)
