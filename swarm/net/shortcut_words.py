"""What the two ends of a stream say to each other about a shortcut, between the frames and beside them.

A word is a frame without a header, which no message is: so it is seen by the networks alone, and not by
whom the stream is for. Pure.
"""

import secrets
import struct
from dataclasses import dataclass, field

from swarm.net.sealed_connection import KEY_BYTES
from swarm.net.transport import FrameError

ASK = b"\x01"
"""The opener's: let there be a shortcut, if you can."""
OVER = b"\x03"
"""Of either: this is the last that comes this way, the next frame comes by the shortcut."""

ID_BYTES = 16
_OFFER = struct.Struct(f"<BH{ID_BYTES}s{KEY_BYTES}s{KEY_BYTES}s")
_OFFERS = 2
MAX_WORD_BYTES = _OFFER.size


@dataclass(frozen=True)
class Offer:
    """The acceptor's answer to `ASK`: on its TCP `port` it waits for who brings the `id` and has the keys."""

    port: int
    id: bytes
    to_acceptor: bytes = field(repr=False)
    to_opener: bytes = field(repr=False)

    @classmethod
    def new(cls, port: int) -> "Offer":
        return cls(
            port,
            secrets.token_bytes(ID_BYTES),
            secrets.token_bytes(KEY_BYTES),
            secrets.token_bytes(KEY_BYTES),
        )

    @classmethod
    def of(cls, word: bytes) -> "Offer":
        """
        Raises:
            FrameError: that word is no offer.
        """
        if len(word) != _OFFER.size or word[0] != _OFFERS:
            raise FrameError("A peer said something about shortcuts that has no meaning.")
        _, *rest = _OFFER.unpack(word)
        return cls(*rest)

    def word(self) -> bytes:
        return _OFFER.pack(_OFFERS, self.port, self.id, self.to_acceptor, self.to_opener)
