"""What routes keep to so that peers learn less: who may run the ends of a model, and how much of it one may.

Pure functions over announcements. Must not know how a route is found.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import floor

import msgspec

from swarm.client.options import SessionOptions
from swarm.dht.announcement import MAX_BLOCKS, Announcement
from swarm.errors import InputError
from swarm.net.transport import PeerId
from swarm.spans import Span

ROUNDING = 1e-9
"""What a share of blocks may lack to be a whole number of them: 0.1 of 30 is not quite 3."""


ALL_BLOCKS = Span(0, MAX_BLOCKS)


@dataclass(frozen=True)
class Limits:
    """Which blocks of one model a peer may run, and how many of them.

    Unless `trusted` is None, peers that are not in it run blocks of `inner` only. No peer runs more than
    `most` blocks, if that is set, of which `taken` are those that it runs for the session already.
    """

    trusted: frozenset[PeerId] | None = None
    inner: Span = ALL_BLOCKS
    most: int | None = None
    taken: Mapping[PeerId, int] = field(default_factory=dict)

    @property
    def are_any(self) -> bool:
        return self.trusted is not None or self.most is not None

    def beside(self, hops: Iterable[tuple[PeerId, Span]]) -> "Limits":
        """The same for a part of a session whose other hops are these."""
        taken = dict(self.taken)
        for peer, span in hops:
            taken[peer] = taken.get(peer, 0) + span.size
        return replace(self, taken=taken)

    def left(self, peer: PeerId) -> int:
        """How many blocks `peer` may still run."""
        return MAX_BLOCKS if self.most is None else max(0, self.most - self.taken.get(peer, 0))

    def within(self, servers: Sequence[Announcement]) -> list[Announcement]:
        """What of their spans each may run, as if it announced no more; nothing of those who may run none."""
        if self.trusted is None:
            return list(servers)
        return [
            msgspec.structs.replace(server, start=span.start, end=span.end)
            for server in servers
            if (span := self._allowed(server, self.trusted)).size > 0
        ]

    def _allowed(self, server: Announcement, trusted: frozenset[PeerId]) -> Span:
        if server.peer_id in trusted:
            return server.span
        return Span(max(server.start, self.inner.start), min(server.end, self.inner.end))


NO_LIMITS = Limits()


@dataclass(frozen=True)
class Privacy:
    """What a client wants of its routes: only `trusted` peers run the first and the last `depth` blocks.

    No peer runs more than `max_share` of all blocks. With `trusted` None, anybody runs the ends.
    """

    trusted: frozenset[PeerId] | None = None
    depth: int = 1
    max_share: float = 1.0

    @classmethod
    def of(cls, options: SessionOptions) -> "Privacy":
        peers = options.trust_first_last
        trusted = None if peers is None else frozenset(map(PeerId, peers))
        return cls(trusted, options.trust_depth, options.max_share)

    def limits(self, num_blocks: int) -> Limits:
        """What that means for a model of `num_blocks`.

        Raises:
            InputError: no peer may run even one block.
        """
        most = floor(self.max_share * num_blocks + ROUNDING)
        if not most:
            raise InputError(
                f"max_share is {self.max_share:g}, which is less than one of {num_blocks} blocks.",
                f"Choose a value of at least {1 / num_blocks:.2g}.",
            )
        depth = min(self.depth, num_blocks) if self.trusted is not None else 0
        return Limits(
            trusted=self.trusted,
            inner=Span(depth, max(depth, num_blocks - depth)),
            most=None if most >= num_blocks else most,
        )


NO_PRIVACY = Privacy()
