"""Routes of one client: detours, suspects and their rests, edges that cannot push, better routes."""

import asyncio
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from swarm.client.faults import HopError, NoCapacity, RemoteFault, RequestRefused, SessionLost
from swarm.client.route import Hop, NoRoute, Route
from swarm.client.routes import RTT_PATIENCE, Routes
from swarm.dht.announcement import Announcement, Throughput
from swarm.net.memory import MemoryNetwork
from swarm.net.transport import PeerId, TransportError
from swarm.net.virtual_time import in_virtual_time
from swarm.spans import Span

MODEL = SimpleNamespace(name="m", model_id="m", num_blocks=6, hidden_size=4, vocab_size=9, config={})


class Board:
    """What is announced and measured, as a test says."""

    def __init__(self, *announcements: Announcement):
        self.announcements = list(announcements)
        self.rtts: dict[str, float | None] = {}
        self.missing: set[str] = set()
        self.hurried = 0
        self._changed = asyncio.Event()

    def rtt(self, peer: PeerId) -> float | None:
        return self.rtts.get(peer, 0.01)

    def is_missing(self, peer: PeerId) -> bool:
        return peer in self.missing

    def announce(self, *announcements: Announcement) -> None:
        self.announcements = [*self.announcements, *announcements]
        self._changed.set()

    def hurry(self) -> None:
        self.hurried += 1

    async def wait_for(self, predicate: Callable[[], bool], timeout: float) -> bool:
        try:
            async with asyncio.timeout(timeout):
                while not predicate():
                    self._changed.clear()
                    await self._changed.wait()
                return True
        except TimeoutError:
            return predicate()


def server(peer: str, start: int, end: int, decode: float = 100.0, **more: Any) -> Announcement:
    fields = {"state": "serving", "kv_tokens_left": 1000, "throughput": Throughput(decode=decode), **more}
    return Announcement(peer=peer, model_id="m", start=start, end=end, **fields)


def routes(board: Board, timeout: float = 60.0, network: MemoryNetwork | None = None) -> Routes:
    transport = (network or MemoryNetwork()).transport("client")
    return Routes(board, transport, MODEL, timeout=timeout)  # type: ignore[arg-type]


def hop(one: Announcement) -> Hop:
    return Hop(one.peer_id, one.span, one)


def peers(hops: Any) -> list[str]:
    return [one.peer for one in hops]


def now() -> float:
    return asyncio.get_running_loop().time()


A, B, C, SPARE = server("a", 0, 2), server("b", 2, 4), server("c", 4, 6), server("spare", 2, 4, decode=50)


@in_virtual_time
async def test_detour_covers_exactly_the_span_with_parts_of_what_is_announced() -> None:
    found = routes(Board(A, server("wide", 1, 6), server("d", 0, 3, decode=1e4), C))
    hops = await found.detour(Span(2, 4), 10, like=B, timeout=1.0)
    assert [one.span for one in hops] == [Span(2, 4)]
    assert peers(hops) == ["wide"]
    assert now() == 0.0


@in_virtual_time
async def test_detour_prefers_the_same_dtype_and_quantization() -> None:
    fast = server("fast", 2, 4, decode=1e4, dtype="bfloat16")
    packed = server("packed", 2, 4, decode=1e4, quantization="int8")
    halves = server("left", 2, 3, decode=1), server("right", 3, 4, decode=1)
    found = routes(Board(fast, packed, *halves))
    assert peers(await found.detour(Span(2, 4), 10, like=B, timeout=1.0)) == ["left", "right"]
    assert peers(await found.detour(Span(2, 4), 10, like=fast, timeout=1.0)) == ["fast"]
    found = routes(Board(fast))
    assert peers(await found.detour(Span(2, 4), 10, like=B, timeout=1.0)) == ["fast"]


@in_virtual_time
async def test_detour_takes_another_form_rather_than_who_failed_but_not_than_who_ended_a_session() -> None:
    found = routes(Board(B, server("other", 2, 4, dtype="bfloat16")))
    found.judge(SessionLost(hop(B), "has ended the session"))
    assert peers(await found.detour(Span(2, 4), 10, like=B, timeout=1.0)) == ["b"]
    found.judge(RemoteFault(hop(B), "cannot be reached"))
    assert peers(await found.detour(Span(2, 4), 10, like=B, timeout=1.0)) == ["other"]


