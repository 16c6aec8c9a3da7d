"""The shape in which a stream tells the route of its answers, to those who ask for that. Pure."""

from collections.abc import Mapping
from typing import Any

from swarm.client.changes import Change
from swarm.client.http.choices import Routed
from swarm.client.progress import HopReport
from swarm.client.route import Hop
from swarm.client.text import printable

MOST_CHANGES = 32
"""Changes told at most: the newest."""


def route_chunk(event: Routed, named: Mapping[str, Any]) -> dict[str, Any]:
    """A chunk of the stream that `named` says, without choices, that tells the route of one."""
    now = event.progress
    route = {
        "index": event.index,
        "hops": [_hop(hop) for hop in now.route],
        "changes": [_change(change) for change in now.changes[-MOST_CHANGES:]],
        "prompt_tokens": now.prompt_tokens,
        "cached_tokens": now.cached_tokens,
        "completion_tokens": now.new_tokens,
        "ttft_ms": round(now.ttft_ms, 2),
        "tokens_per_s": round(now.tokens_per_s, 2),
        "recoveries": now.recoveries,
        "replayed_tokens": now.replayed_tokens,
        "speculation": now.speculation.as_json(),
    }
    return {**named, "choices": [], "route": route}


def _hop(hop: HopReport) -> dict[str, Any]:
    return {
        "peer": hop.peer,
        "name": printable(hop.name),
        "blocks": list(hop.blocks),
        "steps": hop.steps,
        "rtt_ms": round(hop.rtt_ms, 3),
        "queue_ms": round(hop.queue_ms, 3),
        "compute_ms": round(hop.compute_ms, 3),
    }


def _change(change: Change) -> dict[str, Any]:
    return {
        "blocks": list(change.span),
        "reason": change.reason,
        "from": [_place(hop) for hop in change.gone],
        "to": [_place(hop) for hop in change.taken_by],
    }


def _place(hop: Hop) -> dict[str, Any]:
    return {"peer": hop.peer, "name": printable(hop.announcement.name), "blocks": list(hop.span)}
