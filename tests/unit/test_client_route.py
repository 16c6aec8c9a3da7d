"""The route: against brute force on small graphs, its ties, what it refuses, and its speed."""

import random
import time
from collections.abc import Mapping, Sequence
from itertools import product

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.client.costs import HOP_SECONDS, WAITED, Costs, Demand, Seen
from swarm.client.graph import View
from swarm.client.route import NoRoute, Route, find_route, missing_spans
from swarm.dht.announcement import Announcement, Throughput
from swarm.net.transport import PeerId
from swarm.spans import Span


def server(
    peer: str, start: int, end: int, decode: float = 100.0, queue: int = 0, **more: object
) -> Announcement:
    fields = {"state": "serving", "kv_tokens_left": 1000, "throughput": Throughput(decode=decode), **more}
    return Announcement(peer=peer, model_id="m", start=start, end=end, queue=queue, **fields)  # type: ignore[arg-type]


def costs(rtts: Mapping[str, float], *, pushes: bool = True) -> Costs:
    return Costs(rtt=rtts.get, pushes=pushes)


def shape(route: Route) -> list[tuple[str, int, int]]:
    return [(hop.peer, *hop.span) for hop in route.hops]


def brute_force(servers: Sequence[Announcement], num_blocks: int, costs: Costs) -> float:
    """The least cost over every choice of a server for each block."""
    choices = [[one for one in servers if block in one.span.blocks] for block in range(num_blocks)]
    return min(price(way, costs) for way in product(*choices))


def price(way: Sequence[Announcement], costs: Costs) -> float:
    """Seconds that one token takes, with a server for each block, and that others wait for it."""
    total, before = 0.0, None
    for one in way:
        block = 1 / (one.throughput.decode or 50.0)
        if one is not before:
            total += HOP_SECONDS + change(before, one, costs) + one.queue * one.span.size * block
        total += block * (1 + WAITED * one.queue)
        before = one
    assert before is not None
    return total + one_way(before, costs)


def change(before: Announcement | None, after: Announcement, costs: Costs) -> float:
    if before is None:
        return one_way(after, costs)
    through = one_way(before, costs) + one_way(after, costs)
    return (
        min(through, before.rtts[after.peer] / 2) if costs.pushes and after.peer in before.rtts else through
    )


def one_way(one: Announcement, costs: Costs) -> float:
    rtt = costs.rtt(one.peer_id)
    return (0.1 if rtt is None else rtt) / 2


def test_the_mean_of_a_queue_counts_rather_than_what_is_in_it_now() -> None:
    calm = server("a", 0, 4, queue=2, mean_queue=0.5)
    often_busy = server("b", 0, 4, queue=0, mean_queue=1.5)
    told_nothing_else = server("c", 0, 4, queue=1)
    for best, others in ((calm, [often_busy, told_nothing_else]), (told_nothing_else, [often_busy])):
        assert find_route([best, *others], Span(0, 4), costs=costs({})).hops[0].peer == best.peer


milliseconds = st.integers(1, 300).map(lambda value: value / 1000)


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[Announcement], int, Costs]:
    num_blocks = draw(st.integers(1, 5))
    names = "abcd"[: draw(st.integers(1, 4))]
    neighbours = st.dictionaries(st.sampled_from("abcd"), milliseconds, max_size=3)
    servers = []
    for name in names:
        start = draw(st.integers(0, num_blocks - 1))
        end = draw(st.integers(start + 1, num_blocks))
        rtts = {peer: rtt for peer, rtt in draw(neighbours).items() if peer != name}
        servers.append(
            server(name, start, end, draw(st.integers(0, 200)), draw(st.integers(0, 2)), rtts=rtts)
        )
    servers.append(server("whole", 0, num_blocks, draw(st.integers(1, 200)), rtts=draw(neighbours)))
    rtts = {name: draw(milliseconds) for name in names if draw(st.booleans())}
    return servers, num_blocks, costs(rtts, pushes=draw(st.booleans()))


