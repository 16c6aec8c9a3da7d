"""What a server says of itself in numbers: how they are called, and that they move as things happen."""

import asyncio
import logging
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families as parse_text

from swarm.net.messages import AnyMessage, Close, Open, Ping, Step
from swarm.net.transport import PeerId
from swarm.net.virtual_time import in_virtual_time
from swarm.server.cell import OnProgress, ShardCell
from swarm.server.metrics import LAG_PERIOD, Metrics
from swarm.spans import Span
from tests.fake_engine import FakeEngine, FakeResult, FakeStats

ONE = "1" * 32
PEER = PeerId("12D3KooPeer")
DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"
UNITS = ("_seconds", "_bytes", "_tokens", "_ratio", "_info", "_steps", "_pages", "_blocks")


@dataclass(frozen=True)
class Report:
    steps: int = 3
    decode_tokens: int = 2
    prefill_tokens: int = 30
    seconds: float = 0.02


def empty_cell(engine: FakeEngine | None = None) -> ShardCell:
    async def load(on_progress: OnProgress) -> FakeEngine:
        return engine or FakeEngine()

    return ShardCell(Span(0, 3), load)


def metrics_of(cell: ShardCell) -> Metrics:
    return Metrics(cell, model="tiny", peer=PEER)


def step(tokens: int = 1, seq_pos: int = 0) -> Step:
    return Step(
        session_id=ONE,
        number=1,
        seq_pos=seq_pos,
        payload_type="hidden_states",
        response_type="hidden_states",
        shape=(tokens, 3),
        dtype="float32",
    )


def result(tokens: int = 1) -> FakeResult:
    return FakeResult(
        memoryview(bytes(6 * tokens)),
        (tokens, 3),
        queue_ms=4.0,
        compute_ms=7.0,
        deserialise_ms=1.0,
        forward_ms=5.5,
        serialise_ms=0.5,
    )


def values(metrics: Metrics) -> dict[str, float]:
    """Samples by name and labels, as a scrape shows them: `name`, or `name{label=value,...}`."""
    found = {}
    for family in parse_text(generate_latest(metrics.registry).decode()):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


@in_virtual_time
async def test_names_follow_the_conventions() -> None:
    for family in metrics_of(empty_cell()).registry.collect():
        if family.name.startswith("process_"):
            continue
        assert re.fullmatch(r"swarm_[a-z]+(_[a-z]+)*", family.name)
        assert re.fullmatch(r"[0-9A-Z].*\.", family.documentation), family.name
        assert family.samples, f"{family.name} is missing until something happens"
        assert not re.search(r"(_ms|_milliseconds|_mb|_kb|_percent|_count|_sum|_bucket|_total)$", family.name)
        totals = [sample.name.endswith("_total") for sample in family.samples]
        assert any(totals) == (family.type == "counter"), family.name
        if family.type == "histogram":
            assert family.name.endswith(UNITS), f"{family.name} names no unit"
        for sample in family.samples:
            assert sample.labels.keys() <= LABELS[family.name] | {"le"}
        if re.search(r"time|duration|lag|latency", family.name):
            assert family.name.endswith("_seconds")


LABELS: dict[str, set[str]] = {
    "swarm_batch_seconds": set(),
    "swarm_batch_steps": set(),
    "swarm_batch_tokens": set(),
    "swarm_event_loop_lag_seconds": set(),
    "swarm_kv_pages": {"state"},
    "swarm_kv_unpromised_tokens": set(),
    "swarm_prefix_asked_tokens": set(),
    "swarm_prefix_held_tokens": set(),
    "swarm_queue_steps": set(),
    "swarm_refusals": {"request", "code"},
    "swarm_server": {"version", "model", "peer", "span", "dtype", "quantization"},
    "swarm_server_state": {"state"},
    "swarm_sessions": set(),
    "swarm_sessions_opened": set(),
    "swarm_shard_blocks": set(),
    "swarm_shard_bytes": set(),
    "swarm_shard_progress_ratio": set(),
    "swarm_step_received_bytes": set(),
    "swarm_step_seconds": {"kind"},
    "swarm_step_sent_bytes": set(),
    "swarm_step_stage_seconds": {"stage"},
    "swarm_tokens": {"kind"},
}
"""Every metric's labels: none of them may be a session, a client or an address."""


