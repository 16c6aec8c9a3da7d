"""What was seen of a swarm and of the way to it: facts to draw findings from, none drawn yet."""

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from swarm.client.route import NoRoute, Route
from swarm.dht.announcement import Announcement
from swarm.errors import SwarmError
from swarm.net.addresses import Endpoint
from swarm.net.transport import PeerId

Fault: TypeAlias = Literal[
    "malformed",
    "unresolved",
    "no_way",
    "silent",
    "refused",
    "not_a_peer",
    "another_peer",
    "other_protocol",
    "no_connection",
    "mute",
]
"""Why a peer was not reached, in the order of how far one came."""


@dataclass(frozen=True)
class Told:
    """What a peer told when it was asked how it sees this one.

    `address` is where this peer's connection comes from, empty if unknown. `ahead` are the seconds by which
    its clock is ahead of this one's, give or take `uncertainty`.
    """

    address: str
    ahead: float
    uncertainty: float
    version: str


@dataclass(frozen=True)
class PeerSeen:
    """How it went to reach a peer. `name` is what people know it by, `given` the address that they gave.

    If there is a `fault`, `at` is where it showed, and `detail` says more. `remote` is the multiaddr that
    leads there, `rtt` in seconds; without it the peer was found to be there, and not asked anything.
    """

    name: str
    peer: PeerId | None = None
    fault: Fault | None = None
    detail: str = ""
    at: Endpoint | None = None
    rtt: float | None = None
    remote: str = ""
    told: Told | None = None
    given: str = ""


@dataclass(frozen=True)
class DialledBack:
    """Whether a peer could connect to this one at `address`; `refusal` if it would not try."""

    name: str
    address: str = ""
    is_reached: bool = False
    refusal: str = ""


@dataclass(frozen=True)
class RecordsSeen:
    """Whether a record could be written and read, in how many seconds, and how many peers keep records."""

    error: SwarmError | None = None
    written: bool = False
    was_read: bool = False
    seconds: float = 0.0
    peers: int = 0


@dataclass(frozen=True)
class ModelSeen:
    """A model's servers, and the route through those that were reached, or why there is none."""

    name: str
    num_blocks: int
    servers: tuple[Announcement, ...]
    route: Route | None = None
    no_route: NoRoute | None = None


@dataclass
class Seen:
    """All that was seen. What is None was not looked at, or not in time."""

    local: frozenset[str] = frozenset()
    port: int | None = None
    is_port_asked: bool = False
    network_error: SwarmError | None = None
    initial: list[PeerSeen] = field(default_factory=list)
    records: RecordsSeen | None = None
    wanted: SwarmError | None = None
    models: list[ModelSeen] | None = None
    servers: dict[PeerId, PeerSeen] = field(default_factory=dict)
    dialled_back: list[DialledBack] | None = None
    relays: int = 0
    """How many of those who answer would relay to this machine; not counted where it is reached."""
    unfinished: str = ""
    """What was being looked at when the time was over."""

    @property
    def is_joined(self) -> bool:
        return any(peer.fault is None for peer in self.initial)

    @property
    def answering(self) -> list[PeerSeen]:
        """Everybody who was reached, once."""
        everybody = (*self.initial, *self.servers.values())
        reached = [peer for peer in everybody if peer.fault is None and peer.rtt is not None]
        return list({peer.peer: peer for peer in reached}.values())