@given(graphs())
def test_is_the_fastest_of_all(graph: tuple[list[Announcement], int, Costs]) -> None:
    servers, num_blocks, prices = graph
    route = find_route(servers, Span(0, num_blocks), costs=prices)
    assert route.cost == pytest.approx(brute_force(servers, num_blocks, prices))
    blocks = [(hop.announcement, block) for hop in route.hops for block in hop.span.blocks]
    assert [block for _, block in blocks] == list(range(num_blocks))
    assert route.cost == pytest.approx(price([one for one, _ in blocks], prices))
    waited = sum(one.queue / (one.throughput.decode or 50.0) for one, _ in blocks)
    assert route.toll == pytest.approx(WAITED * waited)


@given(graphs(), st.randoms())
def test_order_of_announcements_changes_nothing(
    graph: tuple[list[Announcement], int, Costs], shuffler: random.Random
) -> None:
    servers, num_blocks, prices = graph
    shuffled = list(servers)
    shuffler.shuffle(shuffled)
    assert find_route(shuffled, Span(0, num_blocks), costs=prices) == find_route(
        servers, Span(0, num_blocks), costs=prices
    )


def test_part_of_a_span_is_used_where_that_is_faster() -> None:
    servers = [server("slow", 0, 6, decode=10), server("fast", 3, 6, decode=1000)]
    route = find_route(servers, Span(0, 6), costs=costs({"slow": 0.01, "fast": 0.01}))
    assert shape(route) == [("slow", 0, 3), ("fast", 3, 6)]


def test_far_replica_loses_to_a_near_one() -> None:
    servers = [server("far", 0, 4), server("near", 0, 4, decode=50)]
    assert shape(find_route(servers, Span(0, 4), costs=costs({"far": 0.5, "near": 0.01}))) == [("near", 0, 4)]


def test_queue_counts_in_steps_of_the_whole_span() -> None:
    servers = [server("busy", 0, 4, queue=3), server("idle", 0, 4, decode=30)]
    route = find_route(servers, Span(0, 4), costs=costs({"busy": 0.01, "idle": 0.01}))
    assert shape(route) == [("idle", 0, 4)]
    assert route.seconds == pytest.approx(0.011 + 4 / 30)


def test_who_alone_holds_a_block_is_spared_the_others_once_steps_wait_there() -> None:
    def through(queue: int) -> Route:
        servers = [server("scarce", 0, 4, decode=100, queue=queue), server("spare", 0, 3, decode=100)]
        return find_route(servers, Span(0, 4), costs=costs({"scarce": 0.02, "spare": 0.06}))

    alone, spared = through(0), through(3)
    assert shape(alone) == [("scarce", 0, 4)]
    assert alone.toll == 0
    assert shape(spared) == [("spare", 0, 3), ("scarce", 3, 4)]  # it waits there once in any case
    assert spared.seconds == pytest.approx(0.08 + 2 * HOP_SECONDS + 0.04 + 3 * 0.04)
    assert spared.toll == pytest.approx(WAITED * 3 * 0.01)


def test_what_others_wait_follows_what_was_seen_at_a_server_that_runs_steps_together() -> None:
    servers = [server("many", 0, 4, decode=100, queue=9), server("spare", 0, 3, decode=100)]
    rtts = {"many": 0.02, "spare": 0.06}
    assert shape(find_route(servers, Span(0, 4), costs=costs(rtts)))[0] == ("spare", 0, 3)
    together = Costs(rtt=rtts.get, seen={PeerId("many"): Seen(queue=0.02, pace=1.2, trust=1.0)})
    route = find_route(servers, Span(0, 4), costs=together)
    assert shape(route) == [("many", 0, 4)]
    assert route.toll == pytest.approx(WAITED * 0.02)


@given(graphs())
def test_where_nobody_waits_the_fastest_for_the_session_is_taken(
    graph: tuple[list[Announcement], int, Costs],
) -> None:
    servers, num_blocks, prices = graph
    idle = [msgspec.structs.replace(one, queue=0) for one in servers]
    route = find_route(idle, Span(0, num_blocks), costs=prices)
    assert route.toll == 0
    assert route.seconds == pytest.approx(brute_force(idle, num_blocks, prices))


