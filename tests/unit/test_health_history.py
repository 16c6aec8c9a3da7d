"""The history of the last day: kept, forgotten, bounded, and refused where its file is none."""

import asyncio
import sqlite3
from pathlib import Path

import pytest

from swarm.errors import InputError
from swarm.health import history as room
from swarm.health.history import BUCKET, KEPT, History, HistoryFailed, default_path
from swarm.health.state import Sample

NOW = 10_000_000.0 - 10_000_000.0 % BUCKET


def sample(at: float, *, covered: float = 1.0, peers: float = 3.0, rate: float = 10.0) -> Sample:
    return Sample(at=at, covered=covered, copies=1.0, peers=peers, tokens_per_s=rate)


async def test_a_point_is_the_worst_coverage_and_the_mean_of_the_rest(tmp_path: Path) -> None:
    history = await History.open(tmp_path / "folder" / "h.sqlite")
    await history.add({"m": sample(NOW + 1, peers=2, rate=10), "n": sample(NOW + 1)}, NOW + 1)
    await history.add({"m": sample(NOW + 2, covered=0.5, peers=4, rate=30)}, NOW + 2)
    await history.add({"m": sample(NOW + BUCKET)}, NOW + BUCKET)
    points = await history.points(NOW + BUCKET)
    await history.close()
    assert points["m"] == [sample(NOW, covered=0.5, peers=3, rate=20), sample(NOW + BUCKET)]
    assert points["n"] == [sample(NOW)]


async def test_a_day_is_kept_over_restarts_and_no_more(tmp_path: Path) -> None:
    path = tmp_path / "h.sqlite"
    history = await History.open(path)
    await history.add({"m": sample(NOW)}, NOW)
    await history.close()
    await history.close()
    history = await History.open(path)
    assert list(await history.points(NOW + KEPT - 1)) == ["m"]
    await history.add({"n": sample(NOW + KEPT + 1)}, NOW + KEPT + 1)
    assert list(await history.points(NOW + KEPT + 1)) == ["n"]
    await history.close()
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT COUNT(*) FROM samples").fetchone() == (1,)
    connection.close()


async def test_it_stays_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MAX_SAMPLES", 5)
    history = await History.open(tmp_path / "h.sqlite")
    for step in range(4):
        await history.add({f"m{index}": sample(NOW + step) for index in range(3)}, NOW + step)
    await history.close()
    with sqlite3.connect(history.path) as connection:
        assert connection.execute("SELECT COUNT(*) FROM samples").fetchone() == (5,)
    connection.close()


async def test_two_pages_may_share_one(tmp_path: Path) -> None:
    one, other = await History.open(tmp_path / "h.sqlite"), await History.open(tmp_path / "h.sqlite")
    await asyncio.gather(*(page.add({"m": sample(NOW)}, NOW) for page in (one, other) * 5))
    assert list(await one.points(NOW)) == list(await other.points(NOW)) == ["m"]
    await one.close()
    await other.close()


def test_each_swarm_has_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SWARM_CACHE", str(tmp_path))
    assert default_path("a") != default_path("b")
    assert default_path("a").is_relative_to(tmp_path)
    monkeypatch.delenv("SWARM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert default_path("a").is_relative_to(tmp_path / "cache" / "swarm")


async def refused(path: Path) -> str:
    with pytest.raises(InputError) as raised:
        await History.open(path)
    assert "--history" in raised.value.hint
    return raised.value.message


async def test_what_is_no_history_is_refused_and_left_alone(tmp_path: Path) -> None:
    noise = tmp_path / "noise"
    noise.write_bytes(b"this is a letter to my aunt, not a database" * 100)
    assert "not a database" in await refused(noise)
    assert noise.read_bytes().startswith(b"this is a letter")
    other = tmp_path / "other"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE recipes (name)")
    connection.close()
    assert "another program" in await refused(other)
    assert "is a folder" in await refused(tmp_path) or "cannot be" in await refused(tmp_path)
    assert "cannot be" in await refused(noise / "below" / "a" / "file")


async def test_a_history_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "h.sqlite"
    await (await History.open(path)).close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    assert "another version" in await refused(path)


async def test_a_damaged_history_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "h.sqlite"
    history = await History.open(path)
    for step in range(60):
        await history.add({f"model {index}": sample(NOW + step) for index in range(50)}, NOW + step)
    await history.close()
    data = bytearray(path.read_bytes())
    data[4096 * 3 : 4096 * 6] = b"\xff" * (4096 * 3)
    path.write_bytes(data)
    assert "damaged" in await refused(path) or "malformed" in await refused(path)


async def test_a_file_that_breaks_meanwhile_is_an_error_with_a_hint(tmp_path: Path) -> None:
    history = await History.open(tmp_path / "h.sqlite")
    with sqlite3.connect(history.path) as connection:
        connection.execute("DROP TABLE samples")
    connection.close()
    with pytest.raises(HistoryFailed, match="cannot be used"):
        await history.add({"m": sample(NOW)}, NOW)
    await history.close()
