"""Lists of peers that are allowed or blocked, in files that may change while they are in force.

One peer id a line; `#` begins a comment. Where there is a list of allowed peers, nobody else is admitted; who
is blocked is not, whatever else is said. A line that is none is reported and opens no door: it allows nobody,
and does not free who was blocked before. Knows files and peer ids, not what is refused to whom.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from swarm.errors import InputError, reason_of
from swarm.net.identity import is_peer_id
from swarm.net.transport import PeerId

logger = logging.getLogger(__name__)

MAX_FILE_BYTES = 1024 * 1024
_HOW = "Write one peer id a line, such as 12D3KooW…; # begins a comment."


@dataclass(frozen=True)
class Lines:
    """What a list says: its peers, and for people what is wrong with its other lines."""

    peers: frozenset[PeerId]
    faults: tuple[str, ...] = ()


def parse(text: str) -> Lines:
    """The peers of a list. Lines that hold something else are its faults."""
    peers, faults = set(), []
    for number, line in enumerate(text.splitlines(), start=1):
        written = line.partition("#")[0].strip()
        if is_peer_id(written):
            peers.add(PeerId(written))
        elif written:
            faults.append(f"line {number} is no peer id: '{written[:80]}'")
    return Lines(frozenset(peers), tuple(faults))


class PeerLists:
    """Who is admitted, by the files `allow` and `block`; without them everybody is."""

    def __init__(self, allow: Path | None = None, block: Path | None = None):
        """
        Raises:
            InputError: a file cannot be read, or has a line that is no peer id.
        """
        self._allow = _Listed(allow) if allow is not None else None
        self._block = _Listed(block) if block is not None else None

    def admits(self, peer: PeerId) -> bool:
        is_allowed = self._allow is None or peer in self._allow.peers
        return is_allowed and not (self._block is not None and peer in self._block.peers)

    def refresh(self) -> bool:
        """Read again what has changed; whether anything has. A file that cannot be read stays as it was."""
        has_changed = False
        if self._allow is not None:
            has_changed |= self._allow.refresh(lambda old, new: new)
        if self._block is not None:
            has_changed |= self._block.refresh(lambda old, new: old | new)
        return has_changed


Peers = frozenset[PeerId]


class _Listed:
    """The peers that one file lists, as last read."""

    def __init__(self, path: Path):
        self._path = path
        self._mark = _mark(path)
        try:
            lines = parse(_read(path))
        except (OSError, ValueError) as error:
            raise InputError(f"The list of peers {path} cannot be read: {reason_of(error)}.", _HOW) from error
        if lines.faults:
            raise InputError(f"In the list of peers {path}, {lines.faults[0]}.", _HOW)
        self.peers = lines.peers

    def refresh(self, doubtful: Callable[[Peers, Peers], Peers]) -> bool:
        """Read the file if it has changed; with faults in it, `doubtful` says what holds, of old and new."""
        mark = _mark(self._path)
        if mark == self._mark:
            return False
        self._mark = mark
        try:
            lines = parse(_read(self._path))
        except (OSError, ValueError) as error:
            logger.warning(
                "the list of peers %s stays as it was, since it cannot be read: %s",
                self._path,
                reason_of(error),
            )
            return False
        for fault in lines.faults:
            logger.warning("in the list of peers %s, %s", self._path, fault)
        before = self.peers
        self.peers = doubtful(before, lines.peers) if lines.faults else lines.peers
        return self.peers != before


def _mark(path: Path) -> tuple[int, int, int] | None:
    """What changes when the file does."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _read(path: Path) -> str:
    with path.open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ValueError("it is larger than 1 MiB")
    return data.decode()
