"""Blame: which peers have failed this client, for how long they are suspect, and how they are forgiven.

Owns one strike count a peer. Pure with `now` passed in, in seconds of any clock. What counts as a fault is
the caller's to say; must not know of routes.
"""

from dataclasses import dataclass

from swarm.net.transport import PeerId

FAULT = 1.0
"""Strikes of a fault that is surely the peer's."""

LIGHT = 0.25
"""Strikes of one that may have been within its rights, such as ending an idle session."""

FIRST_SUSPICION = 10.0
LONGEST_SUSPICION = 600.0
"""Seconds of suspicion after a first strike, doubled by each further one, and at most."""

REST_SHARE = 0.1
LONGEST_REST = 15.0
"""The part of a suspicion in which a peer is not even tried where there is no other, and its most seconds."""

BURST = 1.0
"""Seconds within which faults are one event that many sessions saw: together they weigh as one."""

HALF_LIFE = 300.0
"""Seconds after a suspicion in which half of the strikes are forgotten."""

PRAISE = 0.9
"""What a success leaves of the strikes."""

MOST_STRIKES = 7.0
NEGLIGIBLE = 0.01

LIE_REMEMBERED = 86_400.0
"""Seconds in which nothing is asked of a peer that was caught giving wrong results."""


@dataclass(frozen=True)
class Record:
    """What stands against one peer. `before` are its strikes before the burst that began at `burst_at`."""

    strikes: float
    before: float
    burst_at: float
    fault_at: float
    until: float

    def strikes_at(self, now: float) -> float:
        """They stay while the peer is suspect, and fade from then on."""
        return self.strikes * 0.5 ** (max(0.0, now - self.until) / HALF_LIFE)


class Blame:
    """What stands against peers at one client."""

    def __init__(self) -> None:
        self._records: dict[PeerId, Record] = {}
        self._liars: dict[PeerId, float] = {}

    def lie(self, peer: PeerId, now: float) -> None:
        """`peer` was caught at `now` giving wrong results: no success makes up for that."""
        self._liars[peer] = now + LIE_REMEMBERED

    def liars(self, now: float) -> dict[PeerId, float]:
        """Who is not to be asked at all, each until when."""
        self._liars = {peer: until for peer, until in self._liars.items() if now < until}
        return self._liars

    def fault(self, peer: PeerId, now: float, weight: float = FAULT) -> None:
        """`peer` has failed at `now`."""
        record = self._records.get(peer)
        if record is None:
            before, strikes, burst_at = 0.0, 0.0, now
        elif now - record.burst_at < BURST:
            before, strikes, burst_at = record.before, record.strikes, record.burst_at
        else:
            before = strikes = record.strikes_at(now)
            burst_at = now
        strikes = min(strikes + weight, before + FAULT, MOST_STRIKES)
        self._records[peer] = Record(strikes, before, burst_at, now, now + suspicion(strikes))

    def success(self, peer: PeerId, now: float) -> None:
        """`peer` did at `now` what it was asked."""
        record = self._records.get(peer)
        if record is None:
            return
        strikes = record.strikes_at(now) * PRAISE
        if strikes < NEGLIGIBLE:
            del self._records[peer]
            return
        until = min(record.until, record.fault_at + suspicion(strikes)) if now < record.until else now
        self._records[peer] = Record(
            strikes,
            min(record.before, strikes),
            record.burst_at,
            record.fault_at,
            until,
        )

    def suspects(self, now: float) -> dict[PeerId, float]:
        """Who is to be avoided where there are others, with the strikes against each."""
        return {peer: record.strikes for peer, record in self._records.items() if now < record.until}

    def rests_until(self, peer: PeerId) -> float:
        """Before this time `peer` is not to be tried again, even where there is no other."""
        record = self._records.get(peer)
        return record.fault_at + rest(record.strikes) if record else 0.0

    def forget(self, now: float) -> None:
        """Drop the records that say nothing any more."""
        self._records = {
            peer: record for peer, record in self._records.items() if record.strikes_at(now) >= NEGLIGIBLE
        }


def suspicion(strikes: float) -> float:
    """Seconds for which so many strikes make a peer suspect."""
    doubled = FIRST_SUSPICION * 2 ** (strikes - 1) if strikes >= FAULT else FIRST_SUSPICION * strikes
    return min(LONGEST_SUSPICION, doubled)


def rest(strikes: float) -> float:
    """Seconds for which a peer of so many strikes is not tried at all; none for a light one."""
    return min(LONGEST_REST, suspicion(strikes) * REST_SHARE) if strikes >= FAULT else 0.0
