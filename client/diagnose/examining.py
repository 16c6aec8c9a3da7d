"""Looking at a swarm from all sides, in order: its first peers, its records, its models, the way back.

What is seen is noted at once, so that whatever cuts this short leaves all that was seen by then. What it
means is decided in `findings`.
"""

import time
from collections.abc import Awaitable, Callable, Sequence

from swarm.client.concurrently import concurrently
from swarm.client.costs import Costs, Demand
from swarm.client.diagnose.probing import Probe
from swarm.client.diagnose.seen import ModelSeen, PeerSeen, RecordsSeen, Seen
from swarm.client.peers import find_model
from swarm.client.route import NoRoute, find_route, label
from swarm.dht.announcement import Announcement, ModelEntry
from swarm.dht.directory import list_models, list_peers
from swarm.dht.records import sign
from swarm.dht.store import RecordStore
from swarm.errors import InputError, SwarmError
from swarm.net.addresses import ip_of, usable_addresses
from swarm.net.identity import Identity
from swarm.net.transport import PeerId
from swarm.spans import Span

OWN_KEY = "_swarm.diagnose"
"""The key under which a record is written to be read again; it expires after `OWN_LIFETIME` seconds."""

OWN_LIFETIME = 30.0

MAX_MODELS = 8
MAX_SERVERS = 64
"""So many are looked at; a swarm may have thousands."""

WITNESSES = 3
"""Peers who are asked to dial this one."""

DEMAND = Demand(prompt_tokens=512, new_tokens=128)

JoinRecords = Callable[[Sequence[str]], Awaitable[RecordStore]]
"""Joins the records of the swarm by peers at these addresses, which were reached."""


class Examination:
    """Notes in `seen` what there is to see of a swarm from the peer `identity`."""

    def __init__(self, seen: Seen, probe: Probe, identity: Identity, model: str | None):
        self._seen = seen
        self._probe = probe
        self._identity = identity
        self._model = model

    async def run(self, initial_peers: Sequence[str], join_records: JoinRecords) -> None:
        """Look at everything that can be reached."""
        seen = self._seen
        seen.unfinished = "the initial peers"
        await concurrently(*map(self._look_at, by_peer(initial_peers)))
        seen.initial.sort(key=lambda peer: initial_peers.index(peer.given))
        if seen.is_joined:
            reached = [peer.given for peer in seen.initial if peer.fault is None]
            seen.unfinished = "the records"
            store = await self._join(reached, join_records)
            if store is not None:
                await self._use(store)
            seen.unfinished = "whether others reach this machine"
            await self._be_dialled()
        seen.unfinished = ""

    async def _look_at(self, addresses: Sequence[str]) -> None:
        """Look at the addresses of one peer, one after the other."""
        is_connected = False
        for address in addresses:
            peer = await self._probe.look_at(address, is_connected=is_connected)
            self._seen.initial.append(peer)
            is_connected = is_connected or peer.fault is None

    async def _look(self, server: Announcement) -> None:
        peer, addresses = server.peer_id, usable_addresses(server.peer_id, server.addresses)
        self._seen.servers[peer] = await self._probe.look(label(server), peer, addresses)

    async def _join(self, reached: Sequence[str], join_records: JoinRecords) -> RecordStore | None:
        try:
            return await join_records(reached)
        except SwarmError as error:
            self._seen.records = RecordsSeen(error)
            return None

    async def _use(self, store: RecordStore) -> None:
        self._seen.records = await self._write_and_read(store)
        self._seen.unfinished = "the models"
        try:
            entries = await list_models(store)
            if self._model is not None:
                entries = [find_model(entries, self._model)]
        except InputError as error:
            self._seen.wanted = error
            return
        except SwarmError as error:
            self._seen.records = RecordsSeen(error)
            return
        self._seen.models = []
        for entry in entries[:MAX_MODELS]:
            self._seen.models.append(await self._model_of(store, entry))

    async def _write_and_read(self, store: RecordStore) -> RecordsSeen:
        record = sign(self._identity, OWN_KEY, b"", store.now() + OWN_LIFETIME)
        began = time.perf_counter()
        written = False
        try:
            written = await store.put([record]) > 0
            found = (await store.get([OWN_KEY]))[OWN_KEY]
        except SwarmError as error:
            return RecordsSeen(error, written=written, peers=store.peers)
        seconds = time.perf_counter() - began
        return RecordsSeen(None, written, record in found, seconds, store.peers)

    async def _model_of(self, store: RecordStore, entry: ModelEntry) -> ModelSeen:
        self._seen.unfinished = f"the servers of {entry.name}"
        servers = await list_peers(store, entry)
        looked_at = self._seen.servers
        new = [server for server in servers if server.peer_id not in looked_at]
        await concurrently(*map(self._look, new[: MAX_SERVERS - len(looked_at)]))
        lost = {peer: "cannot be reached from here" for peer, one in looked_at.items() if one.fault}

        def rtt(peer: PeerId) -> float | None:
            return looked_at[peer].rtt if peer in looked_at else None

        span, found = Span(0, entry.num_blocks), tuple(servers)
        try:
            route = find_route(found, span, costs=Costs(rtt), demand=DEMAND, model=entry.name, excluded=lost)
        except NoRoute as reason:
            return ModelSeen(entry.name, entry.num_blocks, found, no_route=reason)
        return ModelSeen(entry.name, entry.num_blocks, found, route)

    async def _be_dialled(self) -> None:
        if self._seen.port is None:
            return
        asked = witnesses(self._seen.answering)
        self._seen.dialled_back = await concurrently(
            *(
                self._probe.ask_to_dial(peer.name, peer.peer, self._seen.port)
                for peer in asked
                if peer.peer is not None
            )
        )
        if not any(answer.is_reached for answer in self._seen.dialled_back):
            relaying = (self._probe.relays(peer.peer) for peer in asked if peer.peer is not None)
            self._seen.relays = sum(await concurrently(*relaying))


def by_peer(addresses: Sequence[str]) -> list[list[str]]:
    """The addresses that lead to the same peer, together."""
    groups: dict[str, list[str]] = {}
    for address in dict.fromkeys(addresses):
        groups.setdefault(address.rpartition("/p2p/")[2], []).append(address)
    return list(groups.values())


def witnesses(peers: Sequence[PeerSeen]) -> list[PeerSeen]:
    """Whom to ask: those on machines of their own first, since they see this one by different ways."""
    machines: dict[str, list[PeerSeen]] = {}
    for peer in peers:
        machines.setdefault(ip_of(peer.remote), []).append(peer)
    rounds = sorted(
        (
            (turn, place, peer)
            for place, some in enumerate(machines.values())
            for turn, peer in enumerate(some)
        ),
        key=lambda one: one[:2],
    )
    return [peer for *_, peer in rounds][:WITNESSES]
