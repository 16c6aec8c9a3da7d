"""How many sessions a liar lives on among ten honest peers, at some audit rates.

A swarm of the toy model on the in-process network: the real client, servers, audits and routes; the liar is
the last hop of each route until it is left out.
"""

from statistics import mean, median
from typing import Any
from unittest.mock import patch

import numpy as np

from swarm.client.options import SessionOptions
from swarm.dht.announcement import Throughput
from swarm.net.virtual_time import in_virtual_time
from swarm.spans import Span
from tests.toy_swarm import toy_swarm

RATES = {0.03: 10, 0.1: 30, 0.3: 30}
"""Audit rates, and how many lives are followed at each."""

HELD = {"a": Span(0, 2), "b": Span(2, 4), "c": Span(4, 6)}
SPANS = {f"{name}{at}": span for name, span in HELD.items() for at in range(4)} | {"c0": HELD["c"]}
PROMPT = "abcdef"
NEW_TOKENS = 3


def lives() -> dict[str, Any]:
    """For each rate: sessions until the liar is left out, and how many honest peers were."""
    return {str(rate): _lives(rate, count) for rate, count in RATES.items()}


def _lives(rate: float, count: int) -> dict[str, Any]:
    sessions, accused = [], 0
    for _ in range(count):
        lived, wrong = _life(rate)
        sessions.append(lived)
        accused += wrong
    return {
        "lives": count,
        "sessions_median": median(sessions),
        "sessions_mean": round(mean(sessions), 1),
        "sessions_most": max(sessions),
        "honest_peers_accused": accused,
    }


@patch("swarm.client.sensitivity.JITTER", 1e-5)  # what that moves, the toy engines round back
@in_virtual_time
async def _life(rate: float) -> tuple[int, int]:
    def lying(hidden: np.ndarray) -> np.ndarray:
        hidden[:, 2] += 100
        return hidden

    async with toy_swarm(SPANS, sessions=SessionOptions(audit_rate=rate)) as toy:
        liar = toy["c0"]
        liar.spoil = lying
        for name in SPANS:
            await toy.announce(name, throughput=Throughput(decode=1000.0 if name[1] == "0" else 10.0))
        await toy.swarm.directory.refresh()
        sessions = 0
        while liar.peer == toy.swarm.route().hops[-1].peer:
            await toy.swarm.generate(PROMPT, raw=True, max_new_tokens=NEW_TOKENS)
            await toy.swarm.settle_audits()
            sessions += 1
        return sessions, toy.swarm.audits.caught - 1
