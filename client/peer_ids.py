"""Peer ids as people give them: in a line, or one a line in a file. Light: command lines are read with it."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from swarm.errors import InputError, reason_of

PEER_ID = re.compile(r"12D3KooW[1-9A-HJ-NP-Za-km-z]{44}")
"""How the id of every Ed25519 key is spelled."""

MAX_FILE_BYTES = 2**20


def given_peers(text: str) -> tuple[str, ...]:
    """The peers in `text`, by commas apart, or in the file of that name, where a # begins a remark.

    Raises:
        InputError: that is neither, or the file cannot be read.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if parts and all(map(PEER_ID.fullmatch, parts)):
        return tuple(parts)
    path = Path(text).expanduser()
    if not os.path.isfile(path):
        check_peers(parts or [text])
    try:
        with path.open() as file:
            lines = file.read(MAX_FILE_BYTES).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"The peers in {path} cannot be read: {reason_of(error)}.", "Write a text file."
        ) from error
    found = tuple(peer for line in lines if (peer := line.partition("#")[0].strip()))
    check_peers(found)
    if not found:
        raise InputError(f"There is no peer in {path}.", "Write the ids of peers into it, one a line.")
    return found


def check_peers(peers: Iterable[str]) -> None:
    """
    Raises:
        InputError: one is not the id of a peer.
    """
    for peer in peers:
        if not PEER_ID.fullmatch(peer):
            raise InputError(
                f"{peer[:100]!r} is not the id of a peer.",
                "Give ids as `python -m swarm.client peers` shows them, 12D3KooW and 44 more characters,"
                " or a file with one a line.",
            )
