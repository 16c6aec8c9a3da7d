"""What each client draws for each server, so that clients who know the same do not all choose the same.

Pure; must not know what is decided by it.
"""

from functools import lru_cache
from hashlib import blake2b
from math import log

from swarm.net.transport import PeerId

SPREAD = 2.0
MOST_KEPT = 100_000


@lru_cache(MOST_KEPT)
def lot(client: PeerId, server: PeerId) -> float:
    """From 1 on: 1 and an exponential variable with a mean of `SPREAD`, always the same for the same two."""
    digest = blake2b(f"{client} {server}".encode(), digest_size=8).digest()
    return 1 - SPREAD * log((int.from_bytes(digest, "little") + 0.5) / 2**64)
