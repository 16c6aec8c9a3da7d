"""Routes that peers learn less from: trusted ends, and shares that nobody exceeds, against brute force."""

import time
from collections import Counter
from dataclasses import replace
from itertools import product
from math import inf
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.routes import SHAPES, town
from swarm.client.__main__ import parser
from swarm.client.costs import Costs, Demand
from swarm.client.explain import explain
from swarm.client.graph import View
from swarm.client.options import SessionOptions
from swarm.client.peer_ids import given_peers
from swarm.client.privacy import Limits, Privacy
from swarm.client.route import NoRoute, Route, find_route
from swarm.client.search import Graph, Visit, cheapest
from swarm.client.shares import Quota, cheapest_within, unplaced
from swarm.dht.announcement import Announcement, Throughput
from swarm.errors import InputError
from swarm.net.transport import PeerId
from swarm.net.virtual_time import in_virtual_time
from swarm.spans import Span
from tests.toy_swarm import Toy, identity_of, toy_swarm
from tests.unit.test_client_route import costs, graphs, price, server, shape
from tests.unit.test_client_search import price as price_of_visits
from tests.unit.test_client_search import random_graph

PEERS = st.frozensets(st.sampled_from(["a", "b", "c", "d", "whole"]), min_size=1).map(
    lambda names: frozenset(map(PeerId, names))
)


@st.composite
def wishes(draw: st.DrawFn) -> Privacy:
    trusted = draw(st.none() | PEERS)
    return Privacy(trusted, draw(st.integers(1, 3)), draw(st.sampled_from([0.2, 0.34, 0.5, 0.75, 1.0])))


def is_allowed(way: list[Announcement], privacy: Privacy) -> bool:
    """By the words of the options: who runs the ends, and how many blocks each peer runs."""
    count = len(way)
    ends = {*range(min(privacy.depth, count)), *range(max(0, count - privacy.depth), count)}
    if privacy.trusted is not None and any(way[block].peer_id not in privacy.trusted for block in ends):
        return False
    return max(Counter(one.peer for one in way).values()) <= privacy.max_share * count + 1e-9


def best(servers: list[Announcement], num_blocks: int, known: Costs, privacy: Privacy) -> float:
    choices = [[one for one in servers if block in one.span.blocks] for block in range(num_blocks)]
    allowed = (way for way in product(*choices) if is_allowed(list(way), privacy))
    return min((price(way, known) for way in allowed), default=inf)


def run_by(route: Route) -> list[Announcement]:
    return [hop.announcement for hop in route.hops for _ in hop.span.blocks]


@given(graphs(), wishes())
def test_a_route_keeps_to_the_limits_and_is_found_wherever_there_is_one(
    graph: tuple[list[Announcement], int, Costs], privacy: Privacy
) -> None:
    servers, num_blocks, known = graph
    least = best(servers, num_blocks, known, privacy)
    try:
        route = find_route(servers, Span(0, num_blocks), costs=known, limits=privacy.limits(num_blocks))
    except (NoRoute, InputError):
        assert least == inf
        return
    way = run_by(route)
    assert is_allowed(way, privacy)
    assert [block for hop in route.hops for block in hop.span.blocks] == list(range(num_blocks))
    assert all(hop.announcement.span.covers(hop.span) for hop in route.hops)
    assert least <= price(way, known) * (1 + 1e-9)
    if privacy.max_share == 1.0:
        assert price(way, known) == pytest.approx(least)


@given(graphs())
def test_limits_that_the_fastest_route_keeps_to_change_nothing(
    graph: tuple[list[Announcement], int, Costs],
) -> None:
    servers, num_blocks, known = graph
    span = Span(0, num_blocks)
    fastest = find_route(servers, span, costs=known)
    held = Counter(one.peer for one in run_by(fastest))
    trusted = frozenset((fastest.hops[0].peer, fastest.hops[-1].peer))
    limits = replace(Privacy(trusted).limits(num_blocks), most=max(held.values()))
    assert find_route(servers, span, costs=known, limits=limits) == fastest


def quota(graph: Graph, most: int, owners: int) -> Quota:
    count = len(graph.start)
    return Quota(owner=np.arange(count) % owners, most=np.full(count, most))


def blocks_of(visits: list[Visit], owners: Quota) -> Counter[int]:
    return Counter(int(owners.owner[visit.server]) for visit in visits for _ in range(*visit[1:]))


