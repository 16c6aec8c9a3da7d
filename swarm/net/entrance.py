"""The way into a swarm, as options give it: whom to join by, and the door through which all streams go.

Reads the files that options name. Knows what is needed to join, and not how it is done.
"""

import argparse
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from swarm.net.addresses import parse_address
from swarm.net.door import Door
from swarm.net.invitation import expand
from swarm.net.peer_lists import PeerLists
from swarm.net.peer_memory import PeerMemory
from swarm.net.swarm_key import SwarmKey
from swarm.net.transport import PeerId

NAME_CHARACTERS = 16


@dataclass(frozen=True)
class Entrance:
    """`addresses` of peers to join by, the `door` for all streams, and who is remembered of the swarm.

    `swarm` is a name for it that is the same at each start, and not known to others: that of its key or, in
    an open one, of those that it is joined by. Empty with neither.
    """

    addresses: tuple[str, ...] = ()
    door: Door = field(default_factory=Door)
    memory: PeerMemory | None = None
    swarm: str = ""


def entrance(
    initial_peers: Sequence[str] = (),
    swarm_key: Path | str | None = None,
    allow_peers: Path | None = None,
    block_peers: Path | None = None,
    *,
    remembers: bool = True,
) -> Entrance:
    """The way into the swarm of `initial_peers`, which are addresses or invitations.

    `swarm_key`, `allow_peers` and `block_peers` are files. What is remembered is neither used nor kept
    unless it `remembers`.

    Raises:
        InputError: a file, an address or an invitation cannot be used, or they are of several swarms.
    """
    addresses, key = expand(initial_peers, SwarmKey.load(swarm_key) if swarm_key is not None else None)
    swarm = _name([parse_address(address).peer for address in addresses], key)
    lists = PeerLists(allow_peers, block_peers) if allow_peers or block_peers else None
    memory = PeerMemory.of(swarm) if remembers and swarm else None
    return Entrance(addresses, Door(key, lists), memory, swarm)


def _name(peers: Iterable[PeerId], key: SwarmKey | None) -> str:
    if key is not None:
        return key.secret_for("name of the swarm").hex()[:NAME_CHARACTERS]
    joined = " ".join(sorted(set(peers)))
    return hashlib.sha256(joined.encode()).hexdigest()[:NAME_CHARACTERS] if joined else ""


def entrance_of(args: argparse.Namespace) -> Entrance:
    """The way in that the shared options name.

    Raises:
        InputError: see `entrance`.
    """
    return entrance(
        args.initial_peers, args.swarm_key, args.allow_peers, args.block_peers, remembers=args.remembers
    )
