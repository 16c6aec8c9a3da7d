"""What a server makes of the directory before it decides where to be."""

from typing import Any

import pytest

from swarm.dht.announcement import Announcement, Throughput
from swarm.net.transport import PeerId
from swarm.server.placement import Holder, turn
from swarm.server.standing import mobility, standing, strength
from swarm.server.watching import THIN, Loading, loading, missing, on_thin_blocks
from swarm.spans import Span

ME = PeerId("me")
EARLIER = next(f"peer {n}" for n in range(100) if turn(f"peer {n}") < turn(ME))
LATER = next(f"peer {n}" for n in range(100) if turn(f"peer {n}") > turn(ME))
FORM = ("float32", "none")


def said(peer: str, start: int = 0, end: int = 3, **changes: Any) -> Announcement:
    fields: dict[str, Any] = {"state": "serving", "throughput": Throughput(decode=9.0)} | changes
    return Announcement(peer=peer, model_id="m", start=start, end=end, **fields)


def holder(peer: str, start: int = 0, end: int = 3, **changes: Any) -> Holder:
    return Holder(peer, Span(start, end), **{"strength": 9.0, **changes})


@pytest.mark.parametrize(
    ("announced", "counted"),
    [
        (said("a"), holder("a")),
        (said("a", mobility="settled"), holder("a", may_fill=True)),
        (said("a", mobility="free"), holder("a", may_fill=True, may_improve=True)),
        (said("a", serves_on=True), holder("a", serves_on=True)),
        (said("a", state="joining"), holder("a", serves=False)),
        (said("a", state="joining", asleep=True), holder("a", serves=False)),
        (said("a", goes_to=(3, 6), mobility="free"), holder("a", 3, 6, serves=False)),
        (said("a", state="draining", goes_to=(3, 6)), holder("a", 3, 6, serves=False)),
        (said(EARLIER, goes_to=(3, 6), undecided=True), holder(EARLIER, 3, 6, serves=False)),
        (said(LATER, goes_to=(3, 6), undecided=True, mobility="free"), holder(LATER)),
        (said("a", state="draining"), None),
        (said(ME), None),
        (said("gone", mobility="free"), None),
        (said("unwilling", mobility="free"), holder("unwilling")),
    ],
)
def test_each_server_counts_where_it_is_or_will_be(announced: Announcement, counted: Holder | None) -> None:
    found = standing([announced], ME, 4, gone={PeerId("gone")}, unwilling={PeerId("unwilling")})
    assert found.holders == (() if counted is None else (counted,))
    assert found.undecided == ()


def test_who_joins_and_has_not_decided_is_kept_apart() -> None:
    found = standing([said("a", state="joining", undecided=True)], ME, 4)
    assert (found.holders, found.undecided) == ((), (holder("a", serves=False),))


def test_a_slow_network_limits_what_a_server_is_worth() -> None:
    span = Span(0, 5)
    assert strength(Throughput(decode=100.0), span, 10) == 100.0
    assert strength(Throughput(decode=100.0, network=1e6), span, 10) == 100.0
    assert strength(Throughput(decode=100.0, network=40.0), span, 10) == 20.0


@pytest.mark.parametrize(
    ("demands", "others", "can_hand_over", "expected"),
    [
        ([], [], False, "free"),
        ([(Span(0, 3), 50)], [], True, "fixed"),
        ([(Span(0, 3), 50)], [said("a", kv_tokens_left=50)], True, "free"),
        ([(Span(0, 3), 50)], [said("a", kv_tokens_left=50)], False, "settled"),
        ([(Span(0, 3), 50)], [said("a", kv_tokens_left=50, dtype="float16")], True, "settled"),
        ([(Span(0, 3), 50)], [said("a", kv_tokens_left=49)], True, "fixed"),
        ([(Span(0, 3), 25), (Span(1, 2), 25)], [said("a", kv_tokens_left=49)], True, "fixed"),
        ([(Span(0, 3), 25), (Span(1, 2), 25)], [said("a", kv_tokens_left=50)], True, "free"),
        ([(Span(0, 3), 9)], [said("a", 0, 2, kv_tokens_left=9)], True, "fixed"),
        (
            [(Span(0, 3), 9)],
            [said("a", 0, 2, kv_tokens_left=9), said("b", 1, 3, kv_tokens_left=9)],
            True,
            "free",
        ),
        ([(Span(0, 3), 9)], [said("a", kv_tokens_left=9, goes_to=(3, 6))], True, "fixed"),
        ([(Span(0, 3), 9)], [said("a", kv_tokens_left=9, state="draining")], True, "fixed"),
    ],
)
def test_what_a_server_may_move_for_follows_from_where_its_sessions_could_go(
    demands: list[tuple[Span, int]], others: list[Announcement], can_hand_over: bool, expected: str
) -> None:
    assert mobility(demands, others, FORM, can_hand_over=can_hand_over) == expected


def test_only_servers_of_thin_blocks_are_watched() -> None:
    thick = [said(f"thick {number}", 0, 2) for number in range(THIN + 1)]
    thin = said("thin", 1, 3)
    loads = said("loads", 2, 3, state="joining")
    mine = said(ME, 2, 3)
    assert on_thin_blocks([*thick, thin, loads, mine], 4, ME) == [thin]


def test_who_does_not_answer_any_more_is_missing_unless_nobody_does() -> None:
    a, b = PeerId("a"), PeerId("b")
    assert missing({a, b}, {a: 2, b: 0}) == {a}
    assert missing({a, b}, {a: 1, b: 0}) == set()
    assert missing({b}, {a: 9, b: 0}) == set(), "who has never answered may be out of this peer's reach alone"
    assert missing({a, b}, {a: 2, b: 5}) == set()


def test_loading_without_progress_is_noticed() -> None:
    slow = said("a", state="joining", progress=0.1)
    found = loading({}, [slow, said("b"), said("c", state="joining", asleep=True)], 1.0)
    assert found == {"a": Loading(Span(0, 3), 0.1, 1.0)}
    assert loading(found, [slow], 50.0) == found
    further = said("a", state="joining", progress=0.2)
    assert loading(found, [further], 50.0) == {"a": Loading(Span(0, 3), 0.2, 50.0)}
    assert loading(found, [], 50.0) == {}
