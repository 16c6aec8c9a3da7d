"""What a server says of itself in numbers: counted as things happen, read from the shard cell when asked.

Owns the names, units and help texts of all metrics; `docs/metrics.md` lists them. Must not know how they are
asked for, nor of streams: whoever sees something happen calls an observer, on the event loop.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import product
from typing import Any, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from swarm.blocks.batch import DECODE_ROWS, MAX_ROWS
from swarm.dht.announcement import PeerState
from swarm.net.messages import AnyMessage, ErrorCode, Open, Step, body_bytes
from swarm.net.transport import PeerId
from swarm.page_keys import KEY_BYTES, PAGE_TOKENS
from swarm.server.cell import ShardCell
from swarm.server.span_engine import BatchReport, StepOutcome
from swarm.version import VERSION

logger = logging.getLogger(__name__)

STATES: tuple[str, ...] = (*get_args(PeerState), "asleep")
REQUESTS = ("probe", "open", "step", "link", "feed", "handover", "mirror", "adopt", "close")
KINDS = ("decode", "prefill")
STAGES = ("queue", "deserialise", "forward", "serialise")

SECONDS = (
    0.0001,
    0.00025,
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
)
"""Upper bounds of the buckets of all times."""

COUNTS = tuple(2**power for power in range(MAX_ROWS.bit_length()))
"""Upper bounds of the buckets of batch sizes, from 1 to the most rows of an iteration."""

LAG_PERIOD = 0.25
"""Seconds between two looks at how late the event loop is."""


class Metrics:
    """The metrics of one server, in a registry of their own.

    `model` is the model's public name, `peer` this peer's id. The cell may be filled, evicted and filled
    again: what is counted goes on from where it was.
    """

    def __init__(self, cell: ShardCell, *, model: str = "", peer: str = ""):
        self.cell = cell
        self.registry = CollectorRegistry()
        self._sessions = _SessionMetrics(self.registry)
        self._steps = _StepMetrics(self.registry)
        self._batches = _BatchMetrics(self.registry)
        self._lag = Histogram(
            "swarm_event_loop_lag_seconds",
            "How much later than due the event loop ran a timer.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.registry.register(_CellMetrics(cell, model, peer))
        ProcessCollector(registry=self.registry)

    def on_opened(self, asked: Open, held: int) -> None:
        """A session was opened, and began with `held` tokens of what `asked` names."""
        self._sessions.opened.inc()
        self._sessions.prefix_asked.inc(len(asked.page_keys) // KEY_BYTES * PAGE_TOKENS)
        self._sessions.prefix_held.inc(held)

    def on_refused(self, request: AnyMessage, code: ErrorCode) -> None:
        """A request was answered with an error."""
        self._sessions.refusals.labels(type(request).__name__.lower(), code).inc()

    def on_step(self, peer: PeerId, step: Step, done: StepOutcome, seconds: float) -> None:
        """A step of `peer` was run, and took `seconds` from its arrival until its result was there."""
        self._steps.add(step, done, seconds)
        logger.debug(
            "peer %s, session %s: %d tokens at %d took %.2f ms: queue %.2f, deserialise %.2f, forward %.2f,"
            " serialise %.2f",
            peer,
            step.session_id,
            step.shape[0],
            step.seq_pos,
            1000 * seconds,
            done.queue_ms,
            done.deserialise_ms,
            done.forward_ms,
            done.serialise_ms,
        )

    def on_batch(self, report: BatchReport) -> None:
        """The engine has run an iteration; this is what `SpanEngine.on_batch` is to be."""
        self._batches.add(report)

    async def watch_lag(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Measure how late the event loop is, until cancelled."""
        while True:
            asleep_at = clock()
            await asyncio.sleep(LAG_PERIOD)
            self._lag.observe(max(0.0, clock() - asleep_at - LAG_PERIOD))

    def shard(self) -> dict[str, Any]:
        """The state of the shard, for JSON: spans as [start, end], sizes in bytes."""
        return asdict(self.cell.view())


class _SessionMetrics:
    """Sessions opened, requests refused, and what the prefix cache was asked for."""

    def __init__(self, registry: CollectorRegistry):
        self.opened = Counter("swarm_sessions_opened", "Sessions that were admitted.", registry=registry)
        self.refusals = Counter(
            "swarm_refusals",
            "Requests answered with an error, by the kind of request and the error's code.",
            ("request", "code"),
            registry=registry,
        )
        self.prefix_asked = Counter(
            "swarm_prefix_asked_tokens",
            "Tokens of prefixes whose pages clients named when they opened a session.",
            registry=registry,
        )
        self.prefix_held = Counter(
            "swarm_prefix_held_tokens",
            "Tokens that sessions had at their opening, from the prefix cache.",
            registry=registry,
        )
        for request, code in product(REQUESTS, get_args(ErrorCode)):
            self.refusals.labels(request, code)


