"""Peers remembered across restarts, in a file that anything may have happened to."""

import logging
import os
import stat
from pathlib import Path

import msgspec
import pytest

from swarm.net import peer_memory
from swarm.net.identity import Identity
from swarm.net.peer_memory import MAX_ADDRESSES, MAX_AGE, MAX_FILE_BYTES, MAX_PEERS, MAX_SWARMS, PeerMemory

NOW = 1_800_000_000.0


def at(name: str, port: int = 1) -> str:
    return f"/ip4/192.0.2.1/tcp/{port}/p2p/{Identity.from_seed(name).peer}"


def names(memory: PeerMemory, now: float = NOW) -> list[tuple[str, ...]]:
    return [one.addresses for one in memory.recall(now)]


def test_who_was_seen_last_comes_first(tmp_path: Path) -> None:
    memory = PeerMemory(tmp_path / "peers" / "swarm.json")
    assert names(memory) == []
    memory.remember([at("a"), at("b"), at("a", 2)], NOW)
    memory.remember([at("c")], NOW + 1)
    memory.remember([at("b", 3)], NOW + 2)
    assert names(PeerMemory(tmp_path / "peers" / "swarm.json"), NOW + 3) == [
        (at("b", 3),),
        (at("c"),),
        (at("a"), at("a", 2)),
    ]
    assert stat.S_IMODE((tmp_path / "peers" / "swarm.json").stat().st_mode) == 0o600
    assert os.listdir(tmp_path / "peers") == ["swarm.json"]


def test_who_was_not_seen_for_long_is_forgotten(tmp_path: Path) -> None:
    memory = PeerMemory(tmp_path / "swarm.json")
    memory.remember([at("old")], NOW)
    memory.remember([at("new")], NOW + 10)
    assert names(memory, NOW + MAX_AGE) == [(at("new"),)]
    memory.remember([], NOW + MAX_AGE)
    assert names(memory, NOW) == [(at("new"),)]


def test_only_so_much_is_kept(tmp_path: Path) -> None:
    memory = PeerMemory(tmp_path / "swarm.json")
    for number in range(2 * MAX_PEERS):
        memory.remember([at(str(number), port) for port in range(1, 20)], NOW + number)
    kept = names(memory, NOW + 100)
    assert len(kept) == MAX_PEERS
    assert {len(addresses) for addresses in kept} == {MAX_ADDRESSES}
    assert kept[0][0] == at(str(2 * MAX_PEERS - 1))
    assert (tmp_path / "swarm.json").stat().st_size < MAX_FILE_BYTES


@pytest.mark.parametrize(
    "written",
    [
        b"",
        b"{}",
        b"\xff",
        b'{"version": 2, "peers": []}',
        b'{"version": 1, "peers": [{"addresses": [], "seen": 1}]}',
        b'{"version": 1, "peers": [{"addresses": ["nowhere"], "seen": 1800000000}]}',
        b'{"version": 1, "peers": [{"addresses": ["x"], "seen": "then"}]}',
        msgspec.json.encode(
            {"version": 1, "peers": [{"addresses": [at("a")], "seen": NOW}] * (MAX_PEERS + 1)}
        ),
        b"[" * MAX_FILE_BYTES,
    ],
)
def test_a_damaged_file_remembers_nobody(
    tmp_path: Path, written: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "swarm.json"
    path.write_bytes(written)
    with caplog.at_level(logging.WARNING):
        assert names(PeerMemory(path)) == []
    assert "cannot be used" in caplog.text
    PeerMemory(path).remember([at("a")], NOW)
    assert names(PeerMemory(path)) == [(at("a"),)]


def test_a_later_address_of_a_damaged_file_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "swarm.json"
    path.write_bytes(
        msgspec.json.encode({"version": 1, "peers": [{"addresses": [at("a"), "nonsense"], "seen": NOW}]})
    )
    assert names(PeerMemory(path)) == []


def test_of_many_swarms_the_last_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWARM_CACHE", str(tmp_path))
    monkeypatch.setattr(peer_memory, "MAX_SWARMS", 3)
    for number in range(5):
        PeerMemory.of(str(number)).remember([at("a")], NOW)
        os.utime(tmp_path / "peers" / f"{number}.json", (number, number))
    PeerMemory.of("0").remember([at("a")], NOW)
    assert sorted(os.listdir(tmp_path / "peers")) == ["0.json", "3.json", "4.json"]
    assert MAX_SWARMS > 3


def test_a_folder_that_cannot_be_written_is_an_error_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="directory"):
        PeerMemory(tmp_path / "file" / "swarm.json").remember([at("a")], NOW)
