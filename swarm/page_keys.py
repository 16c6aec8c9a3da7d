"""The keys of pages: a hash chain over the tokens that produced them, by which a full page is found again.

A key names a page and all before it. With a secret, only who knows it can tell or guess the tokens.
"""

import struct
from collections.abc import Sequence
from hashlib import blake2b

PAGE_TOKENS = 32
"""Tokens of a page."""

KEY_BYTES = 16


def page_keys(tokens: Sequence[int], *, secret: bytes = b"", parent: bytes = b"") -> bytes:
    """The keys of the full pages of `tokens`, one behind the other.

    Args:
        tokens: ids below 2**32 from the beginning of a page on.
        secret: at most 64 bytes that only those know who may name these pages; empty for all to name them.
        parent: the key of the page before, empty at the beginning of the sequence.
    """
    keys = bytearray()
    for at in range(0, len(tokens) - PAGE_TOKENS + 1, PAGE_TOKENS):
        ids = struct.pack(f"<{PAGE_TOKENS}I", *tokens[at : at + PAGE_TOKENS])
        parent = blake2b(parent + ids, digest_size=KEY_BYTES, key=secret).digest()
        keys += parent
    return bytes(keys)


def split_keys(keys: bytes) -> list[bytes]:
    """Single keys of what `page_keys` gives; an incomplete one at the end is dropped."""
    return [keys[at : at + KEY_BYTES] for at in range(0, len(keys) - KEY_BYTES + 1, KEY_BYTES)]
