"""The page as HTML: templates, the geometry of the map and the charts, and numbers as people read them.

The only place where text of peers becomes HTML: the templates escape every value. Knows the state and
nothing of HTTP.
"""

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from swarm.health.state import SEEN_STATES, ModelView, PeerView, Sample, SwarmState
from swarm.spans import Span

FOLDER = Path(__file__).parent

MAX_ROWS = 32
"""So many peers have a row with their name in the map; more share thin lanes."""

MAX_LANES = 120
MAX_CELLS = 128
"""Of a model of so many blocks each one is drawn; of a deeper one, runs of them."""

ROW_HEIGHT = 20
LANE_HEIGHT = 6
CROWDED_HEIGHT = 3
CROWDED = 60
"""Above so many lanes each is drawn lower."""

SPACES = {ROW_HEIGHT: 3.0, LANE_HEIGHT: 1.0, CROWDED_HEIGHT: 0.5}
"""Pixels that are left free above and below a bar, by the height of its row."""

DAY = 86_400.0
CHART = (240, 36)
"""Width and height of a chart, in its own units."""

GAP_SECONDS = 2_000.0
"""A line is broken where there was no sample for longer."""

TICKS = (1, 2, 4, 5, 8, 10, 16, 20, 25, 32, 40, 50, 64, 80, 100, 125, 200, 250)
MAX_TICKS = 9

STANDINGS = {
    "runs": "can be run",
    "full": "full: a session must end first",
    "wakes": "asleep: loads when it is asked",
    "joining": "not yet: loading",
    "incomplete": "cannot be run",
}


class Bar(NamedTuple):
    """A rectangle of the map. `x` and `width` are in percent of its width, `y` and `height` in pixels."""

    x: float
    y: float
    width: float
    height: float
    kind: str
    title: str = ""
    text: str = ""


class Tick(NamedTuple):
    x: float
    text: str


class BlockMap(NamedTuple):
    """The map of one model: who holds what. Without `names`, rows are shared."""

    cells: list[Bar]
    bars: list[Bar]
    gaps: list[Bar]
    ticks: list[Tick]
    names: list[PeerView]
    height: int
    left_out: int


class Chart(NamedTuple):
    """One line of the last day: path segments in a box of `CHART`, and what it says."""

    label: str
    lines: list[str]
    top: str
    newest: str
    summary: str


def page_of(state: SwarmState, version: int) -> str:
    """The whole page, as first shown and as fetched again when there is news."""
    maps = {model.model_id: map_of(model) for model in state.models}
    charts = {model.model_id: charts_of(model.history, state.at) for model in state.models}
    return _template.render(state=state, version=version, maps=maps, charts=charts)


def map_of(model: ModelView) -> BlockMap:
    """Where everything of a model's map is drawn."""
    scale = 100 / model.num_blocks
    is_named = len(model.peers) <= MAX_ROWS
    rows = list(enumerate(model.peers)) if is_named else lanes(model.peers)
    drawn = [(row, peer) for row, peer in rows if row < MAX_LANES]
    count = max((row for row, _ in drawn), default=0) + 1
    height = ROW_HEIGHT if is_named else LANE_HEIGHT if count <= CROWDED else CROWDED_HEIGHT
    return BlockMap(
        cells=_cells(model, scale),
        bars=[bar for row, peer in drawn for bar in _bars(peer, row * height, height, scale)],
        gaps=[Bar(gap.start * scale, 0, gap.size * scale, count * height, "gap") for gap in model.missing],
        ticks=ticks(model.num_blocks),
        names=list(model.peers) if is_named else [],
        height=count * height,
        left_out=len(model.peers) - len(drawn) + model.peers_left_out,
    )


def lanes(peers: Sequence[PeerView]) -> list[tuple[int, PeerView]]:
    """Peers, ordered by span, in as few rows as possible so that none overlaps another in its row."""
    ends: list[int] = []
    placed = []
    for peer in peers:
        row = next((row for row, end in enumerate(ends) if end <= peer.blocks.start), len(ends))
        if row < MAX_LANES:
            ends[row : row + 1] = [peer.blocks.end]
        placed.append((row, peer))
    return placed


def ticks(num_blocks: int) -> list[Tick]:
    """Where blocks are numbered below the map: at round numbers, `MAX_TICKS` at most."""
    step = next((step for step in TICKS if num_blocks / step <= MAX_TICKS), TICKS[-1])
    return [Tick(100 * block / num_blocks, str(block)) for block in range(0, num_blocks, step)]


def charts_of(samples: Sequence[Sample], now: float) -> list[Chart]:
    """The last day's coverage, peers and throughput; none where there are no samples."""
    if not samples:
        return []
    return [
        _chart("Blocks served", [(one.at, one.covered * 100) for one in samples], now, top=100, unit=" %"),
        _chart("Peers", [(one.at, one.peers) for one in samples], now),
        _chart("Tokens/s", [(one.at, one.tokens_per_s) for one in samples], now),
    ]


