import pytest

from swarm.errors import InputError
from swarm.net.addresses import MAX_ADDRESSES, parse_address, parse_listen_address, usable_addresses
from swarm.net.identity import Identity

PEER = Identity.from_seed("addresses").peer
RELAY = Identity.from_seed("relay").peer


@pytest.mark.parametrize(
    "path",
    [
        "/ip4/127.0.0.1/tcp/1",
        "/ip6/::1/tcp/65535",
        "/dns4/swarm.example.org/tcp/31337",
        "/dns/localhost/tcp/1/ws",
        "/ip4/1.2.3.4/udp/4001/quic-v1",
        f"/ip4/1.2.3.4/tcp/1/p2p/{RELAY}/p2p-circuit",
    ],
)
def test_addresses_of_peers(path):
    address = parse_address(f"{path}/p2p/{PEER}")
    assert (address.path, address.peer) == (path, PEER)
    assert str(address) == f"{path}/p2p/{PEER}"
    assert usable_addresses(PEER, [str(address)]) == [address]


WRONG_PATHS = [
    "",
    "/",
    "foo",
    "ip4/1.2.3.4/tcp/1",
    "/ip4/1.2.3.4",
    "/ip4/1.2.3/tcp/1",
    "/ip4/999.1.1.1/tcp/1",
    "/ip4/1.2.3.4/tcp/65536",
    "/ip4/1.2.3.4/tcp/-1",
    "/ip4/1.2.3.4/tcp/\u0661",
    "/ip4/1.2.3.4/tcp/",
    "/ip4/1.2.3.4/tcp",
    "/ip4/::1/tcp/1",
    "/ip6/fe80::1%eth0/tcp/1",
    "/tcp/1/ip4/1.2.3.4",
    "/unix/tmp/socket",
    "/ip4/1.2.3.4/tcp/1/nonsense",
    "/dns4/-a/tcp/1",
    "/dns4/a b/tcp/1",
    "/dns4/a\x1b[2J/tcp/1",
    "/dns4/" + "a" * 1000 + "/tcp/1",
]


@pytest.mark.parametrize("path", WRONG_PATHS)
def test_wrong_paths(path):
    with pytest.raises(InputError, match="is not the address of a peer"):
        parse_address(f"{path}/p2p/{PEER}")
    with pytest.raises(InputError, match="is not an address to listen on"):
        parse_listen_address(path)
    assert usable_addresses(PEER, [f"{path}/p2p/{PEER}"]) == []


@pytest.mark.parametrize("end", ["", "/p2p/", "/p2p/x", f"/p2p/{PEER}x", f"/p2p/{PEER}/", f"/ipfs/{PEER}"])
def test_addresses_without_a_peer(end):
    with pytest.raises(InputError):
        parse_address(f"/ip4/1.2.3.4/tcp/1{end}")
    assert usable_addresses(PEER, [f"/ip4/1.2.3.4/tcp/1{end}"]) == []


def test_a_listen_address_names_no_peer():
    assert parse_listen_address("/ip4/0.0.0.0/tcp/0") == "/ip4/0.0.0.0/tcp/0"
    with pytest.raises(InputError):
        parse_listen_address(f"/ip4/0.0.0.0/tcp/0/p2p/{PEER}")


def test_announced_addresses_count_only_for_their_owner_and_up_to_a_limit():
    mine = [f"/ip4/10.0.0.{n}/tcp/1/p2p/{PEER}" for n in range(100)]
    others = [f"/ip4/10.0.0.{n}/tcp/1/p2p/{RELAY}" for n in range(100)]
    assert [str(address) for address in usable_addresses(PEER, others + mine)] == mine[:MAX_ADDRESSES]
    assert usable_addresses(PEER, others) == []
