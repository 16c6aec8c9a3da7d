"""Values of options: what texts mean, what is refused, and that what is written reads the same."""

from argparse import ArgumentTypeError
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.option_values import (
    addresses,
    count,
    duration,
    file_path,
    names,
    number,
    port,
    room,
    size,
    spelled,
    whole_number,
)

READERS = (duration, size, room, count, port, number, whole_number, addresses, names)


@pytest.mark.parametrize(
    ("text", "seconds"), [("30", 30), ("1.5s", 1.5), ("200ms", 0.2), ("2m", 120), ("1h", 3600), (" 3 s ", 3)]
)
def test_durations(text: str, seconds: float) -> None:
    assert duration(text) == pytest.approx(seconds)


def test_names() -> None:
    assert names("one") == ("one",)
    assert names("./one, owner/two@main") == ("./one", "owner/two@main")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5", 5), ("5b", 5), ("1k", 1000), ("1KiB", 1024), ("512MB", 512 * 10**6), ("1.5 GiB", 3 * 2**29)],
)
def test_sizes(text: str, expected: int) -> None:
    assert size(text) == expected


@pytest.mark.parametrize(("text", "expected"), [("0", 0), (" 0 ", 0), ("512MB", 512 * 10**6)])
def test_room_may_be_none(text: str, expected: int) -> None:
    assert room(text) == expected


@pytest.mark.parametrize("text", ["", "-1", "0.0", "0MB", "much"])
def test_what_is_no_room(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match="not a size"):
        room(text)


@given(st.text(max_size=12) | st.from_regex(r"\A[0-9]{300,400}(s|GiB)?\Z"))
def test_any_text_is_a_value_or_refused(text: str) -> None:
    for read in READERS:
        try:
            read(text)
        except (ValueError, TypeError, ArgumentTypeError):
            continue
    for read in (duration, size, count):
        try:
            value: float = read(text)
        except (ValueError, ArgumentTypeError):
            continue
        assert 0 < value < float("inf")


@given(st.integers(1, 2**60))
def test_a_size_is_written_as_one_that_reads_the_same(bytes_: int) -> None:
    assert size(str(spelled(bytes_, size))) == bytes_


@given(st.decimals(Decimal("0.001"), Decimal(10**7), places=3))
def test_a_duration_is_written_as_one_that_reads_the_same(seconds: Decimal) -> None:
    assert duration(str(spelled(float(seconds), duration))) == float(seconds)


@pytest.mark.parametrize(
    ("value", "read", "written"),
    [
        (6 * 2**30, size, "6GiB"),
        (900 * 10**6, size, "900MB"),
        (5, size, 5),
        (0, room, 0),
        (4 * 2**30, room, "4GiB"),
        (7200.0, duration, "2h"),
        (90.0, duration, "90s"),
        (0.25, duration, "0.25"),
        (1e-05, duration, "0.00001"),
        (4096, count, 4096),
        (1.5, number, 1.5),
        (Path("/tmp/key"), file_path, "/tmp/key"),
        ("text", None, "text"),
        (float("inf"), number, "inf"),
    ],
)
def test_values_are_written_as_people_would(value: object, read: object, written: object) -> None:
    assert spelled(value, read) == written  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["-1", "65536", "http", "", "1.5"])
def test_what_is_no_port(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match="not a port"):
        port(text)


def test_a_path_may_begin_at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert file_path("~/key") == tmp_path / "key"
