"""The keys by which a hop finds the pages of a sequence again, and what of them may be known to whom.

The hop that holds block 0 could tell the tokens from what it computes, and where it is given them it
shares their pages with everybody: its keys have no secret. Later hops see hidden states alone, and their
keys tell nothing to who does not know this client's secret. What such a hop has kept is as good as what the
hops before it sent, so the keys also stand for those: the same tokens through other peers have other keys.
"""

from collections.abc import Sequence
from hashlib import blake2b

from swarm.client.route import Hop
from swarm.net.messages import MAX_PAGE_KEYS
from swarm.page_keys import KEY_BYTES, PAGE_TOKENS, page_keys


class PageChain:
    """The keys of one sequence's full pages, as one hop is told them. It grows and is cut as that does."""

    def __init__(self, secret: bytes):
        self._secret = secret
        self._keys = bytearray()

    def asked(self, tokens: Sequence[int]) -> bytes:
        """Keys of the full pages of a sequence that begins with `tokens`: as many as fit a message."""
        return self.named(tokens, 0, min(len(tokens), MAX_PAGE_KEYS * PAGE_TOKENS))

    def named(self, tokens: Sequence[int], start: int, end: int) -> bytes:
        """Keys of the pages of the sequence `tokens` that its positions `[start, end)` fill.

        The chain must have seen the positions before `start`; it forgets what it knew of later ones.
        """
        whole = start // PAGE_TOKENS
        del self._keys[whole * KEY_BYTES :]
        if end // PAGE_TOKENS == whole:
            return b""
        parent = bytes(self._keys[-KEY_BYTES:])
        keys = page_keys(tokens[whole * PAGE_TOKENS : end], secret=self._secret, parent=parent)
        self._keys += keys
        return keys


def chain_for(hops: Sequence[Hop], secret: bytes) -> PageChain:
    """The chain that the last of `hops`, a route's first ones, is told. `secret` is this client's own."""
    if hops[-1].span.start == 0:
        return PageChain(b"")
    return PageChain(blake2b(_upstream(hops).encode(), key=secret, digest_size=32).digest())


def _upstream(hops: Sequence[Hop]) -> str:
    """Who computes what reaches the last hop, and how; and for which of its blocks."""
    said = ((hop, hop.announcement) for hop in hops)
    return "\n".join(f"{hop.peer} {hop.span} {server.dtype} {server.quantization}" for hop, server in said)
