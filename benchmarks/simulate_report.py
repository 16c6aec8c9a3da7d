"""What `benchmarks.simulate` prints: a table for each part, and where figures fall short of the aims."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

OPTIMUM_AIM = 0.9
"""The part of the best placement's throughput that ours is to reach."""

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]


def show(result: dict[str, Any]) -> None:
    console = Console(width=140)
    for title, columns, rows in (
        ("Placement against the best there is", OPTIMUM, result.get("optimum", [])),
        ("Whole swarms, with churn", WHOLE, result.get("whole", [])),
        ("Whole swarms under load", LOADED, loads_of(result.get("whole", []))),
        ("Crowds, with churn", CROWD, result.get("crowd", [])),
        ("Routes through crowds", TRAFFIC, loads_of(result.get("crowd", []))),
        ("The DHT: one server's part", DHT, result.get("dht", [])),
    ):
        if rows:
            table = Table(title=title)
            for name, _ in columns:
                table.add_column(name, justify="right")
            for row in rows:
                table.add_row(*(text(row) for _, text in columns))
            console.print(table)
    if len(result.get("dht", [])) > 1:
        console.print(growth_text(result["dht"]))
    for miss in misses(result):
        console.print(f"Short of the aim: {miss}")


def loads_of(rows: Sequence[Row]) -> list[Row]:
    """One row for each load of each swarm."""
    return [
        {"servers": row["servers"], "blocks": row["blocks"], **load} for row in rows for load in row["loads"]
    ]


def growth(rows: Sequence[Row]) -> tuple[float, float, float]:
    """Calls a second as `base + slope · log2(peers)`: both, and how much of the variance that explains."""
    doublings = np.log2([row["peers"] for row in rows])
    calls = np.array([row["calls_a_second"] for row in rows])
    slope, base = np.polyfit(doublings, calls, 1)
    rest = ((calls - base - slope * doublings) ** 2).sum()
    return float(base), float(slope), float(1 - rest / ((calls - calls.mean()) ** 2).sum())


def growth_text(rows: Sequence[Row]) -> str:
    base, slope, explained = growth(rows)
    return f"Calls a server and second: {base:.1f} + {slope:.2f} · log2(peers), R² = {explained:.2f}."


def misses(result: dict[str, Any]) -> list[str]:
    return [
        f"{row['servers']} servers of {row['blocks']} blocks carry {row['settled']:.2f} of the best,"
        f" the aim is {OPTIMUM_AIM}"
        for row in result.get("optimum", [])
        if row["settled"] < OPTIMUM_AIM
    ]


def _number(name: str, form: str = "g") -> Callable[[Row], str]:
    return lambda row: "-" if row[name] is None else format(row[name], form)


def _percent(name: str) -> Callable[[Row], str]:
    return lambda row: "-" if row[name] is None else f"{100 * row[name]:.2f} %"


SIZE: list[Column] = [("servers", _number("servers")), ("blocks", _number("blocks"))]
OPTIMUM: list[Column] = [
    *SIZE,
    ("swarms", _number("swarms")),
    ("joined", _number("joined", ".3f")),
    ("settled", _number("settled", ".3f")),
    ("least", _number("settled_least", ".3f")),
    ("moves a server", _number("moves_a_server", ".2f")),
]
WHOLE: list[Column] = [
    *SIZE,
    ("records", _number("records", "")),
    ("minutes", _number("minutes")),
    ("covered after (s)", _number("churn_covered_s", ".0f")),
    ("open", _percent("open")),
    ("of it unavoidable", _percent("unavoidable")),
    ("moves a server-hour", _number("moves_a_server_hour", ".2f")),
    ("talks", _number("talks")),
    ("failed", lambda row: str(sum(row["talks_failed"].values()))),
    ("hops replaced", _number("recoveries")),
    ("DHT calls/s", _number("calls_a_server_second", ".1f")),
    ("KB/s", lambda row: f"{row['bytes_a_server_second'] / 1000:.0f}"),
]
LOADED: list[Column] = [
    *SIZE,
    ("load", _number("load")),
    ("capacity (tokens/s)", _number("capacity", ".0f")),
    ("asked", _number("asked", ".0f")),
    ("given", _number("given", ".0f")),
    ("ms a token", _number("token_ms", ".0f")),
    ("95 %", _number("token_ms_p95", ".0f")),
    ("first token", _number("first_ms", ".0f")),
    ("sessions", _number("sessions")),
    ("failed", _number("failed")),
]
CROWD: list[Column] = [
    *SIZE,
    ("seconds", _number("seconds")),
    ("covered after (s)", _number("covered_s", ".0f")),
    ("open", _percent("open")),
    ("of it unavoidable", _percent("unavoidable")),
    ("moves a server-hour", _number("moves_a_server_hour", ".3f")),
    ("carried of what is there", _percent("carried")),
    ("choosing (ms)", _number("placing_ms", ".1f")),
    ("planning (ms)", _number("planning_ms", ".1f")),
    ("route (ms)", lambda row: f"{row['routing']['known_ms']:.1f}" if row["routing"] else "-"),
    ("after news (ms)", lambda row: f"{row['routing']['new_ms']:.1f}" if row["routing"] else "-"),
]
TRAFFIC: list[Column] = [
    *SIZE,
    ("load", _number("load")),
    ("capacity (tokens/s)", _number("capacity", ".0f")),
    ("sessions", _number("sessions")),
    ("given", _number("given", ".0f")),
    ("ms a token", _number("token_ms", ".0f")),
    ("95 %", _number("token_ms_p95", ".0f")),
    ("hops", _number("hops", ".1f")),
]
DHT: list[Column] = [
    ("peers", _number("peers")),
    ("blocks", _number("blocks")),
    ("calls/s", _number("calls_a_second", ".1f")),
    ("finds", _number("finds_a_second", ".1f")),
    ("stores", _number("stores_a_second", ".1f")),
    ("KB/s", lambda row: f"{row['bytes_a_second'] / 1000:.0f}"),
    ("reading (s)", _number("reading_s", ".2f")),
    ("writing (s)", _number("writing_s", ".2f")),
    ("given up", _number("failed")),
]
