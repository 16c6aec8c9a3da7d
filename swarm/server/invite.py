"""How a server asks others in: what they give to join it, and its invitation if that is to be shown."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from swarm.net.addresses import outward
from swarm.net.entrance import Entrance
from swarm.net.invitation import Invitation
from swarm.net.swarm_key import SwarmKey
from swarm.server.config import ServerConfig


@dataclass(frozen=True)
class Invite:
    """Of a private swarm it has the `key`, and the `key_file` unless this server came by an invitation."""

    key: SwarmKey | None = None
    key_file: Path | None = None
    is_shown: bool = False

    @classmethod
    def of(cls, config: ServerConfig, entrance: Entrance) -> "Invite":
        return cls(entrance.door.key, config.swarm_key, config.shows_invitation)

    def shown(self, addresses: Sequence[str]) -> str | None:
        """The invitation by `addresses` of this peer, if it is to be shown."""
        if not self.is_shown:
            return None
        return Invitation(tuple(outward(addresses)), self.key).text()

    def options(self, address: str) -> str:
        """What others add to a command to join by `address`: of the key, only where its file lies here."""
        key = f"--swarm-key {shlex.quote(str(self.key_file))} " if self.key_file else ""
        return f"{key}--initial-peers {address}"