class _StepMetrics:
    """What single steps took, and brought and got in bytes."""

    def __init__(self, registry: CollectorRegistry):
        whole = Histogram(
            "swarm_step_seconds",
            f"Time from a step's arrival to its result; up to {DECODE_ROWS} tokens count as decode.",
            ("kind",),
            buckets=SECONDS,
            registry=registry,
        )
        stages = Histogram(
            "swarm_step_stage_seconds",
            "Time that a step spent in each stage: waiting in the queue, being read, computed, and written.",
            ("stage",),
            buckets=SECONDS,
            registry=registry,
        )
        self._received = Counter(
            "swarm_step_received_bytes",
            "Bytes of activations and token ids that steps brought.",
            registry=registry,
        )
        self._sent = Counter(
            "swarm_step_sent_bytes", "Bytes of activations that steps were answered with.", registry=registry
        )
        self._whole = {kind: whole.labels(kind) for kind in KINDS}
        self._stages = [stages.labels(stage) for stage in STAGES]

    def add(self, step: Step, done: StepOutcome, seconds: float) -> None:
        kind = "decode" if step.shape[0] <= DECODE_ROWS else "prefill"
        self._whole[kind].observe(seconds)
        times = (done.queue_ms, done.deserialise_ms, done.forward_ms, done.serialise_ms)
        for stage, milliseconds in zip(self._stages, times, strict=True):
            stage.observe(milliseconds / 1000)
        self._received.inc(body_bytes(step))
        self._sent.inc(done.data.nbytes)


class _BatchMetrics:
    """What the engine's iterations took up, and for how long."""

    def __init__(self, registry: CollectorRegistry):
        tokens = Counter("swarm_tokens", "Tokens run through the span.", ("kind",), registry=registry)
        self._steps = Histogram(
            "swarm_batch_steps", "Steps that an iteration took up.", buckets=COUNTS, registry=registry
        )
        self._rows = Histogram(
            "swarm_batch_tokens",
            "Tokens, rows of the batch, of an iteration.",
            buckets=COUNTS,
            registry=registry,
        )
        self._seconds = Histogram(
            "swarm_batch_seconds", "Time that an iteration took.", buckets=SECONDS, registry=registry
        )
        self._tokens = {kind: tokens.labels(kind) for kind in KINDS}

    def add(self, report: BatchReport) -> None:
        self._tokens["decode"].inc(report.decode_tokens)
        self._tokens["prefill"].inc(report.prefill_tokens)
        self._steps.observe(report.steps)
        self._rows.observe(report.decode_tokens + report.prefill_tokens)
        self._seconds.observe(report.seconds)


class _CellMetrics(Collector):
    """What the shard cell and its engine are like at the moment of asking; zero while there is no engine."""

    def __init__(self, cell: ShardCell, model: str, peer: str):
        self._cell = cell
        self._labels = {"version": VERSION, "model": model, "peer": peer}

    def collect(self) -> Iterator[Metric]:
        view = self._cell.view()
        yield InfoMetricFamily(
            "swarm_server",
            "What this server is and serves.",
            {**self._labels, "span": str(view.span), "dtype": view.dtype, "quantization": view.quantization},
        )
        state = "asleep" if view.asleep else view.state
        yield _gauges(
            "swarm_server_state",
            "1 for the state that this server is in, asleep if its blocks are let go, 0 for the others.",
            "state",
            {one: float(one == state) for one in STATES},
        )
        yield _gauge("swarm_shard_progress_ratio", "The loaded part of the shard, 0 to 1.", view.progress)
        loaded = view.loaded.size if view.loaded else 0
        yield _gauge("swarm_shard_blocks", "Blocks that are loaded.", loaded)
        yield _gauge("swarm_shard_bytes", "Memory that the loaded weights take.", view.bytes)
        yield from self._engine()

    def _engine(self) -> Iterator[Metric]:
        engine = self._cell.engine
        stats = engine.stats if engine else None
        yield _gauge("swarm_sessions", "Sessions that are open.", stats.sessions if stats else 0)
        yield _gauge("swarm_queue_steps", "Steps that wait or are being run.", engine.queue if engine else 0)
        used, cached = (stats.kv_pages_used, stats.kv_pages_cached) if stats else (0, 0)
        free = stats.kv_pages - used - cached if stats else 0
        yield _gauges(
            "swarm_kv_pages",
            f"Pages of KV memory of {PAGE_TOKENS} tokens: free, used by sessions, or cached for later ones.",
            "state",
            {"free": free, "used": used, "cached": cached},
        )
        yield _gauge(
            "swarm_kv_unpromised_tokens",
            "Tokens of KV memory that no session has been promised.",
            engine.kv_tokens_left if engine else 0,
        )


def _gauge(name: str, documentation: str, value: float) -> Metric:
    return GaugeMetricFamily(name, documentation, value=value)


def _gauges(name: str, documentation: str, label: str, values: dict[str, float]) -> Metric:
    family = GaugeMetricFamily(name, documentation, labels=(label,))
    for name_of_value, value in values.items():
        family.add_metric((name_of_value,), value)
    return family
