"""When a straight connection is tried for in place of a relayed one."""

from swarm.net.identity import Identity
from swarm.net.punching import NOTICE_TIME, TRY_PERIOD, Punching, is_straight

PEER, OTHER = Identity.from_seed("peer").peer, Identity.from_seed("other").peer
RELAYED = f"/ip4/1.1.1.1/tcp/1/p2p/{OTHER}/p2p-circuit"
STRAIGHT = "/ip4/1.1.1.2/tcp/1"


def seen_at(now: float) -> Punching:
    punching = Punching()
    punching.on_seen(now)
    return punching


def test_a_connection_is_straight_if_one_way_is() -> None:
    assert not is_straight([])
    assert not is_straight([RELAYED, "nonsense", ""])
    assert is_straight([RELAYED, STRAIGHT])


def test_nobody_is_tried_before_the_daemon_has_noticed_where_it_is_seen() -> None:
    assert not Punching().is_due(PEER, [RELAYED], 1e9)
    punching = seen_at(10.0)
    assert not punching.is_due(PEER, [RELAYED], 10 + NOTICE_TIME - 0.1)
    punching.on_seen(10 + NOTICE_TIME - 0.1)  # told again, which it need not notice anew
    assert punching.is_due(PEER, [RELAYED], 10 + NOTICE_TIME)


def test_who_is_connected_with_straight_is_let_be() -> None:
    punching = seen_at(0.0)
    assert not punching.is_due(PEER, [RELAYED, STRAIGHT], 100.0)
    assert punching.is_due(PEER, [], 100.0), "the first connection may become straight as well"


def test_each_peer_is_tried_now_and_again() -> None:
    punching = seen_at(0.0)
    assert [punching.is_due(PEER, [RELAYED], 100.0) for _ in range(3)] == [True, False, False]
    assert punching.is_due(OTHER, [RELAYED], 100.0)
    assert not punching.is_due(PEER, [RELAYED], 100 + 0.9 * TRY_PERIOD)
    assert punching.is_due(PEER, [RELAYED], 100 + 1.1 * TRY_PERIOD)
