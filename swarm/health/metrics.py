"""The state as Prometheus metrics. Knows the state and nothing of HTTP."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from swarm.health.state import SEEN_STATES, ModelView, SwarmState

MODEL = ("model", "model_id")
GAUGES: tuple[tuple[str, str, Callable[[ModelView], float]], ...] = (
    ("blocks", "Blocks that the model has.", lambda model: model.num_blocks),
    (
        "blocks_served",
        "Blocks that at least one peer serves.",
        lambda model: sum(run.end - run.start for run in model.coverage if run.copies),
    ),
    ("block_copies", "Peers that serve the block that the fewest serve.", lambda model: model.copies),
    ("runs", "1 if the model can be run now.", lambda model: model.standing == "runs"),
    ("tokens_per_second", "Tokens a second of all sessions together.", lambda model: model.tokens_per_s),
    (
        "stream_tokens_per_second",
        "Tokens a second of one session alone.",
        lambda model: model.stream_tokens_per_s,
    ),
    ("kv_tokens_left", "Tokens for which every block has room.", lambda model: model.kv_tokens_left),
    (
        "peers_unreachable",
        "Listed peers that could not be reached the last time.",
        lambda model: sum(peer.reachable is False for peer in model.peers),
    ),
    (
        "peers_not_serving",
        "Listed peers that announce blocks and open no session for them.",
        lambda model: sum(peer.serves is False for peer in model.peers),
    ),
)


def registry_of(state: Callable[[], SwarmState]) -> CollectorRegistry:
    """A registry that tells what `state` gives at the time of each collection."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_SwarmCollector(state))
    return registry


class _SwarmCollector(Collector):
    def __init__(self, state: Callable[[], SwarmState]):
        self._state = state

    def collect(self) -> Iterator[Metric]:
        state = self._state()
        yield GaugeMetricFamily("swarm_health_models", "Models that are listed.", len(state.models))
        yield GaugeMetricFamily(
            "swarm_health_read_timestamp_seconds",
            "When the records were last read, in unix seconds.",
            state.read_at,
        )
        refused = CounterMetricFamily(
            "swarm_health_records_refused", "Records that were dropped, by their fault.", labels=("fault",)
        )
        for fault, count in state.dropped.items():
            refused.add_metric((fault,), count)
        yield refused
        for name, text, value in GAUGES:
            gauge = GaugeMetricFamily(f"swarm_health_model_{name}", text, labels=MODEL)
            for model in state.models:
                gauge.add_metric((model.name, model.model_id), float(value(model)))
            yield gauge
        yield _peers(state)


def _peers(state: SwarmState) -> Metric:
    gauge = GaugeMetricFamily(
        "swarm_health_model_peers", "Peers of the model, by state.", labels=(*MODEL, "state")
    )
    for model in state.models:
        for name in SEEN_STATES:
            gauge.add_metric((model.name, model.model_id, name), model.states.get(name, 0))
    return gauge