def _chart(
    label: str, points: list[tuple[float, float]], now: float, top: float = 0.0, unit: str = ""
) -> Chart:
    values = [value for _, value in points]
    highest = max(top, *values, 1e-9)
    width, height = CHART
    drawn = [
        (at, width * (1 - min(max(now - at, 0) / DAY, 1)), height - (height - 2) * value / highest - 1)
        for at, value in points
    ]
    lines, line = [], [drawn[0]]
    for before, after in pairwise(drawn):
        if after[0] - before[0] > GAP_SECONDS:
            lines.append(line)
            line = []
        line.append(after)
    lines.append(line)
    newest = f"{number(values[-1])}{unit}"
    summary = f"{label} in the last day: {number(min(values))} to {number(max(values))}{unit}, last {newest}"
    return Chart(label, [_path(line) for line in lines], f"{number(highest)}{unit}", newest, summary)


def _path(line: Sequence[tuple[float, float, float]]) -> str:
    points = [(x, y) for _, x, y in line]
    if len(points) == 1:
        points.append((points[0][0] + 1, points[0][1]))
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _cells(model: ModelView, scale: float) -> list[Bar]:
    """The strip that counts: how many serve each block."""
    cells = []
    for run in model.coverage:
        steps = range(run.start, run.end) if model.num_blocks <= MAX_CELLS else (run.start,)
        size = 1 if model.num_blocks <= MAX_CELLS else run.end - run.start
        kind = f"c{min(run.copies, 4)}"
        for start in steps:
            title = f"{blocks_text(Span(start, start + size))}: {peers_text(run.copies)}"
            text = str(run.copies) if scale * size >= 2.4 and run.copies < 1000 else ""
            cells.append(Bar(start * scale, 0, size * scale, ROW_HEIGHT, kind, title, text))
    return cells


def _bars(peer: PeerView, y: int, height: int, scale: float) -> list[Bar]:
    x, width = peer.blocks.start * scale, peer.blocks.size * scale
    space = SPACES[height]
    tall = height - 2 * space
    title = f"{name_of(peer)}: {state_text(peer)}, {blocks_text(peer.blocks)}"
    is_lost = peer.reachable is False or peer.serves is False
    kind = f"{peer.state} lost" if is_lost else peer.state
    bars = [Bar(x, y + space, width, tall, kind, title)]
    if peer.state == "joining":
        bars.append(Bar(x, y + space, width * peer.progress, tall, "loaded", title))
    return bars


def blocks_text(span: Span) -> str:
    """Blocks by their first and last number, both included."""
    return f"block {span.start}" if span.size == 1 else f"blocks {span.start} to {span.end - 1}"


def spans_text(spans: Sequence[Span]) -> str:
    """The first few of the spans."""
    shown = ", ".join(blocks_text(span) for span in spans[:3])
    return f"{shown} and {len(spans) - 3} more gaps" if len(spans) > 3 else shown


def peers_text(count: int) -> str:
    return f"{count} peer{'' if count == 1 else 's'}"


def name_of(peer: PeerView) -> str:
    short = f"…{peer.peer[-6:]}"
    return f"{peer.name} ({short})" if peer.name else short


def state_text(peer: PeerView) -> str:
    return f"joining, {peer.progress:.0%} loaded" if peer.state == "joining" else peer.state


def standing_text(model: ModelView) -> str:
    """In a few words, whether a model can be run."""
    text = STANDINGS[model.standing]
    return f"{text}, {model.progress:.0%}" if model.standing == "joining" else text


def states_text(model: ModelView) -> str:
    """How many peers are in which state, unless all of them serve."""
    found = [f"{model.states[state]} {state}" for state in SEEN_STATES if model.states.get(state)]
    return ", ".join(found) if set(model.states) - {"serving"} else ""


def number(value: float) -> str:
    """Three digits and a unit for what is large: 0.25, 12.5, 980, 1.2k, 34M."""
    for limit, unit in ((1e15, ""), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= limit:
            return f"{value:.0e}" if not unit else f"{value / (1e3 if unit == 'k' else limit):.3g}{unit}"
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.2g}"


def clock(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%H:%M:%S") if at else "never"


def anchor(model_id: str) -> str:
    """A name for links to a model: its id may hold anything."""
    return f"m-{hashlib.sha256(model_id.encode()).hexdigest()[:12]}"


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters.update(
        number=number,
        clock=clock,
        blocks=blocks_text,
        spans=spans_text,
        peers=peers_text,
        who=name_of,
        standing=standing_text,
        states=states_text,
        percent=lambda value: f"{value:.2f}%",
        anchor=anchor,
    )
    environment.globals.update(chart_box=CHART)
    return environment


_template = _environment().get_template("page.html")
