"""The server's options and what it prints."""

import argparse
import json

import pytest

from swarm import cli
from swarm.dht.announcement import PeerState
from swarm.errors import InputError
from swarm.net.transport import PeerId
from swarm.server.config import ServerConfig, add_options, config_from
from swarm.server.events import JsonEvents, TextEvents, best_address, next_span
from swarm.spans import Span

LOOPBACK, PUBLIC = "/ip4/127.0.0.1/tcp/1/p2p/A", "/ip4/192.0.2.1/tcp/1/p2p/A"


def parsed(*arguments: str) -> argparse.Namespace:
    parser = cli.Parser(prog="server")
    add_options(parser)
    cli.shared_options(parser)
    return parser.parse_args(arguments)


def test_without_options_all_blocks_are_served_on_a_free_port_by_a_new_peer() -> None:
    config = config_from(parsed())
    assert (config.blocks, config.identity, config.initial_peers) == (None, None, ())
    assert config.host_maddrs == ("/ip4/0.0.0.0/tcp/0",)


def test_options_arrive() -> None:
    config = config_from(
        parsed("--blocks", "2:4", "--port", "80", "--kv-tokens", "9", "--threads", "2", "--public-name", "me")
    )
    assert config.blocks == Span(2, 4)
    assert config.host_maddrs == ("/ip4/0.0.0.0/tcp/80",)
    assert (config.kv_tokens, config.threads, config.public_name) == (9, 2, "me")


@pytest.mark.parametrize("port", ["-1", "65536"])
def test_a_port_out_of_range(port: str) -> None:
    with pytest.raises(InputError, match="not possible"):
        config_from(parsed(f"--port={port}"))


def test_a_port_beside_multiaddrs() -> None:
    with pytest.raises(InputError, match="both"):
        config_from(parsed("--port", "0", "--host-maddrs", "/ip4/127.0.0.1/tcp/0"))


@pytest.mark.parametrize("name", ["x" * 101, "two\nlines", "\x1b[31mred"])
def test_a_public_name_that_cannot_be_announced(name: str) -> None:
    with pytest.raises(InputError, match="public name"):
        ServerConfig(model="m", public_name=name)


@pytest.mark.parametrize(
    ("span", "lacking"), [((0, 10), (10, 30)), ((10, 30), (0, 10)), ((5, 10), (10, 30)), ((0, 30), (0, 30))]
)
def test_the_next_server_is_asked_for_what_is_lacking(
    span: tuple[int, int], lacking: tuple[int, int]
) -> None:
    assert next_span(Span(*span), 30) == lacking


def test_others_are_told_an_address_that_works_from_their_machine() -> None:
    assert best_address([LOOPBACK, PUBLIC]) == PUBLIC
    assert best_address([LOOPBACK]) == LOOPBACK


def test_json_events_are_one_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    events = JsonEvents()
    events.listening(PeerId("A"), [LOOPBACK])
    events.phase("joining", 0.4)
    events.phase("serving", 1.0)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        {"event": "listening", "addresses": [LOOPBACK], "peer": "A"},
        {"event": "joining", "progress": 0.4},
        {"event": "serving"},
    ]


@pytest.mark.parametrize("is_first", [True, False])
def test_the_first_server_prints_the_commands_to_join_by(
    capsys: pytest.CaptureFixture[str], is_first: bool
) -> None:
    events = TextEvents("m", Span(0, 2), 6, is_first=is_first)
    events.listening(PeerId("A"), [LOOPBACK, PUBLIC])
    phases: tuple[PeerState, ...] = ("joining", "serving", "draining", "left")
    for phase in phases:
        events.phase(phase, 1.0)
    said = capsys.readouterr().out
    assert LOOPBACK in said
    assert said.rstrip().endswith("Left the swarm.")
    join = f"python -m swarm.server --model m --blocks 2:6 --initial-peers {PUBLIC}"
    talk = f"python -m swarm.client chat --model m --initial-peers {PUBLIC}"
    assert ((join in said), (talk in said)) == (is_first, is_first)
