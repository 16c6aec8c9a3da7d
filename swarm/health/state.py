"""What the health page says: a swarm's state, worked out from announcements and a moment in time. Pure.

Owns the words and fields of `/api/v1/state`. Must not know how announcements are read, peers pinged, or
a page drawn. Texts in it come from strangers: bounded and free of control characters, and no more.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Literal, TypeAlias

import msgspec

from swarm.dht.announcement import Announcement, ModelEntry
from swarm.health import coverage
from swarm.health.coverage import Run
from swarm.health.inspecting import Inspection
from swarm.net.transport import PeerId
from swarm.spans import Span

MAX_PEERS = 2_000
"""So many peers are listed, of all models together. What is counted counts all of them."""

MAX_CONTRIBUTORS = 10

Standing: TypeAlias = Literal["runs", "full", "wakes", "joining", "incomplete"]
"""Whether a model can be run: now; once a session ends; once it is asked for; once blocks are loaded; not."""

SeenState: TypeAlias = Literal["serving", "joining", "asleep", "draining"]
SEEN_STATES: tuple[SeenState, ...] = ("serving", "joining", "asleep", "draining")


@dataclass(frozen=True)
class Reach:
    """What came of the last attempt to reach a peer. `rtt` is in seconds, `at` in unix seconds."""

    is_reachable: bool
    rtt: float | None
    at: float


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One model at one moment, `at` in unix seconds: how much of it was served, by how many, how fast."""

    at: float
    covered: float
    """The served part of its blocks, 0 to 1."""
    copies: float
    """How many peers serve the block that the fewest serve."""
    peers: float
    tokens_per_s: float


class PeerView(msgspec.Struct, frozen=True, kw_only=True):
    """One peer as it announces itself, and as it is reached from here. Rates are as in `Throughput`."""

    peer: str
    name: str
    state: SeenState
    blocks: Span
    progress: float
    decode: float
    prefill: float
    network: float
    kv_tokens_left: int
    queue: int
    dtype: str
    quantization: str
    adapters: tuple[str, ...]
    version: str
    relayed: bool
    reachable: bool | None
    serves: bool | None
    """Whether it opened a session for what it announces; null if it was not asked yet."""
    rtt_ms: float | None
    reached_at: float | None


class Help(msgspec.Struct, frozen=True, kw_only=True):
    """Where one more server helps most, how often its blocks are held or being loaded, and how to be it."""

    blocks: Span
    copies: int
    command: str


class ModelView(msgspec.Struct, frozen=True, kw_only=True):
    """One model. `tokens_per_s` is of all sessions together, `stream_tokens_per_s` of one alone."""

    model_id: str
    name: str
    repository: str
    num_blocks: int
    standing: Standing
    progress: float
    """The loaded part of the blocks that are waited for: of the least loaded of them, if it is joining."""
    coverage: tuple[Run, ...]
    copies: int
    missing: tuple[Span, ...]
    unreached: tuple[Span, ...]
    """Blocks that are served only by peers which could not be reached from here, or do not serve."""
    tokens_per_s: float
    stream_tokens_per_s: float
    kv_tokens_left: int
    """The tokens that the block with the least room has room for."""
    states: dict[str, int]
    peers: tuple[PeerView, ...]
    peers_left_out: int
    help: Help
    history: tuple[Sample, ...]

    @property
    def num_peers(self) -> int:
        return sum(self.states.values())


class Contributor(msgspec.Struct, frozen=True, kw_only=True):
    """`score` is blocks times announced decode throughput."""

    peer: str
    name: str
    model: str
    blocks: int
    decode: float
    score: float


class SwarmState(msgspec.Struct, frozen=True, kw_only=True):
    """All that is shown. `read_at` is when the records were last read, in unix seconds; 0 if never."""

    version: str
    peer: str
    at: float
    read_at: float
    error: str
    models: tuple[ModelView, ...]
    contributors: tuple[Contributor, ...]
    dropped: dict[str, int]


@dataclass(frozen=True)
class Seen:
    """What is known of the swarm at the moment `at`; `announcements` are by the model's id."""

    peer: PeerId
    version: str
    at: float
    read_at: float = 0.0
    error: str = ""
    models: Sequence[ModelEntry] = ()
    announcements: Mapping[str, Sequence[Announcement]] = field(default_factory=dict)
    reach: Mapping[PeerId, Reach] = field(default_factory=dict)
    inspected: Mapping[PeerId, Inspection] = field(default_factory=dict)
    history: Mapping[str, Sequence[Sample]] = field(default_factory=dict)
    initial_peers: Sequence[str] = ()
    is_private: bool = False
    dropped: Mapping[str, int] = field(default_factory=dict)


def state_of(seen: Seen) -> SwarmState:
    """The state of the swarm. Of more than `MAX_PEERS` peers, models list equally many."""
    servers = {model.model_id: seen.announcements.get(model.model_id, ()) for model in seen.models}
    shown = shares([len(listed) for listed in servers.values()], MAX_PEERS)
    views = [
        _model_view(seen, model, servers[model.model_id], most)
        for model, most in zip(seen.models, shown, strict=True)
    ]
    return SwarmState(
        version=seen.version,
        peer=seen.peer,
        at=seen.at,
        read_at=seen.read_at,
        error=seen.error,
        models=tuple(views),
        contributors=contributors(seen.models, _honest(servers, seen)),
        dropped=dict(seen.dropped),
    )


def _honest(servers: Mapping[str, Sequence[Announcement]], seen: Seen) -> dict[str, list[Announcement]]:
    """`servers` without those who were found not to serve."""
    pretending = {peer for peer, inspected in seen.inspected.items() if not inspected.serves}
    return {
        model_id: [one for one in listed if one.peer_id not in pretending]
        for model_id, listed in servers.items()
    }


