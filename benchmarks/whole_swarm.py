"""A whole swarm in one process on simulated time: real servers, clients, sessions and directory.

Servers are `swarm.server.server.Server` with all that belongs to it: they choose their blocks, announce them,
look around, move, hand sessions over and leave. Clients are `swarm.client.facade.Swarm` and open sessions
along their own routes. What is simulated are the wires, as long as those of `world`; computing, as
`simulated_engine` has it; loading; and the clock. Records lie either in the real DHT, or where that takes too
long to simulate in one table that takes a moment to read and to write.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, Literal, TypeAlias, cast
from unittest import mock

import numpy as np

from benchmarks.population import LOADING, Member
from benchmarks.simulated_calls import Access, Calls, Post, address_of, simulated_clock
from benchmarks.simulated_engine import HIDDEN, SimulatedEngine
from benchmarks.world import World
from swarm.client.costs import PREFILL_GAIN
from swarm.client.facade import Swarm
from swarm.client.options import SessionOptions
from swarm.dht.announcement import ModelEntry, PeerState
from swarm.dht.joining import Network
from swarm.dht.kademlia import KademliaStore
from swarm.dht.records import SignedRecord
from swarm.dht.store import RecordStore, StoreUnreachable
from swarm.errors import SwarmError
from swarm.net.identity import Identity
from swarm.net.memory import MemoryNetwork
from swarm.net.transport import PeerId
from swarm.net.virtual_time import VirtualTimeLoop
from swarm.net.wire import Link
from swarm.server.capacity import Layout
from swarm.server.cell import OnProgress
from swarm.server.placement import Holder, Move, plan
from swarm.server.server import Server, Shard
from swarm.spans import Span

Records: TypeAlias = Literal["dht", "table"]

TABLE_SECONDS = 0.5
"""What reading or writing the table takes, which is less than the DHT takes around the world."""

PROMPT_TOKENS, NEW_TOKENS = 16, 8
VOCABULARY = 1000
CLIENTS = 12
PATIENCE = 20.0
WINDOW, MEASURED = 40.0, 20.0
"""Seconds of one load, and how many of them are counted: the last."""

SHUTDOWN, FOREVER = 60.0, 1e9


class AtOnce(ThreadPoolExecutor):
    """Runs what it is given in the thread that gives it, so that a simulation repeats itself exactly."""

    def submit(self, work: Any, /, *args: Any, **kwargs: Any) -> "Future[Any]":
        done: Future[Any] = Future()
        try:
            done.set_result(work(*args, **kwargs))
        except BaseException as error:
            done.set_exception(error)
        return done


Rows: TypeAlias = dict[str, dict[str, SignedRecord]]


class Table:
    """One peer's access to `rows` of records by key and peer, which takes a moment. Implements `RecordStore`.

    It does not check signatures, since nobody forges any here. Unless it is `reachable` all fails.
    """

    peers = 0

    def __init__(self, rows: Rows):
        self.dropped: Counter[str] = Counter()
        self.reachable = True
        self._rows = rows

    def now(self) -> float:
        return time.time()

    async def put(self, records: Sequence[SignedRecord]) -> int:
        await self._wait()
        accepted = 0
        for record in records:
            row = self._rows.setdefault(record.key, {})
            known = row.get(record.peer)
            if known is None or known.expires_at < record.expires_at:
                row[record.peer] = record
                accepted += 1
        return accepted

    async def get(self, keys: Sequence[str]) -> dict[str, list[SignedRecord]]:
        await self._wait()
        now = self.now()
        return {
            key: [record for record in self._rows.get(key, {}).values() if not record.has_expired(now)]
            for key in keys
        }

    async def neighbours(self, most: int) -> list[str]:
        return []

    async def close(self) -> None:
        self.reachable = False

    async def _wait(self) -> None:
        await asyncio.sleep(TABLE_SECONDS)
        if not self.reachable:
            raise StoreUnreachable("The table cannot be reached.", "Its peer has vanished.")


@dataclass
class Coverage:
    """Which blocks are served, in truth, and for how long some were not since all were for the first time."""

    num_blocks: int
    serving: dict[str, tuple[Span, float]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    covered_at: float | None = None
    open: float = 0.0
    unavoidable: float = 0.0
    moves: int = 0
    server_hours: float = 0.0
    _at: float = 0.0

    def set(self, name: str, span: Span | None, strength: float) -> None:
        self.count()
        if span is None:
            self.serving.pop(name, None)
        else:
            self.serving[name] = span, strength
        if self.covered_at is None and self.is_whole:
            self.covered_at = _now()

    def is_there(self, name: str, size: int | None) -> None:
        self.count()
        if size is None:
            self.sizes.pop(name, None)
        else:
            self.sizes[name] = size

    def count(self) -> None:
        """Take note of the time since the last change."""
        seconds, self._at = _now() - self._at, _now()
        self.server_hours += seconds * len(self.sizes) / 3600
        if self.covered_at is not None and not self.is_whole:
            self.open += seconds
            self.unavoidable += seconds * (sum(self.sizes.values()) < self.num_blocks)

    @property
    def is_whole(self) -> bool:
        held = {block for span, _ in self.serving.values() for block in span.blocks}
        return len(held) == self.num_blocks

    def layout(self) -> Layout:
        spans = np.array([span for span, _ in self.serving.values()], np.int64).reshape(-1, 2)
        strengths = np.array([strength for _, strength in self.serving.values()], np.float64)
        return Layout(self.num_blocks, spans[:, 0], spans[:, 1], strengths)


@dataclass
class Seen:
    """Implements `Events` for one server: what it says becomes the truth about the blocks it serves."""

    member: Member
    coverage: Coverage

    def listening(self, peer: PeerId, addresses: Sequence[str]) -> None: ...

    def metrics(self, url: str) -> None: ...

    def phase(self, phase: PeerState, span: Span, progress: float, *, asleep: bool = False) -> None:
        serves = span if phase == "serving" else None
        self.coverage.set(self.member.name, serves, self.member.strength)

    def moving(self, span: Span, to: Span) -> None:
        self.coverage.moves += 1

    def model(self, name: str, *, is_first: bool) -> None: ...


@dataclass
class Answers:
    """What came of sessions. Each token: when it came, how long it took, and whether it was the first."""

    tokens: list[tuple[float, float, bool]] = field(default_factory=list)
    done: int = 0
    recoveries: int = 0
    failed: Counter[str] = field(default_factory=Counter)


class WholeSwarm:
    """Servers that come and go as `members` say, and `CLIENTS` clients. `whole_swarm` makes it."""

    def __init__(self, members: Sequence[Member], num_blocks: int, seed: int, records: Records):
        self.coverage = Coverage(num_blocks)
        self.clients: list[Swarm] = []
        self.has_begun = asyncio.Event()
        self.post = Post(self._seconds)
        """What servers send to keep the DHT."""
        self._clients_post = Post(self._seconds, self.post.nodes, self.post.networks)
        self._members = members
        self._records: Records = records
        self._rows: Rows = {}
        self._world = World(len(members) + CLIENTS, np.random.default_rng(seed))
        self._numbers: dict[PeerId, int] = {}
        self._network = MemoryNetwork(seed, link_of=lambda one, other: Link(self._seconds(one, other)))
        self._model = ModelEntry(model_id="m", name="simulated", num_blocks=num_blocks, fingerprint="f")
        self._rng = random.Random(seed)
        self._joined: list[PeerId] = []

    async def serve(self) -> None:
        """Run all servers, each in its time, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for member in self._members:
                tasks.create_task(self._live(member), name=member.name)

    async def join_clients(self, stack: AsyncExitStack) -> None:
        model = SimpleNamespace(
            name="simulated",
            model_id="m",
            num_blocks=self.coverage.num_blocks,
            hidden_size=HIDDEN,
            vocab_size=VOCABULARY,
            config={},
        )
        for number in range(CLIENTS):
            identity = Identity.from_seed(f"client {number}")
            self._numbers[identity.peer] = len(self._members) + number
            transport = await stack.enter_async_context(self._network.transport(identity))
            store, _ = await self._store(identity.peer, is_client=True)
            stack.push_async_callback(store.close)
            client = Swarm(
                transport,
                store,
                model,
                cast(Any, None),
                secret=b"0" * 32,
                timeout=PATIENCE,
                sessions=SessionOptions(audit_rate=0.0),  # zeros tell nothing
            )
            self.clients.append(await stack.enter_async_context(client))

    async def talk(self, client: Swarm, answers: Answers) -> None:
        """One session: a prompt, and an answer token by token."""
        before, prompt = _now(), list(range(PROMPT_TOKENS))
        try:
            session = await client.open_session(prompt, needed=PROMPT_TOKENS + NEW_TOKENS)
            try:
                tokens, position = prompt, 0
                for count in range(NEW_TOKENS):
                    given = await session.next_tokens(tokens, position)
                    answers.tokens.append((_now(), _now() - before, count == 0))
                    tokens, position, before = given, position + len(tokens), _now()
                answers.recoveries += session.recoveries
            finally:
                await session.close()
            answers.done += 1
        except SwarmError as error:
            answers.failed[type(error).__name__] += 1

    async def loaded(self, load: float) -> dict[str, float]:
        """Sessions that begin at random and ask for the part `load` of what servers carry, for `WINDOW`."""
        capacity = self.coverage.layout().tight().throughput
        rate = load * capacity / (NEW_TOKENS + (PROMPT_TOKENS - 1) / PREFILL_GAIN)
        answers, talking, ends = Answers(), [], _now() + WINDOW
        async with asyncio.TaskGroup() as tasks:
            while _now() < ends:
                talking.append(tasks.create_task(self.talk(self._rng.choice(self.clients), answers)))
                await asyncio.sleep(min(self._rng.expovariate(rate), max(ends - _now(), 0.001)))
            for task in talking:
                task.cancel()
        counted = [token for token in answers.tokens if token[0] > ends - MEASURED]
        later = [seconds for _, seconds, is_first in counted if not is_first] or [0.0]
        firsts = [seconds for _, seconds, is_first in counted if is_first] or [0.0]
        return {
            "load": load,
            "capacity": capacity,
            "asked": rate * NEW_TOKENS,
            "given": len(counted) / MEASURED,
            "token_ms": 1000 * float(np.median(later)),
            "token_ms_p95": 1000 * float(np.quantile(later, 0.95)),
            "first_ms": 1000 * float(np.median(firsts)),
            "sessions": len(talking),
            "failed": answers.failed.total(),
            "recoveries": answers.recoveries,
        }

    async def _live(self, member: Member) -> None:
        await asyncio.sleep(member.comes)
        identity = Identity.from_seed(member.name)
        self._numbers[identity.peer] = member.number
        transport = self._network.transport(identity)
        store, calls = await self._store(identity.peer)
        self._joined.append(identity.peer)
        self.has_begun.set()
        self.coverage.is_there(member.name, member.size)
        size = min(member.size, self.coverage.num_blocks)
        shard = Shard(self._model, HIDDEN, Span(0, size), _Loading(member), is_fixed=False)
        server = Server(shard, Network(identity, transport, store), Seen(member, self.coverage))
        stop = asyncio.Event()
        running = asyncio.create_task(server.run(stop), name=f"run {member.name}")
        try:
            await asyncio.wait([running], timeout=min(member.goes - member.comes, FOREVER))
            if running.done():
                await running
            self._joined.remove(identity.peer)
            if not member.is_polite:
                self._vanish(store, calls, identity)
                self.coverage.is_there(member.name, None)
            stop.set()
            await asyncio.wait([running], timeout=SHUTDOWN)
        finally:
            self.coverage.is_there(member.name, None)
            self.coverage.set(member.name, None, 0.0)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await transport.close()
            await store.close()
            if calls is not None:
                calls.vanish()

    def _vanish(self, store: RecordStore, calls: Calls | None, identity: Identity) -> None:
        """End as a crash would: nothing can be said any more."""
        if isinstance(store, Table):
            store.reachable = False
        if calls is not None:
            calls.vanish()
        with suppress(KeyError):
            self._network.kill(identity)

    async def _store(self, peer: PeerId, *, is_client: bool = False) -> tuple[RecordStore, Calls | None]:
        if self._records == "table":
            return Table(self._rows), None
        calls = Calls(self._clients_post if is_client else self.post, peer)
        access = cast(Any, Access(peer, calls))
        known = self._rng.sample(self._joined, min(3, len(self._joined)))
        addresses = [address_of(other) for other in known]
        return await KademliaStore.start(access, addresses, client_mode=is_client), calls

    def _seconds(self, one: PeerId, other: PeerId) -> float:
        return float(self._world.seconds(self._numbers[one], self._numbers[other]))


