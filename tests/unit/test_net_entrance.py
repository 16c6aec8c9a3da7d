"""The way into a swarm, from what options name."""

from argparse import Namespace
from pathlib import Path

import pytest

from swarm.errors import InputError
from swarm.net.entrance import entrance, entrance_of
from swarm.net.identity import Identity
from swarm.net.invitation import Invitation
from swarm.net.swarm_key import SwarmKey

A, B = (Identity.from_seed(name).peer for name in "ab")
AT_A, AT_B = f"/ip4/192.0.2.1/tcp/1/p2p/{A}", f"/ip4/192.0.2.2/tcp/1/p2p/{B}"


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    SwarmKey(b"k" * 32).save_new(tmp_path / "key")
    return tmp_path / "key"


def test_an_open_swarm(tmp_path: Path) -> None:
    found = entrance([AT_A])
    assert (found.addresses, found.door.key) == ((AT_A,), None)
    assert found.door.admits(B)
    assert found.memory is not None
    assert entrance([AT_A], remembers=False).memory is None


def test_a_private_swarm_by_a_file_and_by_an_invitation(key_file: Path) -> None:
    by_file = entrance([AT_A], key_file)
    by_invitation = entrance([Invitation((AT_B,), SwarmKey(b"k" * 32)).text()])
    assert by_file.door.key == by_invitation.door.key == SwarmKey(b"k" * 32)
    assert by_file.swarm == by_invitation.swarm, (
        "what is remembered of a private swarm depends on its key alone"
    )


def test_a_swarm_is_called_by_its_key_or_by_whom_it_is_joined_by(key_file: Path) -> None:
    assert entrance([AT_A, AT_B]).swarm == entrance([AT_B, AT_A, AT_A]).swarm
    names = {
        entrance(peers, key).swarm
        for peers, key in (([AT_A], None), ([AT_B], None), ([], key_file), ([], None))
    }
    assert len(names) == 4
    nothing = entrance()
    assert (nothing.swarm, nothing.memory) == ("", None)


def test_lists(tmp_path: Path) -> None:
    block = tmp_path / "block"
    block.write_text(B)
    door = entrance([AT_A], block_peers=block).door
    assert (door.admits(A), door.admits(B)) == (True, False)


def test_what_cannot_be_used_is_refused(tmp_path: Path) -> None:
    for refused in (
        {"initial_peers": ["/ip4/192.0.2.1/tcp/1"]},
        {"initial_peers": ["swarm1nonsense"]},
        {"initial_peers": [AT_A], "swarm_key": tmp_path / "none"},
        {"initial_peers": [AT_A], "allow_peers": tmp_path / "none"},
    ):
        with pytest.raises(InputError):
            entrance(**refused)  # type: ignore[arg-type]


def test_from_a_command_line(key_file: Path) -> None:
    args = Namespace(
        initial_peers=(AT_A,), swarm_key=key_file, allow_peers=None, block_peers=None, remembers=False
    )
    found = entrance_of(args)
    assert (found.addresses, found.door.key, found.memory) == ((AT_A,), SwarmKey(b"k" * 32), None)