@in_virtual_time
async def test_the_documentation_lists_every_metric_and_no_other() -> None:
    rows = re.findall(r"^\| `(swarm_\w+)` \| (\w+) \| ([^|]*) \| ([^|]+) \|$", DOCS.read_text(), re.MULTILINE)
    written = {
        (name, kind, frozenset(re.findall(r"`(\w+)`", labels)), text) for name, kind, labels, text in rows
    }
    suffixes = {"counter": "_total", "info": "_info"}
    counted = {
        (
            family.name + suffixes.get(family.type, ""),
            family.type,
            frozenset(LABELS[family.name]),
            family.documentation,
        )
        for family in metrics_of(empty_cell()).registry.collect()
        if family.name.startswith("swarm_")
    }
    assert written == counted
    assert len(rows) == len(written)


@in_virtual_time
async def test_steps_are_counted_by_stage_and_kind() -> None:
    metrics = metrics_of(empty_cell())
    metrics.on_step(PEER, step(1), result(1), 0.012)
    metrics.on_step(PEER, step(40), result(40), 0.3)
    seen = values(metrics)
    assert seen["swarm_step_seconds_sum{kind=decode}"] == pytest.approx(0.012)
    assert seen["swarm_step_seconds_bucket{kind=decode,le=0.01}"] == 0
    assert seen["swarm_step_seconds_bucket{kind=decode,le=0.025}"] == 1
    assert seen["swarm_step_seconds_count{kind=prefill}"] == 1
    stages = {"queue": 0.004, "deserialise": 0.001, "forward": 0.0055, "serialise": 0.0005}
    for stage, seconds in stages.items():
        assert seen[f"swarm_step_stage_seconds_sum{{stage={stage}}}"] == pytest.approx(2 * seconds)
    assert seen["swarm_step_received_bytes_total"] == 41 * 3 * 4
    assert seen["swarm_step_sent_bytes_total"] == 41 * 6


@in_virtual_time
async def test_batches_are_counted() -> None:
    metrics = metrics_of(empty_cell())
    metrics.on_batch(Report())
    metrics.on_batch(Report(steps=1, decode_tokens=0, prefill_tokens=600, seconds=0.3))
    seen = values(metrics)
    assert seen["swarm_tokens_total{kind=decode}"] == 2
    assert seen["swarm_tokens_total{kind=prefill}"] == 630
    assert seen["swarm_batch_steps_bucket{le=1.0}"] == 1
    assert seen["swarm_batch_steps_sum"] == 4
    assert seen["swarm_batch_tokens_bucket{le=32.0}"] == 1
    assert seen["swarm_batch_tokens_sum"] == 632
    assert seen["swarm_batch_seconds_sum"] == pytest.approx(0.32)


@in_virtual_time
async def test_opened_and_refused_sessions_are_counted() -> None:
    metrics = metrics_of(empty_cell())
    asked = Open(session_id=ONE, model_id="m", start=0, end=3, max_tokens=200, page_keys=bytes(16 * 4))
    refused: list[tuple[AnyMessage, str]] = [
        (asked, "open"),
        (step(), "step"),
        (Close(session_id=ONE), "close"),
    ]
    metrics.on_opened(asked, 96)
    for request, name in refused:
        before = values(metrics)[f"swarm_refusals_total{{code=no_capacity,request={name}}}"]
        metrics.on_refused(request, "no_capacity")
        after = values(metrics)[f"swarm_refusals_total{{code=no_capacity,request={name}}}"]
        assert (before, after) == (0, 1)
    metrics.on_refused(Ping(nonce=1), "internal")
    seen = values(metrics)
    assert seen["swarm_refusals_total{code=internal,request=ping}"] == 1
    assert seen["swarm_sessions_opened_total"] == 1
    assert seen["swarm_prefix_asked_tokens_total"] == 128
    assert seen["swarm_prefix_held_tokens_total"] == 96


