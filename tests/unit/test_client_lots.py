"""The lots that clients draw for servers, and what they do to routes where steps queue."""

from collections import Counter
from functools import partial
from math import log
from statistics import fmean

import pytest

from swarm.client.costs import Costs
from swarm.client.lots import SPREAD, lot
from swarm.client.route import find_route
from swarm.dht.announcement import Announcement, Throughput
from swarm.net.transport import PeerId
from swarm.spans import Span

CLIENTS = [PeerId(f"client {number}") for number in range(200)]
SPAN = Span(0, 4)


def server(name: str, **more: float) -> Announcement:
    speed = Throughput(decode=100.0)
    return Announcement(
        peer=name,
        model_id="m",
        start=0,
        end=4,
        state="serving",
        throughput=speed,
        **more,  # type: ignore[arg-type]
    )


def chosen(*servers: Announcement) -> Counter[str]:
    """How many of `CLIENTS`, all equally far from all, begin at each server."""
    costs = (Costs(rtt=lambda peer: 0.05, lot=partial(lot, client)) for client in CLIENTS)
    return Counter(find_route(servers, SPAN, costs=one).hops[0].peer for one in costs)


def test_lots_differ_by_client_and_by_server_and_stay_the_same() -> None:
    lots = [lot(client, PeerId("server")) for client in CLIENTS]
    assert min(lots) >= 1
    assert fmean(lots) == pytest.approx(1 + SPREAD, rel=0.2)
    assert sum(one < 1 + SPREAD * log(2) for one in lots) == pytest.approx(100, abs=25), "the median"
    assert lots == [lot(client, PeerId("server")) for client in CLIENTS]
    assert lots != [lot(client, PeerId("another")) for client in CLIENTS]


def test_clients_share_themselves_out_over_servers_that_are_about_as_busy() -> None:
    busy = [server(f"server {number}", mean_queue=1 + number / 20) for number in range(4)]
    found = chosen(*busy)
    assert found.keys() == {one.peer for one in busy}
    assert max(found.values()) < 120


def test_all_take_the_best_server_where_nobody_waits() -> None:
    assert chosen(server("a"), server("b"), server("c")) == {"a": len(CLIENTS)}


def test_few_choose_one_that_is_far_busier() -> None:
    found = chosen(server("calm", mean_queue=0.2), server("crowded", mean_queue=20.0))
    assert found["crowded"] < 10
