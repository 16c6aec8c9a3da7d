"""An invitation: the addresses to join a swarm by and, of a private one, its key, as one string to hand on.

`swarm1` and base58 with a checksum, so that it survives a mail or a terminal, and a slip is noticed. Whoever
has the invitation to a private swarm is a member. Knows how one is written, not what joins by it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import base58
import msgspec

from swarm.errors import InputError
from swarm.net.addresses import parse_address
from swarm.net.swarm_key import KEY_BYTES, SwarmKey
from swarm.option_values import INVITATION_START, is_invitation

MAX_CHARACTERS = 4096
MAX_PEERS = 8
MAX_PATHS = 4
"""Peers of an invitation at most, and ways to each."""

_HINT = "Ask for it again, and copy all of it: it is one long word that begins with 'swarm1'."

Path = Annotated[str, msgspec.Meta(max_length=300)]


class _Invited(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """What is packed: the key, empty for an open swarm, and of each peer its id and ways to it."""

    key: Annotated[bytes, msgspec.Meta(max_length=KEY_BYTES)]
    peers: Annotated[
        list[tuple[str, Annotated[list[Path], msgspec.Meta(max_length=MAX_PATHS)]]],
        msgspec.Meta(max_length=MAX_PEERS),
    ]


@dataclass(frozen=True)
class Invitation:
    """The way into a swarm. Its text holds the key: to be shown only to whom is asked in."""

    addresses: tuple[str, ...]
    key: SwarmKey | None = None

    def text(self) -> str:
        """The invitation as one word: of up to `MAX_PEERS` peers, up to `MAX_PATHS` addresses each.

        Raises:
            InputError: an address is malformed.
        """
        ways: dict[str, list[str]] = {}
        for address in map(parse_address, self.addresses):
            if address.peer in ways or len(ways) < MAX_PEERS:
                ways.setdefault(address.peer, []).append(address.path)
        peers = [(peer, paths[:MAX_PATHS]) for peer, paths in ways.items()]
        packed = msgspec.msgpack.encode(_Invited(self.key.to_bytes() if self.key else b"", peers))
        return INVITATION_START + base58.b58encode_check(packed).decode()

    @classmethod
    def parse(cls, text: str) -> "Invitation":
        """
        Raises:
            InputError: it is no invitation, or a damaged one.
        """
        if not is_invitation(text) or len(text) > MAX_CHARACTERS:
            raise InputError("That is no invitation to a swarm.", _HINT)
        try:
            invited = msgspec.msgpack.decode(
                base58.b58decode_check(text.removeprefix(INVITATION_START)), type=_Invited
            )
            key = SwarmKey(invited.key) if invited.key else None
        except (ValueError, msgspec.DecodeError) as error:
            raise InputError("The invitation is damaged or not complete.", _HINT) from error
        addresses = [f"{path}/p2p/{peer}" for peer, paths in invited.peers for path in paths]
        return cls(tuple(str(parse_address(address)) for address in addresses), key)


def expand(given: Iterable[str], key: SwarmKey | None) -> tuple[tuple[str, ...], SwarmKey | None]:
    """The addresses among `given`, and those of the invitations among them, with the key that all agree on.

    Raises:
        InputError: an invitation cannot be read, or they are of several swarms.
    """
    addresses: list[str] = []
    keys: list[SwarmKey | None] = [key] if key is not None else []
    for text in given:
        if is_invitation(text):
            invitation = Invitation.parse(text)
            addresses += invitation.addresses
            keys.append(invitation.key)
        else:
            addresses.append(text)
    if any(one != keys[0] for one in keys):
        raise InputError(
            "The invitations and the swarm key are of different swarms.", "Give those of one swarm."
        )
    return tuple(addresses), keys[0] if keys else None
