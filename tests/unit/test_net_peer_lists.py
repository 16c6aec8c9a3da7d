"""Lists of allowed and blocked peers, and what happens when their files change."""

import logging
from pathlib import Path

import pytest

from swarm.errors import InputError
from swarm.net.identity import Identity
from swarm.net.peer_lists import MAX_FILE_BYTES, PeerLists, parse

A, B, C = (Identity.from_seed(name).peer for name in "abc")


def listed(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines))
    return path


def admitted(lists: PeerLists) -> list[str]:
    return [name for name, peer in zip("ABC", (A, B, C), strict=True) if lists.admits(peer)]


def test_a_list_is_one_peer_a_line() -> None:
    lines = parse(f"# friends\n{A}\n\n  {B}  # at home\r\n#{C}\n")
    assert lines.peers == {A, B}
    assert not lines.faults


def test_what_is_no_peer_is_a_fault_and_admits_nobody() -> None:
    lines = parse(f"{A}x\n{A} {B}\n*\n{C}\n")
    assert lines.peers == {C}
    assert [fault[:6] for fault in lines.faults] == ["line 1", "line 2", "line 3"]
    assert len(parse("x" * 10_000).faults[0]) < 200


def test_allowed_and_blocked(tmp_path: Path) -> None:
    allow, block = listed(tmp_path / "allow", A, B), listed(tmp_path / "block", B)
    assert admitted(PeerLists()) == ["A", "B", "C"]
    assert admitted(PeerLists(allow=allow)) == ["A", "B"]
    assert admitted(PeerLists(block=block)) == ["A", "C"]
    assert admitted(PeerLists(allow, block)) == ["A"]
    assert admitted(PeerLists(allow=listed(tmp_path / "empty"))) == []


def test_a_file_that_is_wrong_from_the_start_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        PeerLists(allow=tmp_path / "none")
    with pytest.raises(InputError, match=r"line 2 is no peer id: 'bob'"):
        PeerLists(block=listed(tmp_path / "block", A, "bob"))
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="no UTF-8"):
        PeerLists(block=tmp_path / "bytes")
    with pytest.raises(InputError, match="larger"):
        PeerLists(block=listed(tmp_path / "huge", "#" * (MAX_FILE_BYTES + 1)))


def test_changes_are_taken_over(tmp_path: Path) -> None:
    allow, block = listed(tmp_path / "allow", A), listed(tmp_path / "block")
    lists = PeerLists(allow, block)
    assert not lists.refresh()
    listed(allow, A, B, C)
    listed(block, C)
    assert lists.refresh()
    assert admitted(lists) == ["A", "B"]
    assert not lists.refresh()
    listed(block, "# nobody")
    assert lists.refresh()
    assert admitted(lists) == ["A", "B", "C"]
    listed(block, "# nobody at all")
    assert not lists.refresh(), "the file is another, its peers are the same"


def test_a_bad_line_opens_no_door(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    allow, block = listed(tmp_path / "allow", A, B), listed(tmp_path / "block", B)
    lists = PeerLists(allow, block)
    with caplog.at_level(logging.WARNING):
        listed(allow, A, "everybody")
        listed(block, "nobody, really")
        lists.refresh()
        assert admitted(lists) == ["A"]
        listed(allow, A, B, "everybody")
        listed(block, "nobody, really", A)
        lists.refresh()
        assert admitted(lists) == [], "B stays blocked, and A is now too"
    assert "line 2 is no peer id: 'everybody'" in caplog.text
    assert "line 1 is no peer id: 'nobody, really'" in caplog.text
    listed(allow, A, B)
    listed(block, A)
    lists.refresh()
    assert admitted(lists) == ["B"], "once it can be read, the file says it all"


def test_a_file_that_is_gone_stays_in_force(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    allow, block = listed(tmp_path / "allow", A, B), listed(tmp_path / "block", B)
    lists = PeerLists(allow, block)
    allow.unlink()
    block.write_bytes(b"\xff")
    with caplog.at_level(logging.WARNING):
        assert not lists.refresh()
    assert admitted(lists) == ["A"]
    assert caplog.text.count("stays as it was") == 2
    listed(allow, C)
    assert lists.refresh()
    assert admitted(lists) == ["C"]
