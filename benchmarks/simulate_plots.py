"""Pictures of what `benchmarks.simulate` found. Needs matplotlib, from the extra "bench"."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from benchmarks.simulate_report import OPTIMUM_AIM, growth

INK, QUIET, GRID = "#1d2733", "#66727f", "#e3e7ec"
COLOURS = ("#1f6feb", "#d9822b", "#2b9a66", "#9a4fc4")
STYLE: dict[str, Any] = {
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": QUIET,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "lines.markersize": 6,
}
DPI = 110


def draw(result: dict[str, Any], folder: Path) -> None:
    """Write the pictures of those parts that `result` has, as PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        if "optimum" in result and "crowd" in result:
            _save(_placement(result["optimum"], result["crowd"]), folder / "simulated-placement.png")
        if "whole" in result:
            _save(_load(result["whole"]), folder / "simulated-load.png")
        if len(result.get("dht", ())) > 1 and "crowd" in result:
            _save(_size(result["dht"], result["crowd"]), folder / "simulated-size.png")


def _placement(optimum: Sequence[dict[str, Any]], crowd: Sequence[dict[str, Any]]) -> plt.Figure:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.5), width_ratios=(1.1, 1, 1))
    rng = np.random.default_rng(0)
    for at, row in enumerate(optimum):
        shares = row["shares"]
        left.scatter(
            at + rng.uniform(-0.13, 0.13, len(shares)), shares, s=22, color=COLOURS[0], alpha=0.55, lw=0
        )
        left.plot([at - 0.25, at + 0.25], [row["settled"]] * 2, color=INK, lw=2)
    left.axhline(OPTIMUM_AIM, color=COLOURS[1], lw=1.2, ls=(0, (4, 3)))
    left.text(-0.47, OPTIMUM_AIM + 0.008, "aim", color=COLOURS[1], va="bottom", fontsize=9)
    left.set_xticks(
        range(len(optimum)), [f"{row['servers']} servers\n{row['blocks']} blocks" for row in optimum]
    )
    left.set_xlim(-0.5, len(optimum) - 0.4)
    left.set_ylim(min(0.6, *(row["settled_least"] - 0.03 for row in optimum)), 1.03)
    left.grid(axis="x", visible=False)
    left.set_title("Throughput, part of the optimum")
    names = [f"{row['servers']:,}" for row in crowd]
    _bars(middle, names, [100 * row["carried"] for row in crowd], COLOURS[0], "{:.0f}")
    middle.set_title("Carried, % of all strength there")
    middle.set_ylim(0, 108)
    _bars(right, names, [row["moves_a_server_hour"] for row in crowd], COLOURS[2], "{:.2f}")
    right.set_title("Moves per server and hour")
    for axes in (middle, right):
        axes.set_xlabel("servers, coming and going")
    return figure


def _bars(axes: Axes, names: Sequence[str], values: Sequence[float], colour: str, form: str) -> None:
    bars = axes.bar(names, values, width=0.55, color=colour)
    axes.bar_label(bars, [form.format(value) for value in values], padding=3, color=INK, fontsize=9)
    axes.set_ylim(0, max([*values, 0.01]) * 1.18)
    axes.grid(axis="x", visible=False)


def _load(whole: Sequence[dict[str, Any]]) -> plt.Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6))
    for row, colour in zip([row for row in whole if row["loads"]], COLOURS, strict=False):
        loads = [100 * load["load"] for load in row["loads"]]
        name = f"{row['servers']} servers, {row['blocks']} blocks"
        middle = [load["token_ms"] for load in row["loads"]]
        high = [load["token_ms_p95"] for load in row["loads"]]
        left.plot(loads, middle, marker="o", color=colour, label=name)
        left.plot(loads, high, color=colour, lw=1.2, ls=(0, (4, 3)))
        given = [100 * load["given"] / load["capacity"] for load in row["loads"]]
        asked = [100 * load["asked"] / load["capacity"] for load in row["loads"]]
        right.plot(loads, given, marker="o", color=colour)
        right.plot(loads, asked, color=GRID, lw=5, zorder=0, solid_capstyle="round")
    left.plot([], [], color=QUIET, lw=1.2, ls=(0, (4, 3)), label="95th percentile")
    left.set_ylim(bottom=0)
    left.legend(loc="upper left")
    left.set_title("Milliseconds per token")
    right.plot([], [], color=GRID, lw=5, label="asked for")
    right.legend(loc="upper left")
    right.set_ylim(bottom=0)
    right.set_title("Tokens given, % of capacity")
    for axes in (left, right):
        axes.set_xlabel("load, % of what the servers can carry")
    return figure


def _size(dht: Sequence[dict[str, Any]], crowd: Sequence[dict[str, Any]]) -> plt.Figure:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.5))
    peers = [row["peers"] for row in dht]
    base, slope, _ = growth(dht)
    fitted = np.geomspace(min(peers), max(peers), 50)
    left.plot(fitted, base + slope * np.log2(fitted), color=GRID, lw=5, zorder=0, label="logarithm")
    left.plot(peers, [row["calls_a_second"] for row in dht], "o", color=COLOURS[0], label="measured")
    left.set_ylim(bottom=0)
    left.legend(loc="lower right")
    left.set_title("DHT calls per server and second")
    middle.plot(peers, [row["reading_s"] for row in dht], marker="o", color=COLOURS[0], label="reading all")
    middle.plot(peers, [row["writing_s"] for row in dht], marker="o", color=COLOURS[1], label="announcing")
    middle.set_ylim(bottom=0)
    middle.legend(loc="lower right")
    middle.set_title("Seconds that the DHT takes")
    crowd = [row for row in crowd if row["routing"]]
    servers = [row["servers"] for row in crowd]
    for name, values, colour in (
        ("finding a route", [row["routing"]["known_ms"] for row in crowd], COLOURS[0]),
        ("choosing blocks", [row["placing_ms"] for row in crowd], COLOURS[2]),
        ("planning moves", [row["planning_ms"] for row in crowd], COLOURS[1]),
    ):
        right.plot(servers, values, marker="o", color=colour, label=name)
    right.set_ylim(bottom=0)
    right.legend(loc="upper left")
    right.set_title("Milliseconds to decide")
    for axes, label in ((left, "peers"), (middle, "peers"), (right, "servers")):
        axes.set_xscale("log")
        ticks = peers if axes is not right else servers
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel(label)
    return figure


def _save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout(w_pad=2.5)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