@in_virtual_time
async def test_the_cell_is_read_when_asked_and_counters_outlive_its_engine() -> None:
    stats = FakeStats(sessions=2, kv_pages=10, kv_pages_used=3, kv_pages_cached=1)
    engine = FakeEngine(queue=4, sessions={ONE: 300}, stats=stats)
    cell = empty_cell(engine)
    metrics = metrics_of(cell)
    seen = values(metrics)
    assert seen["swarm_server_state{state=joining}"] == 1
    assert seen["swarm_kv_pages{state=free}"] == seen["swarm_shard_bytes"] == seen["swarm_shard_blocks"] == 0
    await cell.fill()
    metrics.on_batch(Report())
    seen = values(metrics)
    assert [seen[f"swarm_kv_pages{{state={state}}}"] for state in ("free", "used", "cached")] == [6, 3, 1]
    assert seen["swarm_kv_unpromised_tokens"] == 700
    assert (seen["swarm_sessions"], seen["swarm_queue_steps"]) == (2, 4)
    assert (seen["swarm_shard_bytes"], seen["swarm_shard_blocks"]) == (engine.shard_bytes, 3)
    assert seen["swarm_shard_progress_ratio"] == 1
    assert seen["swarm_server_state{state=serving}"] == 1
    await cell.evict()
    seen = values(metrics)
    states = {name: value for name, value in seen.items() if name.startswith("swarm_server_state")}
    assert states.pop("swarm_server_state{state=asleep}") == 1
    assert not any(states.values())
    assert seen["swarm_sessions"] == seen["swarm_shard_blocks"] == seen["swarm_kv_pages{state=used}"] == 0
    assert seen["swarm_tokens_total{kind=decode}"] == 2


@in_virtual_time
async def test_the_server_tells_what_it_is() -> None:
    cell = empty_cell()
    metrics = metrics_of(cell)
    await cell.fill()
    [family] = [family for family in metrics.registry.collect() if family.type == "info"]
    [sample] = family.samples
    assert {**sample.labels, "version": ""} == {
        "version": "",
        "model": "tiny",
        "peer": PEER,
        "span": "0:3",
        "dtype": "float16",
        "quantization": "none",
    }


@in_virtual_time
async def test_two_servers_in_one_process_count_apart() -> None:
    first, second = metrics_of(empty_cell()), metrics_of(empty_cell())
    first.on_batch(Report())
    assert values(second)["swarm_batch_steps_count"] == 0


@in_virtual_time
async def test_the_lag_of_the_event_loop_is_how_much_later_it_is_than_due() -> None:
    metrics = metrics_of(empty_cell())
    times = iter([0.0, LAG_PERIOD + 0.04, 1.0, 1.0 + LAG_PERIOD - 1e-3, 2.0])
    watching = asyncio.create_task(metrics.watch_lag(lambda: next(times)))
    await asyncio.sleep(LAG_PERIOD * 2.5)
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    seen = values(metrics)
    assert seen["swarm_event_loop_lag_seconds_sum"] == pytest.approx(0.04)
    assert seen["swarm_event_loop_lag_seconds_count"] == 2
    assert seen["swarm_event_loop_lag_seconds_bucket{le=0.0001}"] == 1, "early is not late"


@in_virtual_time
async def test_each_step_leaves_one_line_for_who_looks_closely(caplog: pytest.LogCaptureFixture) -> None:
    metrics = metrics_of(empty_cell())
    with caplog.at_level(logging.DEBUG, "swarm.server.metrics"):
        metrics.on_step(PEER, step(2, seq_pos=7), result(2), 0.0125)
    assert [record.getMessage() for record in caplog.records] == [
        f"peer {PEER}, session {ONE}: 2 tokens at 7 took 12.50 ms: queue 4.00, deserialise 1.00,"
        " forward 5.50, serialise 0.50"
    ]
