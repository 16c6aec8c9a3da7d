"""When to try for straight connections in place of relayed ones, with peers behind routers (hole punching).

libp2p's daemon makes them, but tries only when a relayed connection begins, and only if it knows by then at
which address the internet sees it (see `telling`). So relayed connections are to begin anew later on. Pure.

Source: libp2p specs, `relay/DCUtR.md`; what the daemon waits for was read in go-libp2p 0.32.1, `holepunch`.
"""

from collections.abc import Iterable

from swarm.allowance import Allowance
from swarm.net.addresses import endpoint_of
from swarm.net.transport import PeerId

NOTICE_TIME = 5.0
"""Seconds until the daemon has noticed its address: so often it looks."""

TRY_PERIOD = 300.0
"""Seconds between two tries with one peer."""


class Punching:
    """Whom to connect with anew, and when. Times are in seconds of any one clock."""

    def __init__(self) -> None:
        self._ready_at: float | None = None
        self._tries = Allowance(rate=1 / TRY_PERIOD, burst=1)

    def on_seen(self, now: float) -> None:
        """The daemon knows from now on at which address the internet sees it."""
        if self._ready_at is None:
            self._ready_at = now + NOTICE_TIME

    def is_due(self, peer: PeerId, ways: Iterable[str], now: float) -> bool:
        """Whether to connect anew with `peer`, whose connections, by `ways`, are all idle. A yes is a try."""
        is_ready = self._ready_at is not None and now >= self._ready_at
        return is_ready and not is_straight(ways) and self._tries.take(peer, now) == 0


def is_straight(ways: Iterable[str]) -> bool:
    """Whether one of the connections by these multiaddrs goes through no relay."""
    return any(found is not None and not found.is_relayed for found in map(endpoint_of, ways))
