"""The Kademlia store: three real nodes on loopback, one of which may be made to lie; and one client."""

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import pytest_asyncio
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DHTLocalStorage
from hivemind.p2p import PeerID
from hivemind.utils.timed_storage import ValueWithExpiration

from swarm.dht import kademlia
from swarm.dht.announcement import MODELS_KEY, Announcement, ModelEntry, announcement_from, block_key
from swarm.dht.announcer import Announcer
from swarm.dht.kademlia import KademliaStore
from swarm.dht.node_storage import MAX_RECORDS_PER_PEER
from swarm.dht.records import MAX_LIFETIME, MAX_RECORD_BYTES, SignedRecord, sign
from swarm.dht.store import StoreUnreachable
from swarm.errors import InputError
from swarm.net.addresses import parse_address
from swarm.net.door import Door
from swarm.net.identity import Identity
from swarm.net.libp2p import Libp2pTransport
from swarm.net.peer_lists import PeerLists
from swarm.net.swarm_key import SwarmKey

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODEL = ModelEntry(model_id="m", name="tiny", num_blocks=6, fingerprint="f")
LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)


class Peer(SimpleNamespace):
    identity: Identity
    transport: Libp2pTransport
    store: KademliaStore

    def record(self, key: str, body: bytes = b"", lifetime: float = 60.0) -> SignedRecord:
        return sign(self.identity, key, body, self.store.now() + lifetime)


async def join(
    stack: AsyncExitStack, addresses: list[str], *, is_client: bool = False, door: Door | None = None
) -> Peer:
    identity = Identity.generate()
    listens_at = () if is_client else LOOPBACK
    transport = await Libp2pTransport.start(identity, addresses, listens_at, door=door)
    await stack.enter_async_context(transport)
    store = await KademliaStore.start(transport, addresses, client_mode=is_client)
    await stack.enter_async_context(store)
    return Peer(identity=identity, transport=transport, store=store)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def swarm() -> AsyncIterator[list[Peer]]:
    """Two servers, a liar and a client."""
    async with AsyncExitStack() as stack:
        first = await join(stack, [])
        addresses = await first.transport.addresses()
        others = [await join(stack, addresses) for _ in range(2)]
        yield [first, *others, await join(stack, addresses, is_client=True)]


async def stored_by(asking: Peer, asked: Peer, record: SignedRecord, **changes: object) -> list[bool]:
    """What `asked` answers when `asking` calls it to store `record`, past all checks of its own."""
    call: dict[str, object] = {
        "keys": [DHTID.generate(source=record.key)],
        "values": [msgspec.msgpack.encode(record.pack())],
        "expiration_time": [record.expires_at],
        "subkeys": [record.peer],
    }
    peer = asked.store._node.peer_id
    answer = await asking.store._node.protocol.call_store(peer, **(call | changes))
    return list(answer)


async def test_everybody_reads_what_each_announced(swarm: list[Peer]) -> None:
    before = [peer.store.dropped.total() for peer in swarm]
    for number, peer in enumerate(swarm[:3]):
        said = Announcement(
            peer=peer.identity.peer, model_id="m", start=2 * number, end=2 * number + 2, state="serving"
        )
        assert await Announcer(peer.store, peer.identity, MODEL).publish(said) == 3
    for reader in swarm:
        found = await reader.store.get([MODELS_KEY, *(block_key("m", block) for block in range(7))])
        assert [len(records) for records in found.values()] == [3, 1, 1, 1, 1, 1, 1, 0]
        assert announcement_from(found["m.5"][0]).peer == swarm[2].identity.peer
    assert [peer.store.dropped.total() for peer in swarm] == before


async def test_withdrawing_replaces_the_announcement_everywhere(swarm: list[Peer]) -> None:
    first, second, _, client = swarm
    announcer = Announcer(second.store, second.identity, MODEL)
    await announcer.publish(
        Announcement(peer=second.identity.peer, model_id="w", start=0, end=1, state="serving")
    )
    await announcer.withdraw()
    for reader in (first, client):
        [record] = (await reader.store.get(["w.0"]))["w.0"]
        assert announcement_from(record).state == "left"


async def test_only_what_expires_later_replaces(swarm: list[Peer]) -> None:
    first, second, _, client = swarm
    old, new = first.record("order", b"old", 30), first.record("order", b"new", 40)
    assert await first.store.put([new]) == 1
    assert await first.store.put([old]) == 0
    assert await stored_by(client, second, old) == [False]
    assert [record.body for record in (await client.store.get(["order"]))["order"]] == [b"new"]


@pytest.mark.parametrize("forgets", ["node", "reader"])
async def test_records_expire(swarm: list[Peer], monkeypatch: pytest.MonkeyPatch, forgets: str) -> None:
    first, _, _, client = swarm
    record = first.record("short")
    await first.store.put([record])
    assert (await client.store.get(["short"]))["short"] == [record]
    if forgets == "node":
        monkeypatch.setattr("hivemind.utils.timed_storage.get_dht_time", lambda: record.expires_at + 1)
    else:
        monkeypatch.setattr(client.store, "now", lambda: record.expires_at)
    assert (await client.store.get(["short"]))["short"] == []