def test_direct_way_between_servers_is_taken() -> None:
    a, b, c = server("a", 0, 2, rtts={"b": 0.002}), server("b", 2, 4), server("c", 2, 4)
    rtts = {"a": 0.2, "b": 0.2, "c": 0.1}
    assert shape(find_route([a, b, c], Span(0, 4), costs=costs(rtts, pushes=False)))[1][0] == "c"
    route = find_route([a, b, c], Span(0, 4), costs=costs(rtts))
    assert shape(route)[1][0] == "b"
    assert route.seconds == pytest.approx(0.1 + 0.001 + 0.1 + 0.04 + 2 * HOP_SECONDS)


def test_edge_that_could_not_push_leads_through_the_client() -> None:
    a, b, c = server("a", 0, 2, rtts={"b": 0.002}), server("b", 2, 4), server("c", 2, 4)
    known = Costs(rtt={"a": 0.2, "b": 0.2, "c": 0.1}.get, broken={(PeerId("a"), PeerId("b"))})
    assert shape(find_route([a, b, c], Span(0, 4), costs=known))[1][0] == "c"


def test_part_of_the_model_is_routed_over_parts_of_spans() -> None:
    servers = [server("a", 0, 5), server("b", 4, 9), server("slow", 0, 9, decode=1), server("out", 7, 9)]
    route = find_route(servers, Span(3, 7), costs=costs({"a": 0.01, "b": 0.01, "slow": 0.01}))
    assert [hop.span for hop in route.hops] in ([Span(3, 5), Span(5, 7)], [Span(3, 4), Span(4, 7)])
    with pytest.raises(NoRoute) as caught:
        find_route(servers[:1], Span(3, 7), costs=costs({}))
    assert caught.value.missing == (Span(5, 7),)


def test_a_suspect_is_taken_where_there_is_no_other_and_the_least_suspect_of_two() -> None:
    servers = [server("good", 0, 2, decode=1), server("bad", 0, 4), server("worse", 0, 4, decode=500)]
    known = Costs(rtt=lambda peer: 0.01, penalties={PeerId("bad"): 1e5, PeerId("worse"): 2e5})
    assert shape(find_route(servers, Span(0, 4), costs=known)) == [("bad", 0, 4)]
    assert shape(find_route(servers, Span(0, 2), costs=known)) == [("good", 0, 2)]


def test_long_prompts_go_where_prefill_is_fast_and_long_answers_where_steps_are() -> None:
    near = server("near", 0, 4, throughput=Throughput(decode=100, prefill=200, network=1e6))
    strong = server("strong", 0, 4, throughput=Throughput(decode=100, prefill=20_000, network=1e9))
    known = costs({"near": 0.01, "strong": 0.1})

    def chosen(prompt: int, new: int) -> str:
        demand = Demand(prompt, new, token_bytes=4096)
        return find_route([near, strong], Span(0, 4), costs=known, demand=demand).hops[0].peer

    assert chosen(2000, 10) == "strong"
    assert chosen(10, 2000) == "near"


def test_a_view_gives_the_same_as_its_announcements() -> None:
    servers = [server("b", 2, 4, rtts={"a": 0.1}), server("a", 0, 2, rtts={"b": 0.002}), server("a", 4, 6)]
    known = costs({"a": 0.1, "b": 0.1})
    route = find_route(View.of(servers), Span(0, 6), costs=known)
    assert route == find_route(servers, Span(0, 6), costs=known)
    assert route.seconds == pytest.approx(0.151 + 0.06 + 3 * HOP_SECONDS)


def test_ties_go_to_fewer_hops_then_to_the_lower_peer_id() -> None:
    free = Costs(rtt=lambda peer: 0.0)
    servers = [server("b", 0, 4), server("a", 0, 4), server("c", 0, 2), server("d", 2, 4)]
    assert shape(find_route(servers, Span(0, 4), costs=free)) == [("a", 0, 4)]


def test_one_peer_may_hold_two_spans() -> None:
    servers = [server("a", 0, 2), server("b", 2, 4), server("a", 4, 6)]
    assert shape(find_route(servers, Span(0, 6), costs=costs({}))) == [("a", 0, 2), ("b", 2, 4), ("a", 4, 6)]