class _Loading:
    """Implements `LoadSpan`: takes the time that the blocks of one server take."""

    def __init__(self, member: Member):
        self._member = member

    async def __call__(
        self, span: Span, on_progress: OnProgress, *, kv_tokens: int | None = None
    ) -> SimulatedEngine:
        for block in range(span.size):
            await asyncio.sleep(LOADING)
            on_progress((block + 1) / span.size)
        return SimulatedEngine(span, self._member.strength)


def planned_once(holders: Sequence[Holder], num_blocks: int) -> tuple[Move, ...]:
    """`plan`, computed once for all servers that see the same: it is the same for them in any order."""
    return _planned(tuple(sorted(holders, key=lambda one: one.peer)), num_blocks)


@lru_cache(maxsize=512)
def _planned(holders: tuple[Holder, ...], num_blocks: int) -> tuple[Move, ...]:
    return plan(holders, num_blocks)


@asynccontextmanager
async def whole_swarm(
    members: Sequence[Member], num_blocks: int, seed: int, records: Records
) -> AsyncIterator[WholeSwarm]:
    """A swarm that runs meanwhile. To be used on a virtual clock, in an event loop of its own."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    loop.set_default_executor(AtOnce())
    random.seed(seed)
    with simulated_clock(loop), mock.patch("swarm.server.arranging.plan", planned_once):
        swarm = WholeSwarm(members, num_blocks, seed, records)
        async with asyncio.TaskGroup() as tasks, AsyncExitStack() as stack:
            serving = tasks.create_task(swarm.serve(), name="serve")
            stack.callback(serving.cancel)
            await swarm.has_begun.wait()
            await swarm.join_clients(stack)
            yield swarm


def _now() -> float:
    return asyncio.get_running_loop().time()