async def test_nodes_refuse_what_its_peer_did_not_sign(swarm: list[Peer]) -> None:
    first, _, liar, _ = swarm
    mine = liar.record("r.0")
    forged = msgspec.structs.replace(mine, peer=first.identity.peer)
    before = sum(first.store.dropped.values())
    assert await stored_by(liar, first, forged) == [False]
    assert await stored_by(liar, first, mine, subkeys=[first.identity.peer]) == [False]
    assert await stored_by(liar, first, mine, keys=[DHTID.generate(source="r.1")]) == [False]
    assert await stored_by(liar, first, mine, expiration_time=[mine.expires_at + 1]) == [False]
    assert await stored_by(liar, first, mine, subkeys=None) == [False], "a value that belongs to nobody"
    assert await stored_by(liar, first, mine, values=[b"\xc1"]) == [False]
    assert await stored_by(liar, first, mine, values=[mine.pack()]) == [False]
    assert await stored_by(liar, first, liar.record("r.0", lifetime=MAX_LIFETIME + 60)) == [False]
    too_large = msgspec.msgpack.encode(bytes(MAX_RECORD_BYTES + 1))
    assert await stored_by(liar, first, mine, values=[too_large]) == [False]
    assert sum(first.store.dropped.values()) == before + 9
    assert await stored_by(liar, first, liar.record("r.0", lifetime=-1)) == [False], "it has expired"
    assert await stored_by(liar, first, mine) == [True]


@pytest.mark.parametrize("lie", ["forged", "stale", "hidden", "malformed"])
async def test_a_lying_node_can_neither_forge_nor_hide_for_readers(swarm: list[Peer], lie: str) -> None:
    first, _, liar, client = swarm
    true, key_id = first.record(lie, b"true"), DHTID.generate(source=lie)
    assert await first.store.put([true]) == 1
    said = liar.record(lie, b"false", 600)
    if lie == "forged":
        said = msgspec.structs.replace(said, peer=first.identity.peer)
    if lie == "stale":
        said = first.record(lie, b"what it said before", 30)
    lies = DHTLocalStorage()
    lies.store_subkey(key_id, said.peer, msgspec.msgpack.encode(said.pack()), said.expires_at)
    if lie == "malformed":
        entries = lies.get(key_id).value
        entries.maxsize, entries.frozen = "a word", True
    if lie == "hidden":
        lies.data[key_id] = ValueWithExpiration(lies.get(key_id).value, math.inf)
    protocol = liar.store._node.protocol
    kept, protocol.storage = protocol.storage, lies
    try:
        found = (await client.store.get([lie]))[lie]
    finally:
        protocol.storage = kept
    assert true in found
    assert [record.peer for record in found if record != true] == (
        [] if lie in ("forged", "stale") else [liar.identity.peer]
    )
    if lie == "forged":
        assert client.store.dropped["bad_signature"] > 0


async def test_who_says_another_nodes_id_is_a_node_to_nobody(swarm: list[Peer]) -> None:
    first, second, _, _ = swarm
    async with AsyncExitStack() as stack:
        liar = await join(stack, await first.transport.addresses())
        protocol = liar.store._node.protocol
        assert liar.store._own.node_id in first.store._known
        first.store._known.lose(liar.store._own.node_id)
        before = first.store.peers
        protocol.node_info.node_id = second.store._node.node_id.to_bytes()
        await protocol.call_ping(first.store._node.peer_id)
        await protocol.call_find(first.store._node.peer_id, [DHTID.generate(source="k")])
        assert await stored_by(liar, first, liar.record("k")) == [True], "it is answered as a client is"
        assert await first.store._node.protocol.call_ping(liar.store._node.peer_id) is None
        await asyncio.sleep(0)
        assert first.store.peers == before


async def test_nodes_that_do_not_exist_hide_no_record(swarm: list[Peer]) -> None:
    first, _, liar, client = swarm
    true = first.record("phantoms", b"true")
    assert await first.store.put([true]) == 1
    nobodies = [PeerID.from_base58(Identity.from_seed(f"{number}").peer) for number in range(20)]
    phantoms = [(DHTID(kademlia._id_of(peer)), peer) for peer in nobodies]
    table = liar.store._node.protocol.routing_table
    kept, table.get_nearest_neighbors = table.get_nearest_neighbors, lambda *_, **__: phantoms
    try:
        assert (await client.store.get(["phantoms"]))["phantoms"] == [true]
    finally:
        table.get_nearest_neighbors = kept


async def test_nobody_can_hide_others_behind_a_cached_record(swarm: list[Peer]) -> None:
    first, _, liar, client = swarm
    assert await first.store.put([first.record("hidden")]) == 1
    for peer in swarm[:3]:
        await stored_by(client, peer, liar.record("hidden", lifetime=MAX_LIFETIME), in_cache=True)
    assert first.identity.peer in {record.peer for record in (await client.store.get(["hidden"]))["hidden"]}