def test_only_serving_peers_with_room_that_are_not_excluded() -> None:
    servers = [
        server("joining", 0, 2, state="joining"),
        server("draining", 0, 2, state="draining"),
        server("full", 0, 2, kv_tokens_left=9),
        server("bad", 0, 2),
        server("good", 0, 2, decode=1),
    ]
    route = find_route(
        servers, Span(0, 2), costs=costs({}), tokens=10, excluded={PeerId("bad"): "closed the connection"}
    )
    assert shape(route) == [("good", 0, 2)]


def test_no_route_says_which_blocks_and_why() -> None:
    servers = [
        server("p" * 46 + "loader", 10, 20, state="joining", progress=0.456, name="al\x1bice"),
        server("p" * 46 + "fuller", 22, 24, kv_tokens_left=9),
        server("p" * 46 + "failed", 24, 25),
        server("x", 0, 10),
        server("y", 20, 22),
        server("z", 25, 30),
    ]
    excluded = {PeerId("p" * 46 + "failed"): "did not answer in time"}
    with pytest.raises(NoRoute) as caught:
        find_route(servers, Span(0, 30), costs=costs({}), model="smollm2-135m", tokens=10, excluded=excluded)
    error = caught.value
    assert error.message == (
        "No server serves blocks 10 to 19, blocks 22 to 24 of smollm2-135m: alice (…loader) is loading "
        "blocks 10 to 19, 46% done; …fuller has room for 9 tokens where 10 are needed; …failed did not "
        "answer in time."
    )
    assert error.missing == (Span(10, 20), Span(22, 25))
    assert [one.state for one in error.loading] == ["joining"]
    assert error.hint


def test_no_route_through_full_servers_does_not_say_that_there_are_none() -> None:
    with pytest.raises(NoRoute) as caught:
        find_route([server("x", 0, 9, kv_tokens_left=9)], Span(0, 9), costs=costs({}), model="m", tokens=10)
    assert caught.value.message == (
        "No server can take blocks 0 to 8 of m now: …x has room for 9 tokens where 10 are needed."
    )
    assert caught.value.is_full


def test_no_route_without_anybody_says_how_to_start_a_server() -> None:
    with pytest.raises(NoRoute) as caught:
        find_route([server("x", 0, 9)], Span(0, 10), costs=costs({}), model="m")
    assert caught.value.message == "No server serves block 9 of m."
    assert "--model m --blocks 9:10" in caught.value.hint


def test_missing_spans() -> None:
    assert missing_spans([], Span(0, 3)) == [Span(0, 3)]
    assert missing_spans([server("a", 0, 9)], Span(0, 3)) == []
    held = [server("a", 1, 2), server("b", 4, 9)]
    assert missing_spans(held, Span(0, 10)) == [Span(0, 1), Span(2, 4), Span(9, 10)]
    assert missing_spans(held, Span(2, 6)) == [Span(2, 4)]
    assert missing_spans(held, Span(4, 8)) == []
    assert missing_spans([server("a", 5, 9)], Span(0, 3)) == [Span(0, 3)]


def test_two_thousand_servers_take_a_moment() -> None:
    rng = random.Random(1)
    servers = []
    for index in range(2000):
        start = rng.randrange(126)
        end = min(126, start + rng.randint(4, 16))
        near = {f"p{rng.randrange(2000):04}": rng.uniform(0.002, 0.2) for _ in range(16)}
        servers.append(server(f"p{index:04}", start, end, rng.uniform(20, 500), rtts=near))
    servers.append(server("whole", 0, 126, 1.0))
    view, known = View.of(servers), costs({one.peer: rng.uniform(0.005, 0.2) for one in servers})
    taken = []
    for _ in range(5):
        started = time.process_time()
        route = find_route(view, Span(0, 126), costs=known)
        taken.append(time.process_time() - started)
    assert min(taken) < 0.1  # a fifth of it on a quiet machine; benchmarks/routes.py tells
    assert len(route.hops) > 5
