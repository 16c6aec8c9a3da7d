"""Reaching peers that cannot be dialled: through others that relay for them, which libp2p's daemon does.

Knows the daemon's options for it, and what a peer is asked to find out how much it relays. Connections
through a relay are encrypted from end to end like all others. Where both ends listen, the daemon tries
to replace them by direct ones (hole punching).

Source: libp2p specs, `relay/circuit-v2.md` and `relay/DCUtR.md`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

HOP_PROTOCOL = "/libp2p/circuit/relay/0.2.0/hop"
RESERVE = bytes((2, 0x08, 0))
"""Asks a relay for a reservation: a message of two bytes, field 1 (the type) being 0."""

MAX_ANSWER_BYTES = 4096
LONGEST_RELAYED = "12h"
"""The daemon ends a relayed connection after so long, and the sessions on it go on over another."""

ENOUGH_BYTES = 2**30
"""A relay that ends connections before so many bytes have passed is none for activations. Daemons that are no
relays on purpose stop at 128 KiB."""

_STATUS, _LIMIT, _LIMIT_BYTES = 5, 4, 2
_OK = 100
_UNLIMITED = 2**62


@dataclass(frozen=True)
class Relaying:
    """What a peer has to do with relays: whether it goes to others through them (`uses`), relays for others
    (`serves`), and `through` which ones, at these addresses, others come to it."""

    uses: bool = False
    serves: bool = False
    through: tuple[str, ...] = ()

    @property
    def _is_on(self) -> bool:
        return self.uses or self.serves or bool(self.through)

    def punches(self, *, listens: bool) -> bool:
        """Whether the daemon tries for straight connections in place of relayed ones."""
        return self._is_on and listens

    def options(self, *, listens: bool) -> list[str]:
        """The daemon's options for that."""
        options = [
            f"-relay={int(self._is_on)}",
            f"-relayService={int(self.serves)}",
            f"-autonat={int(self.punches(listens=listens))}",  # this is what punches holes, too
            f"-autoRelay={int(bool(self.through))}",
        ]
        if self.serves:  # the daemon relays for none while it does not know that others reach it
            options += [f"-relayTimeLimit={LONGEST_RELAYED}", "-forceReachabilityPublic=1"]
        if self.through:
            relays = ",".join(self.through)
            options += ["-relayDiscovery=0", f"-trustedRelays={relays}", "-forceReachabilityPrivate=1"]
        return options


def is_relayed(addresses: Sequence[str]) -> bool:
    """Whether a peer with these addresses is reached through a relay."""
    return any("/p2p-circuit" in address for address in addresses)


def bytes_relayed(answer: bytes) -> int:
    """How many bytes a connection may carry by a relay's answer to `RESERVE`; 0 if it relays none."""
    try:
        fields = dict(_fields(answer))
        if fields.get(_STATUS) != _OK:
            return 0
        limit = fields.get(_LIMIT)
        if not isinstance(limit, bytes):
            return _UNLIMITED
        most = dict(_fields(limit)).get(_LIMIT_BYTES, _UNLIMITED)
        return most if isinstance(most, int) else 0
    except (IndexError, ValueError):
        return 0


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protobuf message by their numbers: those that are whole numbers or bytes.

    Raises:
        IndexError, ValueError: it is malformed, or has fields of other kinds.
    """
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        value, place = _varint(message, place)
        if tag & 7 == 0:
            yield tag >> 3, value
        elif tag & 7 == 2:
            yield tag >> 3, message[place : place + value]
            place += value
        else:
            raise ValueError("a field of another kind")


def _varint(message: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[place]
        value |= (byte & 0x7F) << shift
        shift, place = shift + 7, place + 1
        if byte < 0x80:
            return value, place