async def test_a_thousand_announcements_of_one_peer_harm_nobody(swarm: list[Peer]) -> None:
    first, _, liar, client = swarm
    true = first.record("flood.0", b"true")
    assert await first.store.put([true]) == 1
    records = [liar.record(f"flood.{number}") for number in range(1000)]
    calls = (stored_by(liar, first, record) for record in records)
    answers = await asyncio.gather(*calls, return_exceptions=True)
    stored = [answer for answer in answers if isinstance(answer, list)]  # it need not answer all of a flood
    assert 0 < sum(map(sum, stored)) <= MAX_RECORDS_PER_PEER
    assert true in (await client.store.get(["flood.0"]))["flood.0"]
    assert await first.store.put([first.record("flood.1")]) == 1


async def test_who_brings_forged_records_is_not_listened_to() -> None:
    async with AsyncExitStack() as stack:
        first = await join(stack, [])
        addresses = await first.transport.addresses()
        liar, honest = await join(stack, addresses), await join(stack, addresses, is_client=True)
        forged = [
            msgspec.structs.replace(liar.record(f"f.{number}"), peer=first.identity.peer)
            for number in range(40)
        ]
        answers = await asyncio.gather(
            *(stored_by(liar, first, record) for record in forged), return_exceptions=True
        )
        assert any(isinstance(answer, TypeError) for answer in answers), "it is answered no more"
        with pytest.raises(TypeError):
            await stored_by(liar, first, liar.record("f.41"))
        assert await stored_by(honest, first, honest.record("f.42")) == [True]


async def test_a_private_swarm_is_closed_to_all_without_its_key(
    swarm: list[Peer], caplog: pytest.LogCaptureFixture
) -> None:
    right, wrong = SwarmKey.generate(), SwarmKey.generate()
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        first = await join(stack, [], door=Door(right))
        addresses = await first.transport.addresses()
        member = await join(stack, addresses, door=Door(right), is_client=True)
        assert await first.store.put([first.record("mine", b"secret")]) == 1
        assert [record.body for record in (await member.store.get(["mine"]))["mine"]] == [b"secret"]
        assert await stored_by(member, first, member.record("mine")) == [True]
        for key, says in ((wrong, "another key"), (None, "is private")):
            began = loop.time()
            with pytest.raises(InputError, match=says):
                await join(stack, addresses, door=Door(key))
            assert loop.time() - began < 6
        public = swarm[0]
        open_addresses = await public.transport.addresses()
        with pytest.raises(InputError, match="has no key"):
            await join(stack, open_addresses, door=Door(right))

        stranger = await join(stack, open_addresses)  # of the open swarm, but it knows the way
        await stranger.transport._control.connect(first.identity.peer, map(parse_address, addresses))
        protocol, target = stranger.store._node.protocol, first.store._node.peer_id
        assert await protocol.call_ping(target) is None
        assert await protocol.call_find(target, [DHTID.generate(source="mine")]) is None
        with pytest.raises(TypeError):
            await stored_by(stranger, first, stranger.record("mine"))
        assert {record.peer for record in (await member.store.get(["mine"]))["mine"]} == {
            first.identity.peer,
            member.identity.peer,
        }
        assert first.store.peers == 0, "no stranger is in it"


async def test_records_of_whom_the_lists_do_not_admit_are_not_read(swarm: list[Peer], tmp_path: Path) -> None:
    first, second, _, _ = swarm
    for peer in (first, second):
        assert await peer.store.put([peer.record("listed")]) == 1
    block = tmp_path / "block"
    block.write_text(f"{second.identity.peer}\n")
    async with AsyncExitStack() as stack:
        door = Door(lists=PeerLists(block=block))
        reader = await join(stack, await first.transport.addresses(), is_client=True, door=door)
        found = (await reader.store.get(["listed"]))["listed"]
        assert [record.peer for record in found] == [first.identity.peer]


async def test_addresses_are_checked(swarm: list[Peer]) -> None:
    with pytest.raises(InputError):
        await KademliaStore.start(swarm[0].transport, ["/ip4/127.0.0.1/tcp/1"])


async def test_without_anybody_left_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async with AsyncExitStack() as stack:
        first = await join(stack, [])
        addresses = await first.transport.addresses()
        client = await join(stack, addresses, is_client=True)
        assert await client.store.get(["k"]) == {"k": []}
        await first.store.close()
        await first.transport.close()
        for _ in range(2):
            with pytest.raises(StoreUnreachable):
                await client.store.get(["k"])
        monkeypatch.setattr(kademlia, "JOIN_TIMEOUT", 0.5)
        with pytest.raises(StoreUnreachable):
            await KademliaStore.start(client.transport, addresses, client_mode=True)


async def test_closing_after_the_daemon_died_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kademlia, "CLOSE_TIMEOUT", 0.2)
    async with AsyncExitStack() as stack:
        peer = await join(stack, [])
        peer.transport._daemon._process.kill()
        async with asyncio.timeout(5):
            await peer.transport.wait_failed()
            await peer.store.close()
            await peer.store.close()
