"""The proof that both ends of a stream have the same swarm key, before either says anything else.

Three frames, each a short header without a body: the opener's nonce, the acceptor's nonce and proof, the
opener's proof. A proof is a MAC over both nonces and both peer ids in their places, so that it is worth
nothing on another stream, at another peer, or the other way round. What follows needs no more: a stream is
encrypted, and each end knows whose it is. Knows streams, and not what they carry.

Source: SKID3, Handbook of Applied Cryptography, section 10.3.2; ISO/IEC 9798-4, mechanism 4.
"""

import asyncio
import hmac
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from swarm.net.swarm_key import SwarmKey
from swarm.net.transport import FrameError, NotAdmitted, PeerId, Stream, StreamClosed

PROOF_TIMEOUT = 5.0
"""Seconds within which all of it must be over."""

NONCE_BYTES = 32
PROOF_BYTES = 32


async def call_prove(stream: Stream, own: PeerId, key: SwarmKey) -> None:
    """Prove, as the peer `own` that opened `stream`, to have `key`, and have the other end prove it.

    Raises:
        NotAdmitted: the other end has another key, or does not answer by the rules; the stream is closed.
    """
    nonce = secrets.token_bytes(NONCE_BYTES)
    async with _closed_unless_proven(stream):
        await stream.send(nonce)
        answer, _ = await stream.receive(max_body=0)
        theirs, proof = answer[:NONCE_BYTES], answer[NONCE_BYTES:]
        _check(proof, _proof(key, "acceptor", own, stream.peer, nonce, theirs))
        await stream.send(_proof(key, "opener", own, stream.peer, nonce, theirs))


async def on_prove(stream: Stream, own: PeerId, key: SwarmKey) -> None:
    """The other half: the same of a stream that was opened to the peer `own`.

    Raises:
        NotAdmitted: as `call_prove`.
    """
    nonce = secrets.token_bytes(NONCE_BYTES)
    async with _closed_unless_proven(stream):
        theirs, _ = await stream.receive(max_body=0)
        if len(theirs) != NONCE_BYTES:
            raise FrameError("A peer began a private stream with something else than a nonce.")
        await stream.send(nonce + _proof(key, "acceptor", stream.peer, own, theirs, nonce))
        proof, _ = await stream.receive(max_body=0)
        _check(proof, _proof(key, "opener", stream.peer, own, theirs, nonce))


class _WrongProof(Exception):
    """Whoever made it has another key."""


def _check(proof: bytes, expected: bytes) -> None:
    if not hmac.compare_digest(proof, expected):
        raise _WrongProof


def _proof(
    key: SwarmKey, role: str, opener: PeerId, acceptor: PeerId, opener_nonce: bytes, acceptor_nonce: bytes
) -> bytes:
    """The MAC by which the end in that `role` proves itself. All parts but the ids have one length."""
    said = b"\0".join((role.encode(), opener.encode(), acceptor.encode(), opener_nonce + acceptor_nonce))
    return hmac.digest(key.secret_for("proof of a stream"), said, "sha256")


@asynccontextmanager
async def _closed_unless_proven(stream: Stream) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(PROOF_TIMEOUT):
            yield
    except _WrongProof:
        stream.close()
        raise NotAdmitted(
            f"Peer {stream.peer} has another swarm key.", "Give all members the same key."
        ) from None
    except (TimeoutError, StreamClosed, FrameError) as error:
        stream.close()
        raise NotAdmitted(
            f"Peer {stream.peer} did not prove that it has the swarm's key.", "It may have another one."
        ) from error
    except BaseException:
        stream.close()
        raise
