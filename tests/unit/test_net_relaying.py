"""What a peer has to do with relays, and what one says of how much it relays."""

import pytest

from swarm.net.relaying import ENOUGH_BYTES, Relaying, bytes_relayed, is_relayed

OK = b"\x28\x64"
"""Status 100."""


def limited(limit: bytes) -> bytes:
    return b"\x08\x02" + b"\x1a\x03res" + b"\x22" + bytes([len(limit)]) + limit + OK


@pytest.mark.parametrize(
    ("answer", "most"),
    [
        (limited(bytes.fromhex("087810808008")), 128 * 1024),
        (limited(bytes.fromhex("08c0d102108080808010")), 2**32),
        (b"\x08\x02" + OK, 2**62),
        (limited(b"\x08\x78"), 2**62),
        (b"\x08\x02\x28\xc9\x01", 0),
        (b"\x08\x02", 0),
        (b"", 0),
        (b"\xff\xff", 0),
        (OK + b"\x22\x7f\x10", 0),
        (OK + b"\x25\x01\x02\x03\x04", 0),
        (OK + b"\x22\x03\x12\x01\x01", 0),
    ],
)
def test_what_a_relay_answers(answer: bytes, most: int) -> None:
    assert bytes_relayed(answer) == most


def test_a_daemon_that_is_no_relay_on_purpose_is_none() -> None:
    assert 128 * 1024 < ENOUGH_BYTES < 2**32


def options(relaying: Relaying, *, listens: bool = True) -> set[str]:
    return set(relaying.options(listens=listens))


def test_without_relays_all_of_it_is_off() -> None:
    assert options(Relaying()) == {"-relay=0", "-relayService=0", "-autonat=0", "-autoRelay=0"}


def test_who_listens_nowhere_goes_through_relays_alone() -> None:
    assert options(Relaying(uses=True), listens=False) == {
        "-relay=1",
        "-relayService=0",
        "-autonat=0",
        "-autoRelay=0",
    }


@pytest.mark.parametrize(
    ("relaying", "listens", "punches"),
    [
        (Relaying(uses=True), True, True),
        (Relaying(uses=True), False, False),
        (Relaying(through=("/ip4/1.1.1.1/tcp/1/p2p/A",)), True, True),
        (Relaying(), True, False),
    ],
)
def test_who_listens_and_goes_through_relays_tries_for_straight_ways(
    relaying: Relaying, listens: bool, punches: bool
) -> None:
    assert relaying.punches(listens=listens) is punches
    assert f"-autonat={int(punches)}" in options(relaying, listens=listens)


def test_who_relays_says_that_others_reach_it() -> None:
    said = options(Relaying(uses=True, serves=True))
    assert {"-relay=1", "-relayService=1", "-forceReachabilityPublic=1", "-autonat=1"} <= said


def test_who_is_behind_relays_says_that_nobody_reaches_it() -> None:
    said = options(Relaying(through=("/ip4/1.1.1.1/tcp/1/p2p/A", "/ip4/1.1.1.2/tcp/1/p2p/B")))
    assert "-trustedRelays=/ip4/1.1.1.1/tcp/1/p2p/A,/ip4/1.1.1.2/tcp/1/p2p/B" in said
    assert {"-autoRelay=1", "-relayDiscovery=0", "-forceReachabilityPrivate=1", "-relayService=0"} <= said


def test_an_address_tells_that_it_is_relayed() -> None:
    assert is_relayed(["/ip4/10.0.0.1/tcp/1/p2p/B", "/ip4/1.1.1.1/tcp/1/p2p/A/p2p-circuit/p2p/B"])
    assert not is_relayed(["/ip4/10.0.0.1/tcp/1/p2p/B"])
