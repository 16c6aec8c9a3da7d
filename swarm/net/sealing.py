"""Sealed calls: questions and answers that only who has the swarm's key can make or read.

A question is bound to the call's name and to both peers, an answer to its question: neither is worth anything
elsewhere. Pure; what is sealed, and how it travels, is not known here.

Source: ChaCha20-Poly1305 (RFC 8439) with a key for each message, derived from its nonce as XChaCha20 does, so
that random nonces never meet.
"""

import hmac
import secrets
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from swarm.net.swarm_key import SwarmKey
from swarm.net.transport import PeerId

NONCE_BYTES = 24
TAG_BYTES = 16
OVERHEAD_BYTES = NONCE_BYTES + TAG_BYTES

_FIXED_NONCE = bytes(12)  # each message has a key of its own


class SealBroken(Exception):
    """The bytes were not sealed with this key, or for this place."""


@dataclass(frozen=True)
class Call:
    """One call of `caller` to `callee`."""

    name: str
    caller: PeerId
    callee: PeerId

    def place(self, question: bytes) -> bytes:
        """What an answer to that sealed question is bound to; with no question, what a question is."""
        return b"\0".join(
            (self.name.encode(), self.caller.encode(), self.callee.encode(), question[:NONCE_BYTES])
        )


class Seal:
    """Seals and opens with the secret of one swarm."""

    def __init__(self, key: SwarmKey):
        self._secret = key.secret_for("sealed calls")

    def close(self, call: Call, data: bytes, *, answers: bytes = b"") -> bytes:
        """`data` sealed as the question of `call`, or as the answer to its sealed question `answers`."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        return nonce + self._cipher(nonce).encrypt(_FIXED_NONCE, data, call.place(answers))

    def open(self, call: Call, sealed: bytes, *, answers: bytes = b"") -> bytes:
        """
        Raises:
            SealBroken: that is not what somebody with the key sealed as this question or answer.
        """
        if len(sealed) < OVERHEAD_BYTES:
            raise SealBroken
        nonce, rest = sealed[:NONCE_BYTES], sealed[NONCE_BYTES:]
        try:
            return self._cipher(nonce).decrypt(_FIXED_NONCE, rest, call.place(answers))
        except InvalidTag as error:
            raise SealBroken from error

    def _cipher(self, nonce: bytes) -> ChaCha20Poly1305:
        return ChaCha20Poly1305(hmac.digest(self._secret, nonce, "sha256"))
