"""Servers dial what strangers name only where the internet leads, unless they are private themselves."""

import pytest

from swarm.net.addresses import Address
from swarm.net.identity import Identity
from swarm.net.wary import is_public, resolved, worth_dialling

PEER = Identity.from_seed("stranger").peer
PUBLIC = ("/ip4/127.0.0.1/tcp/1/p2p/x", "/ip4/8.8.4.4/tcp/1")
PRIVATE = ("/ip4/127.0.0.1/tcp/1", "/ip4/192.168.1.7/tcp/1")


def dialled(path: str, own: tuple[str, ...]) -> bool:
    return worth_dialling([Address(path, PEER)], own) == [Address(path, PEER)]


@pytest.mark.parametrize("own", [PUBLIC, PRIVATE, ()])
@pytest.mark.parametrize(
    "path",
    ["/ip4/1.1.1.1/tcp/9", "/ip6/2606:4700::1/udp/9/quic-v1", f"/ip4/1.1.1.1/tcp/9/p2p/{PEER}/p2p-circuit"],
)
def test_the_internet_is_dialled_by_everybody(path: str, own: tuple[str, ...]) -> None:
    assert dialled(path, own)


@pytest.mark.parametrize(
    "path",
    [
        "/ip4/127.0.0.1/tcp/22",
        "/ip4/10.0.0.1/tcp/22",
        "/ip4/192.168.1.1/tcp/80",
        "/ip4/172.16.0.1/tcp/80",
        "/ip4/100.64.0.1/tcp/80",
        "/ip6/::1/tcp/22",
        "/ip6/fd00::1/tcp/22",
        "/ip4/10.0.0.1/tcp/22/p2p/12D3KooWK99VoVxNE7XzyBwXEzW7xhK7Gpv85r9F3V3fyKSUKPH5/p2p-circuit",
    ],
)
def test_a_private_address_is_dialled_by_private_servers_alone(path: str) -> None:
    assert not dialled(path, PUBLIC)
    assert dialled(path, PRIVATE)
    assert dialled(path, ())


@pytest.mark.parametrize("own", [PUBLIC, PRIVATE, ()])
@pytest.mark.parametrize(
    "path",
    [
        "/ip4/169.254.169.254/tcp/80",
        "/ip6/fe80::1/tcp/80",
        "/ip4/224.0.0.1/udp/9",
        "/ip4/0.0.0.0/tcp/22",
        "/ip6/::/tcp/22",
        "/ip4/255.255.255.255/tcp/9",
        "/ip6/::ffff:169.254.169.254/tcp/80",
        "/dns4/localhost/tcp/22",
    ],
)
def test_what_leads_to_no_peer_is_dialled_by_nobody(path: str, own: tuple[str, ...]) -> None:
    assert not dialled(path, own)


def test_an_address_in_disguise_is_seen() -> None:
    assert not dialled("/ip6/::ffff:10.0.0.1/tcp/22", PUBLIC)


def test_who_is_public() -> None:
    assert is_public(PUBLIC)
    assert not is_public(PRIVATE)
    assert not is_public(["/dns4/example.org/tcp/1"])


def test_a_name_is_what_it_leads_to() -> None:
    named = Address("/dns4/peer.example/tcp/7/ws", PEER)
    assert [one.path for one in resolved(named, ["10.0.0.1", "fd00::1"])] == [
        "/ip4/10.0.0.1/tcp/7/ws",
        "/ip6/fd00::1/tcp/7/ws",
    ]
    assert worth_dialling(resolved(named, ["10.0.0.1", "1.1.1.1"]), PUBLIC) == [
        Address("/ip4/1.1.1.1/tcp/7/ws", PEER)
    ]
