"""The last day of each model, in an SQLite file: who adds to it, who forgets, and what a chart needs of it.

Owns the file, and the thread in which all uses of it run in turn. Knows samples, not where they come from.
"""

import asyncio
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TypeVar

from swarm.cache import cache_folder
from swarm.errors import InputError, SwarmError
from swarm.health.state import Sample

T = TypeVar("T")

KEPT = 86_400.0
"""Seconds for which samples are kept."""

BUCKET = 900.0
"""Seconds that one point of a chart stands for."""

MAX_SAMPLES = 300_000
"""More than a hundred models leave in a day, a sample a minute each."""

BUSY_TIMEOUT = 5.0
"""Seconds to wait for another process that writes the same file."""

APPLICATION = 0x53574D48
LAYOUT = 1

TABLE = """
CREATE TABLE samples (
    model_id TEXT NOT NULL,
    at REAL NOT NULL,
    covered REAL NOT NULL,
    copies REAL NOT NULL,
    peers REAL NOT NULL,
    tokens_per_s REAL NOT NULL
);
CREATE INDEX samples_at ON samples (at);
"""
MAKE = f"BEGIN; PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {LAYOUT}; {TABLE} COMMIT;"
POINTS = """
SELECT model_id, CAST(at / :bucket AS INTEGER) AS point,
    MIN(covered), MIN(copies), AVG(peers), AVG(tokens_per_s)
FROM samples WHERE at > :since AND at <= :now
GROUP BY model_id, point ORDER BY model_id, point
"""


class HistoryFailed(SwarmError):
    """The history could not be written or read this time."""


class History:
    """Samples of the last `KEPT` seconds. Made by `open`; `close` ends it."""

    def __init__(self, path: Path, connection: sqlite3.Connection):
        self.path = path
        self._connection = connection
        self._thread = ThreadPoolExecutor(1, "history")

    @classmethod
    async def open(cls, path: Path) -> "History":
        """Open the file at `path`, or make it, together with its folder.

        Raises:
            InputError: it is not a history, is damaged, or cannot be written.
        """
        return cls(path, await asyncio.to_thread(_open, path))

    async def add(self, samples: Mapping[str, Sample], now: float) -> None:
        """Keep one sample for each model id, and forget what is too old, or too much.

        Raises:
            HistoryFailed: the file cannot be written.
        """
        rows = [
            (model_id, one.at, one.covered, one.copies, one.peers, one.tokens_per_s)
            for model_id, one in samples.items()
        ]
        await self._use(lambda connection: _add(connection, rows, now - KEPT))

    async def points(self, now: float) -> dict[str, list[Sample]]:
        """By model id, the last day up to `now`, oldest first: one sample for each `BUCKET` seconds.

        Its coverage is the worst of that time, its peers and throughput are the mean.

        Raises:
            HistoryFailed: the file cannot be read.
        """
        return await self._use(lambda connection: _points(connection, now))

    async def close(self) -> None:
        """Close the file once all that was begun is done. Safe to call again."""
        await asyncio.to_thread(self._thread.shutdown)
        await asyncio.to_thread(self._connection.close)

    async def _use(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work, self._connection)
        except sqlite3.Error as error:
            raise HistoryFailed(
                f"The history {self.path} cannot be used: {error}.",
                "Move the file away and start again, or give another --history.",
            ) from error


def default_path(swarm: str) -> Path:
    """Where the history of the swarm of that name lies in the user's cache."""
    return cache_folder() / "health" / f"{swarm}.sqlite"


def _open(path: Path) -> sqlite3.Connection:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT, check_same_thread=False)
    except OSError as error:
        raise _unusable(path, f"cannot be written: {error.strerror}") from error
    except sqlite3.Error as error:
        raise _unusable(path, f"cannot be opened: {error}") from error
    try:
        _prepare(path, connection)
    except sqlite3.Error as error:
        connection.close()
        raise _unusable(path, f"cannot be used: {error}") from error
    except InputError:
        connection.close()
        raise
    return connection


def _prepare(path: Path, connection: sqlite3.Connection) -> None:
    """Make the table in a new file; be sure of an old one, and that it can be written."""
    with closing(connection.execute("PRAGMA application_id")) as rows:
        (application,) = rows.fetchone()
    (layout,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
    if tables and application != APPLICATION:
        raise _unusable(path, "is the file of another program")
    if tables and layout != LAYOUT:
        raise _unusable(path, "was written by another version of this software")
    if (checked := connection.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
        raise _unusable(path, f"is damaged: {checked}")
    connection.execute("PRAGMA journal_mode = WAL")
    with connection:
        if tables:
            connection.execute("DELETE FROM samples WHERE 0")
        else:
            connection.executescript(MAKE)


def _add(
    connection: sqlite3.Connection,
    rows: Sequence[tuple[str, float, float, float, float, float]],
    since: float,
) -> None:
    with connection:
        connection.execute("DELETE FROM samples WHERE at <= ?", (since,))
        connection.executemany("INSERT INTO samples VALUES (?, ?, ?, ?, ?, ?)", rows)
        connection.execute(
            "DELETE FROM samples WHERE rowid <= (SELECT MAX(rowid) FROM samples) - ?", (MAX_SAMPLES,)
        )


def _points(connection: sqlite3.Connection, now: float) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = {}
    rows = connection.execute(POINTS, {"bucket": BUCKET, "since": now - KEPT, "now": now})
    for model_id, point, covered, copies, peers, rate in rows:
        sample = Sample(at=point * BUCKET, covered=covered, copies=copies, peers=peers, tokens_per_s=rate)
        found.setdefault(model_id, []).append(sample)
    return found


def _unusable(path: Path, reason: str) -> InputError:
    return InputError(
        f"The history {path} {reason}.",
        "Give another file with --history, or --history none to keep nothing.",
    )