@pytest.mark.parametrize("coarse", [False, True])
def test_no_owner_exceeds_its_quota_on_hundreds_of_random_graphs(coarse: bool) -> None:
    found = 0
    for seed in range(300):
        graph = random_graph(seed, coarse=coarse)
        rng = np.random.default_rng(seed)
        owners = quota(graph, int(rng.integers(1, graph.num_blocks + 1)), int(rng.integers(1, 9)))
        visits = cheapest_within(graph, owners)
        left = unplaced(graph, owners)
        assert (visits is None) == bool(left), f"seed {seed}"
        if visits is None:
            continue
        found += 1
        assert [block for _, start, end in visits for block in range(start, end)] == list(
            range(graph.num_blocks)
        )
        assert all(graph.start[one] <= start < end <= graph.end[one] for one, start, end in visits)
        assert max(blocks_of(visits, owners).values()) <= owners.most[0], f"seed {seed}"
        assert price_of_visits(graph, visits) >= price_of_visits(graph, cheapest(graph)) - 1e-9
    assert found > 100


def test_two_who_hold_everything_share_it() -> None:
    servers = [server("a", 0, 6, decode=200), server("b", 0, 6)]
    known = costs({"a": 0.01, "b": 0.01})
    found = find_route(servers, Span(0, 6), costs=known, limits=Privacy(max_share=0.5).limits(6))
    assert shape(found) in ([("a", 0, 3), ("b", 3, 6)], [("b", 0, 3), ("a", 3, 6)])
    with pytest.raises(NoRoute) as caught:
        find_route(servers, Span(0, 6), costs=known, limits=Privacy(max_share=0.34).limits(6), model="m")
    assert "since no peer may run so large a share of it" in caught.value.message
    assert sum(span.size for span in caught.value.missing) == 2
    assert "Allow a larger share" in caught.value.hint


def test_a_peer_with_two_spans_is_one_peer() -> None:
    servers = [server("a", 0, 2, decode=900), server("a", 4, 6, decode=900), server("b", 0, 6)]
    limits = Privacy(max_share=0.5).limits(6)
    route = find_route(servers, Span(0, 6), costs=costs({"a": 0.01, "b": 0.01}), limits=limits)
    assert Counter(one.peer for one in run_by(route)) == {"a": 3, "b": 3}


def test_only_trusted_peers_run_the_ends() -> None:
    fast = server("fast", 0, 6, decode=1e4)
    servers = [fast, server("a", 0, 3, decode=10), server("b", 3, 6, decode=10)]
    known = costs({"fast": 0.01, "a": 0.01, "b": 0.01})

    def limits(*trusted: str, depth: int = 1) -> Limits:
        return Privacy(frozenset(map(PeerId, trusted)), depth).limits(6)

    route = find_route(servers, Span(0, 6), costs=known, limits=limits("a", "b"))
    assert shape(route) == [("a", 0, 1), ("fast", 1, 5), ("b", 5, 6)]
    route = find_route(servers, Span(0, 6), costs=known, limits=limits("a", "b", depth=3))
    assert shape(route) == [("a", 0, 3), ("b", 3, 6)]
    assert shape(find_route(servers, Span(3, 6), costs=known, limits=limits("a", "b"))) == [
        ("fast", 3, 5),
        ("b", 5, 6),
    ]
    with pytest.raises(NoRoute) as caught:
        find_route(servers, Span(0, 6), costs=known, limits=limits("a"), model="m")
    assert caught.value.message == "No trusted server serves block 5 of m, which others may not run."
    assert caught.value.missing == (Span(5, 6),)
    assert "Trust more peers" in caught.value.hint
    loading = server("b", 3, 6, state="joining", progress=0.5, name="bob")
    with pytest.raises(NoRoute, match=r"which others may not run: bob .* is loading blocks 3 to 5, 50% done"):
        find_route([fast, servers[1], loading], Span(0, 6), costs=known, limits=limits("a", "b"))


def test_who_sleeps_is_woken_only_for_what_they_may_run() -> None:
    asleep = server("asleep", 0, 6, state="joining", asleep=True)
    for trusted, woken in (("asleep", ["asleep"]), ("other", [])):
        limits = Privacy(frozenset((PeerId(trusted),))).limits(6)
        with pytest.raises(NoRoute) as caught:
            find_route([asleep], Span(0, 6), costs=costs({}), limits=limits)
        assert [one.peer for one in caught.value.to_wake] == woken


def test_what_a_session_has_at_a_peer_counts() -> None:
    servers = [server("a", 0, 6, decode=900), server("b", 0, 6)]
    limits = Privacy(max_share=0.5).limits(6)
    beside = limits.beside([(PeerId("a"), Span(0, 2))])
    route = find_route(servers, Span(2, 6), costs=costs({"a": 0.01, "b": 0.01}), limits=beside)
    assert Counter(one.peer for one in run_by(route)) == {"a": 1, "b": 3}


