"""Peers that were there, remembered across restarts: the way into the swarm when the initial peers are gone.

One small file for each swarm, in the cache folder. What it holds is a stranger's word, as any address is: who
answers there must still prove to be that peer. Knows files and addresses, not how a swarm is joined.
"""

import logging
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from swarm.cache import cache_folder
from swarm.errors import InputError
from swarm.net.addresses import parse_address
from swarm.net.private_file import read_private, write_private
from swarm.net.transport import PeerId

logger = logging.getLogger(__name__)

MAX_PEERS = 32
MAX_ADDRESSES = 4
"""Peers that are remembered of a swarm, and addresses of each."""

MAX_AGE = 30 * 24 * 3600.0
"""Seconds after which a peer that was not seen again is forgotten."""

MAX_SWARMS = 64
MAX_FILE_BYTES = 64 * 1024


class Remembered(msgspec.Struct, frozen=True):
    """A peer by its addresses, each ending in its id; seen last at that time, in unix seconds."""

    addresses: Annotated[tuple[str, ...], msgspec.Meta(min_length=1, max_length=MAX_ADDRESSES)]
    seen: Annotated[float, msgspec.Meta(ge=0, le=1e11)]

    @property
    def peer(self) -> PeerId:
        return parse_address(self.addresses[0]).peer


class _File(msgspec.Struct, frozen=True):
    version: Literal[1]
    peers: Annotated[tuple[Remembered, ...], msgspec.Meta(max_length=MAX_PEERS)]


class PeerMemory:
    """The peers remembered of one swarm, in the file `path`."""

    def __init__(self, path: Path):
        self._path = path

    @classmethod
    def of(cls, swarm: str) -> "PeerMemory":
        """That of the swarm of that name, in the user's cache."""
        return cls(cache_folder() / "peers" / f"{swarm}.json")

    def recall(self, now: float) -> tuple[Remembered, ...]:
        """Who is remembered at `now`, in unix seconds, newest first. Nobody where the file cannot be read."""
        try:
            data, _ = read_private(self._path, MAX_FILE_BYTES)
            peers = msgspec.json.decode(data, type=_File).peers
            for one in peers:
                for address in one.addresses:
                    parse_address(address)
            return tuple(one for one in _newest(peers) if now - one.seen < MAX_AGE)
        except FileNotFoundError:
            return ()
        except (OSError, msgspec.DecodeError, InputError) as error:
            logger.warning("the peers remembered in %s cannot be used: %s", self._path, error)
            return ()

    def remember(self, addresses: Iterable[str], now: float) -> None:
        """These are the addresses of peers that are there at `now`.

        Raises:
            OSError: the file cannot be written.
            InputError: an address is malformed.
        """
        kept = merged(self.recall(now), addresses, now)
        write_private(self._path, msgspec.json.encode(_File(1, kept)))
        self._forget_other_swarms()

    def _forget_other_swarms(self) -> None:
        """Keep the files of the `MAX_SWARMS` swarms that were joined last."""
        with suppress(OSError):  # another process does the same
            files = sorted(self._path.parent.glob("*.json"), key=lambda file: -file.stat().st_mtime)
            for file in files[MAX_SWARMS:]:
                file.unlink()


def merged(known: Iterable[Remembered], seen: Iterable[str], now: float) -> tuple[Remembered, ...]:
    """`known`, and the peers at the addresses `seen` now; the `MAX_PEERS` that were seen last.

    Raises:
        InputError: an address is malformed.
    """
    by_peer = {one.peer: one for one in known}
    ways: dict[PeerId, list[str]] = {}
    for address in map(parse_address, seen):
        ways.setdefault(address.peer, []).append(str(address))
    for peer, addresses in ways.items():
        by_peer[peer] = Remembered(tuple(addresses[:MAX_ADDRESSES]), now)
    return tuple(_newest(by_peer.values())[:MAX_PEERS])


def _newest(peers: Iterable[Remembered]) -> list[Remembered]:
    return sorted(peers, key=lambda one: -one.seen)