@in_virtual_time
async def test_a_peer_that_could_not_be_reached_is_the_last_to_be_tried() -> None:
    board = Board(A, B, C, SPARE)
    found = routes(board)
    assert peers(await found.detour(Span(2, 4), 10, like=B, timeout=1.0)) == ["b"]
    board.missing.add("b")
    assert peers(await found.detour(Span(2, 4), 10, like=B, timeout=1.0)) == ["spare"]
    board.missing.add("spare")
    assert peers(await found.detour(Span(2, 4), 10, like=B, timeout=1.0)) == ["b"]


@in_virtual_time
async def test_detour_waits_for_a_route_and_says_why_there_is_none() -> None:
    board = Board(A, C, server("full", 2, 4, kv_tokens_left=5))
    found = routes(board)
    with pytest.raises(NoRoute, match="full has room for 5 tokens where 10 are needed"):
        await found.detour(Span(2, 4), 10, like=B, timeout=3.0)
    assert now() == pytest.approx(3.0)

    asking = asyncio.create_task(found.detour(Span(2, 4), 10, like=B, timeout=60.0))
    await asyncio.sleep(7.5)
    assert not asking.done()
    board.announce(B)
    assert peers(await asking) == ["b"]
    assert now() == pytest.approx(10.5)


@in_virtual_time
async def test_only_suspects_are_left_alone_ever_longer_and_then_tried_the_least_suspect_first() -> None:
    found = routes(Board(A, B, C))
    waits = []
    for _ in range(5):
        found.judge(RemoteFault(hop(B), "cannot be reached"))
        begun = now()
        assert peers(await found.detour(Span(2, 4), 10, like=B, timeout=60.0)) == ["b"]
        waits.append(now() - begun)
    assert waits == pytest.approx([1, 2, 4, 8, 15])
    begun = now()
    found.judge(RemoteFault(hop(B), "cannot be reached"))
    assert peers(await found.detour(Span(2, 4), 10, like=B, timeout=2.0)) == ["b"]
    assert now() - begun == pytest.approx(2.0)

    found = routes(Board(A, B, SPARE, C))
    for fault in (hop(B), hop(SPARE), hop(B)):
        found.judge(RemoteFault(fault, "failed"))
        await asyncio.sleep(1.5)
    assert peers(found.find().hops) == ["a", "spare", "c"]


@in_virtual_time
async def test_a_server_that_appears_ends_the_rest_of_a_suspect() -> None:
    board = Board(A, B, C)
    found = routes(board)
    for _ in range(5):
        found.judge(RemoteFault(hop(B), "failed"))
        await asyncio.sleep(1.0)
    begun = now()
    asking = asyncio.create_task(found.detour(Span(2, 4), 10, like=B, timeout=60.0))
    await asyncio.sleep(0.5)
    board.announce(SPARE)
    assert peers(await asking) == ["spare"]
    assert now() - begun == pytest.approx(0.5)


@in_virtual_time
async def test_it_is_told_why_there_is_a_pause_where_all_holders_have_failed() -> None:
    board, told = Board(A, B, SPARE, C), []
    transport = MemoryNetwork().transport("client")
    found = Routes(board, transport, MODEL, timeout=60.0, on_waiting=told.append)  # type: ignore[arg-type]
    found.judge(RemoteFault(hop(B), "cannot be reached"))
    assert peers(await found.detour(Span(2, 4), 10, like=B, timeout=60.0)) == ["spare"]
    assert not told
    found.judge(RemoteFault(hop(SPARE), "cannot be reached"))
    await found.detour(Span(2, 4), 10, like=B, timeout=60.0)
    assert [reason.message for reason in told] == ["All servers of blocks 2 to 3 of m have failed just now."]


@in_virtual_time
async def test_attempts_through_the_only_holder_are_made_in_growing_pauses() -> None:
    found, times = routes(Board(A, B, C), timeout=30.0), []

    async def attempt() -> None:
        times.append(now())
        fault = RemoteFault(hop(B), "cannot be reached")
        found.judge_opening(fault)
        raise fault

    with pytest.raises(RemoteFault, match="cannot be reached"):
        await found.until_routed(attempt, 10)
    assert times == pytest.approx([0, 1, 3, 7, 15, 30])


@in_virtual_time
async def test_a_stream_that_ends_at_each_opening_is_not_asked_in_haste() -> None:
    found, tries = routes(Board(A, B, C), timeout=10.0), []

    async def attempt() -> None:
        tries.append(now())
        fault = SessionLost(hop(B), "closed the connection")
        found.judge_opening(fault)
        raise fault

    with pytest.raises(SessionLost):
        await found.until_routed(attempt, 10)
    assert len(tries) == 5