def test_wishes_that_make_no_sense_are_refused() -> None:
    with pytest.raises(InputError, match=r"max_share is 0\.1, which is less than one of 6 blocks"):
        Privacy(max_share=0.1).limits(6)
    assert Privacy(max_share=0.1).limits(30).most == 3
    assert Privacy().limits(30) == Limits(inner=Span(0, 30))
    for wrong in ({"max_share": 0.0}, {"max_share": 1.5}, {"trust_depth": 0}, {"trust_first_last": []}):
        with pytest.raises(InputError):
            SessionOptions(**wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="'somebody' is not the id of a peer"):
        SessionOptions(trust_first_last=["somebody"])


def test_the_explanation_tells_what_privacy_costs() -> None:
    servers = [server("fast", 0, 6, decode=1e4), server("a", 0, 6, decode=10)]
    known = costs({"fast": 0.01, "a": 0.01})
    found = explain(servers, 6, known, Demand(10, 10), limits=Privacy(max_share=0.5).limits(6))
    said = found.as_json()["privacy"]
    assert said["max_blocks"] == 3
    assert said["token_ms_without"] < found.as_json()["token_ms"]
    assert explain(servers, 6, known, Demand(10, 10)).as_json()["privacy"] is None


def test_two_thousand_servers_take_a_moment_with_limits_too() -> None:
    built = town(SHAPES[1], 2000, 126, seed=1)
    view = View.of(built.announcements)
    most = max(Counter(one.peer for one in run_by(built.route(view))).values())
    limits = Limits(most=most - 3)
    taken = []
    for _ in range(3):
        started = time.process_time()
        route = find_route(view, built.span, costs=built.costs, limits=limits)
        taken.append(time.process_time() - started)
    assert max(Counter(one.peer for one in run_by(route)).values()) <= most - 3
    assert min(taken) < 1.0  # a tenth of it on a quiet machine; benchmarks/routes.py tells


@in_virtual_time
async def test_what_takes_a_lost_hops_place_keeps_to_the_limits_too() -> None:
    """Of those that could take over, `a` has its share already, and nobody trusts `other` with the end."""
    spans = {
        "a": Span(0, 6),
        "b": Span(3, 6),
        "inner": Span(3, 5),
        "other": Span(3, 6),
        "trusted": Span(5, 6),
    }
    trusted = [identity_of(name).peer for name in ("a", "b", "trusted")]
    wishes = SessionOptions(trust_first_last=trusted, max_share=0.5)
    async with toy_swarm(spans, sessions=wishes) as toy:
        for name in ("inner", "trusted"):
            await toy.announce(name, throughput=Throughput(decode=20.0))
        await toy.announce("other", throughput=Throughput(decode=21.0))
        await toy.swarm.directory.refresh()

        async def die(steps: int) -> None:
            if steps == 4:
                toy["b"].kill()

        toy["b"].before_step = die
        answer = await toy.swarm.generate("hello", raw=True, max_new_tokens=12, speculate=False)
        assert list(answer.token_ids) == toy.ends.expected(list(b"hello"), 12)
        assert answer.recoveries == 1
        hops = [(toy_name(toy, one.peer), tuple(one.blocks)) for one in answer.route]
    assert hops in (
        [("a", (0, 3)), ("other", (3, 5)), ("trusted", (5, 6))],
        [("a", (0, 3)), ("inner", (3, 5)), ("trusted", (5, 6))],
    )


def toy_name(toy: Toy, peer: str) -> str:
    return next(name for name, server in toy.servers.items() if server.peer == peer)


def test_peers_are_read_from_a_line_or_a_file(tmp_path: Path) -> None:
    one, two = (str(identity_of(name).peer) for name in ("one", "two"))
    assert given_peers(f"{one}, {two}") == (one, two)
    file = tmp_path / "peers"
    file.write_text(f"# mine\n{one}  # at home\n\n{two}\n")
    assert given_peers(str(file)) == (one, two)
    file.write_text("# nobody yet\n")
    for wrong in ("nobody", f"{one},nobody", "", str(file), str(tmp_path)):
        with pytest.raises(InputError):
            given_peers(wrong)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--trust-first-last", "nobody"], "'nobody' is not the id of a peer"),
        (["--max-share", "0"], "a share of 0 lets no peer run anything"),
        (["--trust-depth", "0"], "'0' is not a whole number of at least 1"),
    ],
)
def test_mistakes_on_the_command_line_are_told(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(["route", *arguments])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