def shares(wanted: Sequence[int], total: int) -> list[int]:
    """`total` places for those who want so many each: none gets more than it wants or less than its part."""
    given = [0] * len(wanted)
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    for served, index in enumerate(order):
        given[index] = min(wanted[index], total // (len(order) - served))
        total -= given[index]
    return given


def sample_of(model: ModelView, at: float) -> Sample:
    """What history keeps of a model."""
    held = sum(run.end - run.start for run in model.coverage if run.copies)
    return Sample(
        at=at,
        covered=held / model.num_blocks,
        copies=model.copies,
        peers=model.num_peers,
        tokens_per_s=model.tokens_per_s,
    )


def seen_state(server: Announcement) -> SeenState:
    """The state as people see it: one who sleeps is not loading anything."""
    if server.state == "joining" and server.asleep:
        return "asleep"
    return "draining" if server.state == "left" else server.state


def contributors(
    models: Sequence[ModelEntry], servers: Mapping[str, Sequence[Announcement]]
) -> tuple[Contributor, ...]:
    """Those who serve most, by blocks times the throughput they announce."""
    listed = (
        Contributor(
            peer=server.peer,
            name=server.name,
            model=model.name,
            blocks=server.span.size,
            decode=coverage.block_rate(server),
            score=server.span.size * coverage.block_rate(server),
        )
        for model in models
        for server in servers[model.model_id]
        if server.state == "serving"
    )
    ranked = sorted(listed, key=lambda one: (-one.score, one.peer))
    return tuple(one for one in ranked[:MAX_CONTRIBUTORS] if one.score > 0)


def _model_view(seen: Seen, model: ModelEntry, servers: Sequence[Announcement], most: int) -> ModelView:
    serving = [server for server in servers if server.state == "serving"]
    held = coverage.copies(serving, model.num_blocks)
    room = coverage.per_block(serving, model.num_blocks, lambda server: server.kv_tokens_left)
    standing, progress = _standing(servers, model.num_blocks, kv_tokens_left=int(room.min()))
    wanted = coverage.neediest(servers, model.num_blocks)
    coming = [server for server in servers if server.state in coverage.COMING]
    return ModelView(
        model_id=model.model_id,
        name=model.name or model.model_id,
        repository=model.repository,
        num_blocks=model.num_blocks,
        standing=standing,
        progress=progress,
        coverage=tuple(coverage.runs(held)),
        copies=int(held.min()),
        missing=tuple(coverage.gaps(held)),
        unreached=_unreached(serving, model.num_blocks, seen),
        tokens_per_s=coverage.capacity(serving, model.num_blocks),
        stream_tokens_per_s=coverage.stream_rate(serving, model.num_blocks),
        kv_tokens_left=int(room.min()),
        states=dict(Counter(map(seen_state, servers))),
        peers=tuple(_peer_view(server, seen) for server in servers[:most]),
        peers_left_out=len(servers) - most,
        help=Help(
            blocks=wanted,
            copies=int(coverage.copies(coming, model.num_blocks)[wanted.start]),
            command=coverage.joining_command(
                model.name or model.model_id, wanted, seen.initial_peers, is_private=seen.is_private
            ),
        ),
        history=tuple(seen.history.get(model.model_id, ())),
    )


def _standing(
    servers: Sequence[Announcement], num_blocks: int, *, kv_tokens_left: int
) -> tuple[Standing, float]:
    """Whether the model can be run, and how much of what is waited for is loaded."""

    def is_covered_by(*states: SeenState) -> bool:
        return not coverage.gaps(
            coverage.copies((server for server in servers if seen_state(server) in states), num_blocks)
        )

    if is_covered_by("serving"):
        return ("runs" if kv_tokens_left else "full"), 1.0
    if is_covered_by("serving", "asleep"):
        return "wakes", 1.0
    if is_covered_by("serving", "asleep", "joining"):
        loading = [server for server in servers if seen_state(server) == "joining"]
        return "joining", min(_finite(server.progress) for server in loading)
    return "incomplete", 0.0


def _unreached(serving: Sequence[Announcement], num_blocks: int, seen: Seen) -> tuple[Span, ...]:
    def is_trusted(server: Announcement) -> bool:
        last, inspected = seen.reach.get(server.peer_id), seen.inspected.get(server.peer_id)
        return (last is None or last.is_reachable) and (inspected is None or inspected.serves)

    held = coverage.copies(serving, num_blocks)
    reached = coverage.copies(filter(is_trusted, serving), num_blocks)
    return tuple(coverage.gaps((reached > 0) | (held == 0)))


def _peer_view(server: Announcement, seen: Seen) -> PeerView:
    last, inspected = seen.reach.get(server.peer_id), seen.inspected.get(server.peer_id)
    rates = server.throughput
    return PeerView(
        peer=server.peer,
        name=server.name,
        state=seen_state(server),
        blocks=server.span,
        progress=_finite(server.progress),
        decode=coverage.block_rate(server),
        prefill=_finite(rates.prefill),
        network=_finite(rates.network),
        kv_tokens_left=server.kv_tokens_left,
        queue=server.queue,
        dtype=server.dtype,
        quantization=server.quantization,
        adapters=server.adapters,
        version=server.version,
        relayed=server.relayed,
        reachable=None if last is None else last.is_reachable,
        serves=None if inspected is None or server.state != "serving" else inspected.serves,
        rtt_ms=None if last is None or last.rtt is None else round(last.rtt * 1000, 3),
        reached_at=None if last is None else last.at,
    )


def _finite(value: float) -> float:
    return value if isfinite(value) else 0.0