@in_virtual_time
async def test_the_next_attempt_is_made_at_once_where_there_is_another_holder() -> None:
    found = routes(Board(A, B, SPARE, C))

    async def attempt() -> Route:
        route = found.find(10)
        if route.hops[1].peer == "b":
            fault = RemoteFault(route.hops[1], "did not answer in time")
            found.judge_opening(fault)
            raise fault
        return route

    assert peers((await found.until_routed(attempt, 10)).hops) == ["a", "spare", "c"]
    assert now() == 0.0


@pytest.mark.parametrize(
    ("fault", "chosen"),
    [
        (RemoteFault(hop(B), "failed"), "spare"),
        (SessionLost(hop(B), "has ended the session"), "spare"),
        (NoCapacity(hop(B), "has no room", 5.0), "spare"),
        (RequestRefused(hop(B), "refused the request"), "spare"),
    ],
)
@in_virtual_time
async def test_whatever_a_peer_fails_at_others_are_asked_next(fault: HopError, chosen: str) -> None:
    found = routes(Board(A, B, SPARE, C))
    found.judge(fault)
    assert found.find().hops[1].peer == chosen


@in_virtual_time
async def test_who_takes_the_place_of_a_lost_peer_is_looked_for_at_once() -> None:
    board = Board(A, B, C)
    found = routes(board)
    found.judge(NoCapacity(hop(B), "has no room", 5.0))
    assert board.hurried == 0, "it is still there"
    found.judge(SessionLost(hop(B), "closed the connection"))
    assert board.hurried == 1


@in_virtual_time
async def test_who_has_failed_or_cannot_be_reached_is_nobodys_standby() -> None:
    board = Board(A, B, SPARE, C)
    found = routes(board)

    def standby() -> str | None:
        other = found.standby_for(hop(SPARE), 10, beside=[hop(A), hop(C)], left_out=())
        return other and other.peer

    assert standby() == "b"
    found.judge(SessionLost(hop(B), "closed the connection"))
    assert standby() is None
    await asyncio.sleep(3.0)
    assert standby() == "b"
    board.missing.add("b")
    assert standby() is None


@in_virtual_time
async def test_lack_of_room_is_no_strike_and_over_when_the_peer_said() -> None:
    found = routes(Board(A, B, C))
    found.judge(NoCapacity(hop(B), "has no room for another session", 5.0))
    with pytest.raises(NoRoute, match="has no room for another session"):
        found.find()
    await asyncio.sleep(5.0)
    assert peers(found.find().hops) == ["a", "b", "c"]
    found.judge(RemoteFault(hop(B), "failed"))
    await asyncio.sleep(10.0)
    assert peers(routes(Board(A, B, C)).find().hops) == ["a", "b", "c"]
    assert not found.costs().penalties  # one strike, not two


@in_virtual_time
async def test_faults_of_this_clients_own_network_are_nobodys() -> None:
    found = routes(Board(A, B, SPARE, C))
    found.failure = TransportError("The daemon died.")
    with pytest.raises(TransportError, match="daemon"):
        found.judge(RemoteFault(hop(B), "cannot be reached"))
    assert not found.costs().penalties


@in_virtual_time
async def test_successes_end_a_suspicion_and_teach_the_queue() -> None:
    found = routes(Board(A, B, SPARE, C))
    found.judge(RemoteFault(hop(B), "failed"))
    assert found.find().hops[1].peer == "spare"
    await asyncio.sleep(1.5)
    for _ in range(20):
        found.succeeded(hop(B), 1, queue_ms=0.0, compute_ms=20.0)
    assert found.find().hops[1].peer == "b"
    for _ in range(20):
        found.succeeded(hop(B), 1, queue_ms=300.0, compute_ms=20.0)
    assert found.find().hops[1].peer == "spare"
    await asyncio.sleep(100.0)
    assert found.find().hops[1].peer == "b"


