"""The record store over hivemind's Kademlia DHT.

It runs a DHT node in this process's event loop, on the transport's own daemon. Each node, ours among them,
keeps a record only if it is signed by the peer under whose id it is to be kept, and readers check it again.
In a private swarm only who has the key can call a node, or be one. It must not know what records say.

Of hivemind's DHT it takes the calls and what answers them. What a node keeps is in `node_storage`. Whom it
knows is in `neighbours`, how records are looked for and brought to nodes in `search` and `keeping`:
hivemind's own believe what any node says.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import swarm.net.slim  # noqa: F401, before hivemind

# isort: split

from hivemind.dht.node import DHTNode
from hivemind.dht.protocol import ValidationError
from hivemind.dht.routing import DHTID
from hivemind.utils.timed_storage import TimedStorage

from swarm.dht.guarded_calls import GuardedCalls
from swarm.dht.keeping import keep_all
from swarm.dht.neighbours import BUCKET_SIZE, Neighbours, Node
from swarm.dht.node_ids import keep_to_ids, node_id_of
from swarm.dht.node_storage import (
    MAX_STORED_RECORDS,
    BoundedStorage,
    OwnRecordsOnly,
    unwrapped,
    values_in,
    wrapped,
)
from swarm.dht.records import RecordError, SignedRecord, check_time
from swarm.dht.search import Answer, Answers, Found, search
from swarm.dht.store import StoreUnreachable
from swarm.errors import InputError, SwarmError
from swarm.net.addresses import parse_address
from swarm.net.libp2p import Libp2pTransport
from swarm.net.transport import PeerId

RPC_TIMEOUT = 3.0
SILENT_FOR = 20.0
"""Seconds for which a peer that did not answer is not asked again: each such question costs `RPC_TIMEOUT`."""

MAX_SILENT = 4_096

PUT_TIMEOUT = 10.0
GET_TIMEOUT = 10.0
JOIN_TIMEOUT = 8.0
JOIN_PAUSE = 0.5
CLOSE_TIMEOUT = 1.0
REJOIN_PERIOD = 30.0
"""Seconds between attempts to reach the initial peers that have been lost."""

_PING = "DHTProtocol.rpc_ping"


class KademliaStore:
    """A `RecordStore` shared by all peers of the swarm. Made by `start`; an async context manager."""

    def __init__(
        self,
        node: DHTNode,
        calls: GuardedCalls,
        validator: OwnRecordsOnly,
        transport: Libp2pTransport,
        initial: Iterable[PeerId],
        client_mode: bool,
    ):
        self.dropped = validator.dropped
        self._node = node
        self._calls = calls
        self._transport = transport
        self._validator = validator
        self._initial = [node.peer_id.from_base58(peer) for peer in initial]
        self._client_mode = client_mode
        self._rejoin_at = 0.0
        self._own: Node[Any] = Node(int(node.node_id), node.peer_id, "here")
        self._known: Neighbours[Any] = Neighbours(self._own.node_id)
        self._silent: TimedStorage[Any, None] = TimedStorage(maxsize=MAX_SILENT)
        self._networks: dict[bytes, str] = {}
        self._looking = asyncio.Lock()
        node.protocol.routing_table = _Table(self._known)
        node.protocol.update_routing_table = self._on_contact

    @classmethod
    async def start(
        cls, transport: Libp2pTransport, initial_peers: Sequence[str] = (), *, client_mode: bool = False
    ) -> "KademliaStore":
        """Join the DHT of `initial_peers`, multiaddrs that `transport` was started with; or begin a new one.

        In client mode this peer keeps no records for others, and need not be reachable. If the transport's
        door is private, so is the DHT; records of peers that the door does not admit are not read.

        Raises:
            InputError: an address is malformed, or they are in a private swarm with another key, or in one
                without, or this peer needs a key.
            StoreUnreachable: none of `initial_peers` answered.
            SwarmError: they answered, but cannot reach this peer, or their clocks differ from this one's.
        """
        initial = [
            peer for peer in (parse_address(text).peer for text in initial_peers) if peer != transport.peer
        ]
        calls = GuardedCalls(transport.p2p, transport.door.key, correct=_correct)
        validator = OwnRecordsOnly(calls)
        async with _within(JOIN_TIMEOUT, "served"):
            node = await DHTNode.create(
                p2p=calls,
                node_id=DHTID(_id_of(calls.peer_id)),
                bucket_size=BUCKET_SIZE,
                wait_timeout=RPC_TIMEOUT,
                client_mode=client_mode,
                record_validator=validator,
            )
        node.protocol.storage = BoundedStorage(MAX_STORED_RECORDS, calls)
        node.protocol.cache = BoundedStorage(0)  # anybody's cached entry would hide what is stored
        store = cls(node, calls, validator, transport, initial, client_mode)
        try:
            await store._join()
        except BaseException:
            await store.close()
            raise
        return store

    async def __aenter__(self) -> "KademliaStore":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def peers(self) -> int:
        return len(self._known)

    def now(self) -> float:
        return time.time()

    async def put(self, records: Sequence[SignedRecord]) -> int:
        async with _within(PUT_TIMEOUT, "written"):
            await self._rejoin()
            found = await self._search({_key_id(record.key) for record in records})
            own = () if self._client_mode else (self._own,)
            holders = {key: found[_key_id(key)].holders(*own) for key in {record.key for record in records}}
            return len(await keep_all(records, holders, self._keep))

    async def get(self, keys: Sequence[str]) -> dict[str, list[SignedRecord]]:
        ids = {_key_id(key): key for key in keys}
        async with _within(GET_TIMEOUT, "read"):
            await self._rejoin()
            found = await self._search(ids)
        if found and all(one.is_unanswered for one in found.values()):
            raise StoreUnreachable("None of the peers that hold records answered.", "Check the connection.")
        kept = self._node.protocol.storage
        return {
            key: self._newest((*values_in(kept.get(DHTID(key_id))), *found[key_id].values))
            for key_id, key in ids.items()
        }

    async def neighbours(self, most: int) -> list[str]:
        known = [node.peer for node in self._known.nodes()]
        chosen = random.sample(known, min(most, len(known)))
        found = (self._transport.known_addresses(PeerId(peer.to_base58())) for peer in chosen)
        return [address for addresses in await asyncio.gather(*found) for address in addresses]

    async def close(self) -> None:
        if self._node.is_alive:
            with suppress(TimeoutError):  # a daemon that died leaves its calls unanswered
                async with asyncio.timeout(CLOSE_TIMEOUT):
                    await self._node.shutdown()

    async def _search(self, key_ids: Collection[int]) -> dict[int, Found[Any]]:
        """Look around each of these keys, from the nearest known nodes and from the initial peers."""
        initial = [node for node in self._known.nodes() if node.peer in self._initial]
        return await search(
            key_ids, lambda key_id: (*self._known.nearest(key_id, BUCKET_SIZE), *initial), self._ask
        )

    async def _ask(self, peer: Any, key_ids: Sequence[int]) -> Answers[Any] | None:
        if peer in self._silent or peer == self._own.peer:
            return None
        said = await self._node.protocol.call_find(peer, [DHTID(key_id) for key_id in key_ids])
        if said is None:
            self._silent.store(peer, None, time.time() + SILENT_FOR)
            return None
        answers = {
            int(key_id): Answer(values_in(entry), self._worth_asking(named))
            for key_id, (entry, named) in said.items()
        }
        await self._hear(peer)  # whom that would have asked, the next contact asks
        return Answers(await self._network_of(peer), answers)

    def _worth_asking(self, named: Mapping[DHTID, Any]) -> list[Node[Any]]:
        """Those of the nodes that another one named which have not just been silent."""
        return [
            Node(int(node_id), peer)
            for node_id, peer in named.items()
            if peer != self._own.peer and peer not in self._silent
        ]

    async def _keep(self, peer: Any, records: Sequence[SignedRecord]) -> Sequence[bool] | None:
        protocol = self._node.protocol
        places = [DHTID(_key_id(record.key)) for record in records]
        values = [wrapped(record) for record in records]
        if peer == self._own.peer:
            return [
                protocol.storage.store_subkey(place, record.peer, value, record.expires_at)
                for place, record, value in zip(places, records, values, strict=True)
            ]
        kept: Sequence[bool] | None = await protocol.call_store(
            peer,
            places,
            values,
            [record.expires_at for record in records],
            subkeys=[record.peer for record in records],
        )
        return kept

    async def _on_contact(self, node_id: DHTID | None, peer: Any, responded: bool = True) -> None:
        """A node called or answered, or it did not. One without an id is a client's.

        A node that is new is not given what it should keep: who wrote that will, before it expires.
        """
        if not responded:
            self._known.lose(_id_of(peer))
        elif node_id is not None:
            silent = await self._hear(peer)
            if silent is not None:
                await self._node.protocol.call_ping(silent.peer)

    async def _hear(self, peer: Any) -> Node[Any] | None:
        node = Node(_id_of(peer), peer, await self._network_of(peer))
        return self._known.hear(node, time.monotonic())

    async def _network_of(self, peer: Any) -> str:
        """The network that a peer is connected with from here; empty if it is not."""
        raw = peer.to_bytes()
        if raw not in self._networks:
            async with self._looking:
                if raw not in self._networks:
                    with suppress(SwarmError):
                        self._networks = await self._transport.networks()
        return self._networks.get(raw, "")

    def _newest(self, values: Iterable[bytes]) -> list[SignedRecord]:
        newest: dict[str, SignedRecord] = {}
        for value in values:
            try:
                record = self._validator.signatures.unpack(unwrapped(value))
                check_time(record, self.now())
            except RecordError as error:
                if error.fault != "expired":
                    self.dropped[error.fault] += 1
                continue
            if record.peer != self._transport.peer and not self._transport.door.admits(record.peer_id):
                continue
            known = newest.get(record.peer)
            if known is None or known.expires_at < record.expires_at:
                newest[record.peer] = record
        return list(newest.values())

    async def _join(self) -> None:
        """Reach at least one initial peer and look around from there."""
        if not self._initial:
            return
        deadline = time.monotonic() + JOIN_TIMEOUT
        while not await self._ping_initial():
            await self._check_key()
            if time.monotonic() + JOIN_PAUSE > deadline:
                raise StoreUnreachable(
                    "None of the initial peers answered.",
                    "Check that one of them is running and that its address is right.",
                )
            await asyncio.sleep(JOIN_PAUSE)
        async with _within(GET_TIMEOUT, "searched"):
            await self._search([self._own.node_id])

    async def _rejoin(self) -> None:
        """Look again for initial peers that this one has lost: two halves of a swarm meet through them."""
        lost = [peer for peer in self._initial if _id_of(peer) not in self._known]
        is_alone = not len(self._known)
        if not lost or (self.now() < self._rejoin_at and not is_alone):
            return
        self._rejoin_at = self.now() + REJOIN_PERIOD
        if not await self._ping_initial() and is_alone:
            raise StoreUnreachable(
                "No peer of the swarm can be reached.", "Check this computer's connection."
            )

    async def _check_key(self) -> None:
        """
        Raises:
            InputError: an initial peer is there, and this one has not the key that it has.
        """
        is_private = self._transport.door.key is not None
        if any(peer.to_base58() in self._calls.refused_by for peer in self._initial):
            raise InputError(
                "This swarm has another key.",
                "Ask a member for its key file, or for an invitation: python -m swarm.client invite",
            )
        probes = (self._calls.speaks(peer, _PING, privately=not is_private) for peer in self._initial)
        if not any(await asyncio.gather(*probes)):
            return
        if is_private:
            raise InputError("This swarm has no key: it is open to all.", "Leave --swarm-key out to join it.")
        raise InputError(
            "This swarm is private: it takes a key to join it.",
            "Give --swarm-key FILE; or give as --initial-peers the invitation that a member makes.",
        )

    async def _ping_initial(self) -> bool:
        """Whether any initial peer answered.

        Raises:
            SwarmError: all that answered refused this peer.
        """
        self._silent.clear()
        pings = (self._node.protocol.call_ping(peer, validate=True, strict=True) for peer in self._initial)
        answers = await asyncio.gather(*pings, return_exceptions=True)
        for peer, answer in zip(self._initial, answers, strict=True):
            if isinstance(answer, DHTID):
                await self._hear(peer)
            if isinstance(answer, BaseException) and not isinstance(answer, ValidationError):
                raise answer
        refusals = [answer for answer in answers if isinstance(answer, ValidationError)]
        welcomes = [answer for answer in answers if isinstance(answer, DHTID)]
        if refusals and not welcomes:
            raise SwarmError(
                f"The swarm answers, but this peer cannot join it: {refusals[0]}.",
                "Check that this computer's clock is right and that others can reach its port.",
            ) from refusals[0]
        return bool(welcomes)


class _Table:
    """The nodes that are known, as hivemind's protocol asks for them."""

    def __init__(self, known: Neighbours[Any]):
        self._known = known

    def get(self, *, peer_id: Any) -> DHTID | None:
        node_id = _id_of(peer_id)
        return DHTID(node_id) if node_id in self._known else None

    def get_nearest_neighbors(
        self, query_id: DHTID, k: int, exclude: DHTID | None = None
    ) -> list[tuple[DHTID, Any]]:
        nodes = self._known.nearest(int(query_id), k, exclude=exclude)
        return [(DHTID(node.node_id), node.peer) for node in nodes]


def _key_id(key: str) -> int:
    return int(DHTID.generate(source=key))


def _id_of(peer: Any) -> int:
    """The id of the node of a peer as hivemind knows it."""
    return int.from_bytes(node_id_of(peer.to_bytes()))


def _correct(message: Any, sender: Any) -> None:
    keep_to_ids(message, sender.to_bytes())


@asynccontextmanager
async def _within(seconds: float, done: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise StoreUnreachable(
            f"Records could not be {done} in time.", "The swarm or the connection to it may be overloaded."
        ) from error
