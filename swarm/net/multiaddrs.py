"""Multiaddrs as the daemon has them: binary, and written by hivemind, around what that cannot do.

What stands in an address is checked in `addresses`.
"""

import logging
from collections.abc import Iterable

import base58

import swarm.net.slim  # noqa: F401, before hivemind

# isort: split

from hivemind.utils.multiaddr import Multiaddr

from swarm.net.addresses import Address
from swarm.net.transport import PeerId

logger = logging.getLogger(__name__)

_P2P_CODE = b"\xa5\x03"  # the varint of 421, multiaddr's code of /p2p/


def multiaddr(given: str | bytes) -> Multiaddr:
    """An address, as text or in binary form, as hivemind has it."""
    return Multiaddr(given)


def peer_bytes(peer: PeerId) -> bytes:
    """A peer id in binary form."""
    return base58.b58decode(peer)


def encoded(addresses: Iterable[Address]) -> list[bytes]:
    """The addresses in the daemon's binary form; what hivemind cannot encode is left out."""
    found = []
    for address in addresses:
        try:
            found.append(_encode(address.path))
        except ValueError as error:
            logger.debug("address %s cannot be used: %s", address, error)
    return found


def _encode(path: str) -> bytes:
    """hivemind writes a peer id within an address as a CID, which the daemon refuses: write it plainly."""
    head, *relays = path.split("/p2p/")
    raw: bytes = Multiaddr(head).to_bytes()
    for relay in relays:
        text, _, rest = relay.partition("/")
        peer = peer_bytes(PeerId(text))
        raw += _P2P_CODE + bytes([len(peer)]) + peer + Multiaddr(f"/{rest}").to_bytes()
    return raw


def end_of(addresses: Iterable[bytes]) -> str:
    """The first of a connection's encoded addresses that can be spelled; empty if none can."""
    return next(iter(texts_of(map(multiaddr, addresses))), "")


def texts_of(addresses: Iterable[Multiaddr]) -> list[str]:
    """The addresses that hivemind can spell; the daemon may know of transports that it does not."""
    texts = []
    for address in addresses:
        try:
            texts.append(str(address))
        except ValueError as error:
            logger.debug("an address of this peer cannot be written: %s", error)
    return texts