@in_virtual_time
async def test_an_edge_that_cannot_push_rests_longer_each_time() -> None:
    found = routes(Board(A, B, C))
    a, b = PeerId("a"), PeerId("b")
    assert found.may_push(a, b)
    assert not found.may_push(a, a)
    found.push_failed(a, b)
    assert not found.may_push(a, b)
    assert found.may_push(b, a)
    assert (a, b) in found.costs().broken
    await asyncio.sleep(10.0)
    assert found.may_push(a, b)
    assert not found.costs().broken
    for seconds in (20.0, 40.0, 80.0, 160.0, 320.0, 320.0):
        found.push_failed(a, b)
        await asyncio.sleep(seconds - 0.1)
        assert not found.may_push(a, b)
        await asyncio.sleep(0.1)
        assert found.may_push(a, b)
    await asyncio.sleep(320.0)
    assert not found.costs().broken
    found.push_failed(a, b)
    await asyncio.sleep(10.0)
    assert found.may_push(a, b)


NEAR = server("near", 0, 6)


@in_virtual_time
async def test_a_session_moves_to_a_clearly_better_route_if_that_pays() -> None:
    board = Board(NEAR)
    found = routes(board)
    present = found.find()
    assert found.better(present, found.demand(100, 200)) is None
    board.announce(server("new", 0, 6, decode=200.0))
    better = found.better(present, found.demand(100, 200))
    assert better is not None
    assert peers(better.hops) == ["new"]
    assert found.better(better, found.demand(100, 200)) is None
    assert found.better(present, found.demand(900, 5)) is None  # the prefill would cost more
    board.announcements = [NEAR, server("same", 0, 6, decode=120.0)]
    assert found.better(present, found.demand(10, 900)) is None


@in_virtual_time
async def test_moving_needs_a_present_route_that_still_serves() -> None:
    board = Board(NEAR, server("new", 0, 6, decode=1e4))
    found, present = routes(board), Route((hop(NEAR),), 0.1)
    assert found.better(present, found.demand(1, 500)) is not None
    board.announcements = [msgspec.structs.replace(NEAR, state="draining"), *board.announcements[1:]]
    assert found.better(present, found.demand(1, 500)) is None
    board.announcements = board.announcements[1:]
    assert found.better(present, found.demand(1, 500)) is None


@in_virtual_time
async def test_a_session_moves_to_where_fewer_others_wait_for_it() -> None:
    board = Board(NEAR, server("slower", 0, 6, decode=80.0))
    found = routes(board)
    present = found.find()
    assert peers(present.hops) == ["near"]
    board.announcements = [msgspec.structs.replace(NEAR, queue=1), *board.announcements[1:]]
    better = found.better(present, found.demand(10, 900))
    assert better is not None
    assert peers(better.hops) == ["slower"]
    board.announcements = [NEAR, *board.announcements[1:]]
    assert found.better(better, found.demand(10, 900)) is None  # it would gain too little


@in_virtual_time
async def test_noise_of_ten_percent_moves_no_session() -> None:
    spans = [Span(0, 2), Span(2, 4), Span(4, 6)]
    board = Board(
        *(
            server(f"{name}{span.start}", *span, decode=random.Random(name).uniform(95, 105))
            for name in "abcd"
            for span in spans
        )
    )
    found, rng = routes(board), random.Random(7)
    distances = {one.peer: 0.05 for one in board.announcements}
    present, moves = found.find(), 0
    for _ in range(300):
        board.rtts = {peer: rtt * rng.uniform(0.9, 1.1) for peer, rtt in distances.items()}
        if (better := found.better(present, found.demand(10, 900))) is not None:
            present, moves = better, moves + 1
    assert moves == 0
    other = next(name for name in "abcd" if name not in str(present))
    distances |= {peer: 0.01 for peer in distances if peer.startswith(other)}
    for _ in range(300):
        board.rtts = {peer: rtt * rng.uniform(0.9, 1.1) for peer, rtt in distances.items()}
        if (better := found.better(present, found.demand(10, 900))) is not None:
            present, moves = better, moves + 1
    assert moves == 1


@pytest.mark.parametrize(
    ("servers", "pinged", "missing", "waited"),
    [(3, 3, 0, 0.0), (3, 2, 0, RTT_PATIENCE), (3, 2, 1, 0.0), (100, 64, 0, 0.0), (100, 60, 3, RTT_PATIENCE)],
)
@in_virtual_time
async def test_a_first_route_waits_for_as_many_pings_as_there_will_be(
    servers: int, pinged: int, missing: int, waited: float
) -> None:
    names = [f"whole {number:02}" for number in range(servers)]
    board = Board(*(server(name, 0, 6) for name in names))
    board.rtts = dict.fromkeys(names, None) | dict.fromkeys(names[:pinged], 0.02)
    board.missing = set(names[pinged : pinged + missing])
    await routes(board).wait()
    assert now() == waited
