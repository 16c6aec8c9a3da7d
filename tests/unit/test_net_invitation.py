"""Invitations: the way into a swarm as one word."""

import base58
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import InputError
from swarm.net.identity import Identity
from swarm.net.invitation import MAX_CHARACTERS, MAX_PATHS, MAX_PEERS, Invitation, expand
from swarm.net.swarm_key import SwarmKey
from swarm.option_values import INVITATION_START

A, B = (Identity.from_seed(name).peer for name in "ab")
KEY = SwarmKey(b"k" * 32)
AT_A, ALSO_AT_A, AT_B = (
    f"/ip4/192.0.2.1/tcp/1/p2p/{A}",
    f"/dns/a.example/tcp/2/p2p/{A}",
    f"/ip4/192.0.2.2/tcp/1/p2p/{B}",
)


def word(packed: bytes) -> str:
    return INVITATION_START + base58.b58encode_check(packed).decode()


@pytest.mark.parametrize("key", [KEY, None])
def test_an_invitation_says_all_that_it_takes_to_join(key: SwarmKey | None) -> None:
    text = Invitation((AT_A, AT_B, ALSO_AT_A), key).text()
    assert text.isalnum()
    read = Invitation.parse(text)
    assert read.addresses == (AT_A, ALSO_AT_A, AT_B)
    assert read.key == key


def test_an_invitation_is_short_enough_to_hand_on() -> None:
    assert len(Invitation((AT_A,), KEY).text()) < 200
    peers = [Identity.from_seed(str(number)).peer for number in range(20)]
    many = [
        f"/ip6/2001:db8:1234:5678:9abc:def0:1234:{way}/udp/31337/quic-v1/p2p/{peer}"
        for peer in peers
        for way in range(9)
    ]
    text = Invitation(tuple(many), KEY).text()
    assert len(text) < MAX_CHARACTERS
    read = Invitation.parse(text).addresses
    assert len(read) == MAX_PEERS * MAX_PATHS
    assert read[0] == many[0]


def test_an_invitation_does_not_show_its_key_by_accident() -> None:
    assert "kkkk" not in repr(Invitation((AT_A,), KEY))


@given(st.data())
def test_a_slip_is_noticed(data: st.DataObject) -> None:
    text = Invitation((AT_A,), KEY).text()
    place = data.draw(st.integers(len(INVITATION_START), len(text) - 1))
    other = data.draw(st.sampled_from(sorted(set("abc123XYZ0") - {text[place]})))
    with pytest.raises(InputError, match="damaged"):
        Invitation.parse(text[:place] + other + text[place + 1 :])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "swarm",
        INVITATION_START,
        "swarm2" + Invitation((AT_A,), KEY).text().removeprefix(INVITATION_START),
        Invitation((AT_A,), KEY).text()[:-1],
        INVITATION_START + "1" * MAX_CHARACTERS,
        word(b""),
        word(b"\xc1"),
        word(msgspec.msgpack.encode([b"k" * 31, []])),
        word(msgspec.msgpack.encode([b"k" * 33, []])),
        word(msgspec.msgpack.encode([b"", [], "more"])),
        word(msgspec.msgpack.encode([b"", [[A, ["/ip4/1.2.3.4/tcp/1"]]] * (MAX_PEERS + 1)])),
        word(msgspec.msgpack.encode([b"", [["a peer", ["/ip4/1.2.3.4/tcp/1"]]]])),
        word(msgspec.msgpack.encode([b"", [[A, ["; rm -rf"]]]])),
    ],
)
def test_what_is_no_invitation_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(InputError) as refusal:
        Invitation.parse(text)
    assert len(text) < 8 or text[6:] not in str(refusal.value)


def test_addresses_and_invitations_go_together() -> None:
    invitation = Invitation((AT_A,), KEY).text()
    assert expand([AT_B, invitation], None) == ((AT_B, AT_A), KEY)
    assert expand([invitation], SwarmKey(b"k" * 32)) == ((AT_A,), KEY)
    assert expand([AT_B], KEY) == ((AT_B,), KEY)
    assert expand([], None) == ((), None)


def test_swarms_are_not_mixed() -> None:
    private, other = Invitation((AT_A,), KEY).text(), Invitation((AT_B,), SwarmKey(b"o" * 32)).text()
    public = Invitation((AT_B,)).text()
    for given_, key in (([private, other], None), ([private, public], None), ([public], KEY), ([other], KEY)):
        with pytest.raises(InputError, match="different swarms"):
            expand(given_, key)
