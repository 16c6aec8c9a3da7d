"""The server's options and what it prints."""

import argparse
import json
from pathlib import Path

import pytest

from swarm import cli
from swarm.dht.announcement import PeerState
from swarm.errors import InputError
from swarm.net.identity import Identity
from swarm.net.invitation import Invitation
from swarm.net.swarm_key import SwarmKey
from swarm.net.transport import PeerId
from swarm.server.config import ServerConfig, add_options, config_from
from swarm.server.events import (
    BootstrapEvents,
    JsonEvents,
    LastingEvents,
    TextEvents,
    best_address,
    next_span,
)
from swarm.server.invite import Invite
from swarm.spans import Span

LOOPBACK, PUBLIC = "/ip4/127.0.0.1/tcp/1/p2p/A", "/ip4/192.0.2.1/tcp/1/p2p/A"


def parsed(*arguments: str) -> argparse.Namespace:
    parser = cli.Parser(prog="server")
    add_options(parser)
    cli.shared_options(parser, may_choose_model=True)
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


def test_what_a_server_may_take_is_bounded_only_where_asked() -> None:
    config = config_from(parsed())
    assert (config.memory_limit, config.max_vram, config.kv_tokens, config.threads) == (None,) * 4
    assert (config.quantize, config.kv_overcommit, config.prefix_cache) == ("none", 1.0, True)
    assert (config.evict_after, config.metrics_port) == (None, None)


def test_bounds_arrive_in_bytes_and_seconds() -> None:
    bounds = ("--memory-limit", "4GiB", "--max-vram-mb", "900", "--kv-overcommit", "1.5")
    config = config_from(
        parsed(
            *bounds, "--evict-after", "10m", "--metrics-port", "0", "--no-prefix-cache", "--quantize", "nf4"
        )
    )
    assert (config.memory_limit, config.max_vram) == (4 * 2**30, 900 * 2**20)
    assert (config.kv_overcommit, config.evict_after, config.metrics_port) == (1.5, 600.0, 0)
    assert (config.prefix_cache, config.quantize) == (False, "nf4")


def test_blocks_may_be_left_to_the_server() -> None:
    assert config_from(parsed("--blocks", "auto")).blocks is None
    config = config_from(parsed("--num-blocks", "3"))
    assert (config.blocks, config.num_blocks) == (None, 3)


def test_blocks_are_chosen_or_counted_but_not_both() -> None:
    with pytest.raises(InputError, match="--blocks and --num-blocks"):
        config_from(parsed("--blocks", "2:4", "--num-blocks", "2"))


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--memory-limit", "much", "'much' is not a size"),
        ("--memory-limit", "0", "not a size"),
        ("--max-vram-mb", "4GiB", "not a whole number"),
        ("--max-vram-mb", "0", "at least 1"),
        ("--kv-overcommit", "lots", "'lots' is not a number"),
        ("--kv-tokens", "many", "not a whole number"),
        ("--num-blocks", "0", "at least 1"),
        ("--threads", "0", "at least 1"),
        ("--evict-after", "0", "not a time"),
        ("--evict-after", "soon", "'soon' is not a time"),
        ("--metrics-port", "http", "'http' is not a port"),
        ("--metrics-port", "-1", "not a port"),
        ("--metrics-port", "65536", "not a port"),
        ("--port", "-1", "not a port"),
        ("--port", "65536", "ports go from 0 to 65535"),
        ("--quantize", "int3", "invalid choice: 'int3'"),
        ("--dtype", "int3", "invalid choice: 'int3'"),
        ("--blocks", "all", "'all' is not a span"),
        ("--blocks", "3", "'3' is not a span"),
        ("--blocks", "5:3", "'5:3' is not a span"),
        ("--initial-peers", "here", "'here' is not the address of a peer"),
        ("--models", "one,,two", "'one,,two' is no list of names"),
    ],
)
def test_values_that_mean_nothing(
    capsys: pytest.CaptureFixture[str], option: str, value: str, says: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        parsed(option, value)
    assert ended.value.code == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert says in error
    assert hint.startswith("hint: ")


@pytest.mark.parametrize("factor", ["0.9", "-1", "0", "nan", "inf", "101"])
def test_an_overcommitment_that_is_none(factor: str) -> None:
    with pytest.raises(InputError, match="overcommitment") as refused:
        config_from(parsed(f"--kv-overcommit={factor}"))
    assert "1 to 100" in refused.value.hint


def test_the_model_may_be_left_to_the_swarm() -> None:
    assert config_from(parsed()).models == ()
    config = config_from(parsed("--models", "one, two,three", "--num-blocks", "4"))
    assert (config.models, config.num_blocks, config.blocks) == (("one", "two", "three"), 4, None)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--models", "one,two", "--blocks", "0:2"), "one model"),
        (("--models", "one,two,one"), "twice"),
        (("--models", "one,two", "--no-blocks"), "contradict"),
        (("--models", ",".join(map(str, range(17)))), "17 models"),
    ],
)
def test_models_that_cannot_be_chosen_from(options: tuple[str, ...], says: str) -> None:
    with pytest.raises(InputError, match=says) as refused:
        config_from(parsed(*options))
    assert refused.value.hint


def test_one_model_beside_several(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parsed("--model", "one", "--models", "one,two")
    assert ended.value.code == 2
    assert "not allowed with argument --model" in capsys.readouterr().err


def test_gpu_memory_of_a_server_without_a_gpu() -> None:
    with pytest.raises(InputError, match="uses none") as refused:
        config_from(parsed("--max-vram-mb", "100", "--device", "cpu"))
    assert "--memory-limit" in refused.value.hint


def test_blocks_beside_none() -> None:
    with pytest.raises(InputError, match="contradict"):
        config_from(parsed("--no-blocks", "--blocks", "0:2"))


def test_private_swarms_are_options() -> None:
    config = config_from(parsed())
    assert (config.swarm_key, config.allow_peers, config.block_peers) == (None, None, None)
    assert (config.remembers, config.shows_invitation) == (True, False)
    config = config_from(
        parsed("--swarm-key", "k", "--block-peers", "b", "--no-remembered-peers", "--print-invitation")
    )
    assert (config.swarm_key, config.block_peers) == (Path("k"), Path("b"))
    assert (config.remembers, config.shows_invitation) == (False, True)


def test_a_port_beside_multiaddrs(capsys: pytest.CaptureFixture[str]) -> None:
    listening = ("--host-maddrs", "/ip4/127.0.0.1/tcp/0")
    with pytest.raises(SystemExit):
        parsed("--port", "0", *listening)
    assert "not allowed with argument --port" in capsys.readouterr().err
    args = parsed(*listening)
    args.port = 0  # as a file may say beside it
    with pytest.raises(InputError, match="both"):
        config_from(args)


def test_an_outer_address_is_what_others_are_told() -> None:
    config = config_from(parsed("--port", "31330", "--public-ip", "203.0.113.5"))
    assert config.announce_maddrs == ("/ip4/203.0.113.5/tcp/31330",)
    assert config.host_maddrs == ("/ip4/0.0.0.0/tcp/31330",)
    config = config_from(parsed("--port", "7", "--public-ip", "2001:db8::1"))
    assert config.announce_maddrs == ("/ip6/2001:db8::1/tcp/7",)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--public-ip", "203.0.113.5"), "a port that stays"),
        (("--public-ip", "203.0.113.5", "--port", "0"), "a port that stays"),
        (("--public-ip", "home.example", "--port", "1"), "not an IP address"),
        (("--public-ip", "1.1.1.1", "--port", "1", "--announce-maddrs", "/ip4/1.1.1.1/tcp/1"), "both say"),
    ],
)
def test_an_outer_address_that_cannot_be_told(options: tuple[str, ...], says: str) -> None:
    with pytest.raises(InputError, match=says):
        config_from(parsed(*options))


def test_shortcuts_have_a_port_of_their_own_unless_there_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert config_from(parsed()).shortcut_port == 0
    assert config_from(parsed("--port", "7", "--shortcut-port", "8")).shortcut_port == 8
    assert config_from(parsed("--no-shortcuts")).shortcut_port is None
    with pytest.raises(SystemExit):
        parsed("--no-shortcuts", "--shortcut-port", "8")
    with pytest.raises(InputError, match="--port and --shortcut-port are both 8"):
        config_from(parsed("--port", "8", "--shortcut-port", "8"))


def test_relays_are_used_as_it_fits_unless_told_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    assert config_from(parsed()).relays is None
    assert config_from(parsed("--relay")).relays is True
    assert config_from(parsed("--no-relay")).relays is False
    with pytest.raises(SystemExit):
        parsed("--relay", "--no-relay")
    assert "not allowed with argument" in capsys.readouterr().err


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
    events.metrics("http://127.0.0.1:9100/metrics")
    events.phase("joining", Span(0, 2), 0.4)
    events.phase("serving", Span(0, 2), 1.0)
    events.phase("joining", Span(0, 2), 0.0, asleep=True)
    events.moving(Span(0, 2), Span(4, 6))
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        {"event": "listening", "addresses": [LOOPBACK], "peer": "A"},
        {"event": "metrics", "url": "http://127.0.0.1:9100/metrics"},
        {"event": "joining", "blocks": [0, 2], "progress": 0.4},
        {"event": "serving", "blocks": [0, 2]},
        {"event": "joining", "blocks": [0, 2], "progress": 0.0, "asleep": True},
        {"event": "moving", "blocks": [0, 2], "to": [4, 6]},
    ]


def test_people_are_told_that_blocks_were_let_go_and_see_them_load_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    events = TextEvents("m", Span(0, 2), 6, is_first=False)
    events.phase("joining", Span(0, 2), 0.5)
    events.phase("serving", Span(0, 2), 1.0)
    events.phase("joining", Span(0, 2), 0.0, asleep=True)
    events.phase("joining", Span(0, 2), 0.0)
    events.phase("serving", Span(0, 2), 1.0)
    captured = capsys.readouterr()
    assert [line.split()[0] for line in captured.out.splitlines()] == ["Serving", "Blocks", "Serving"]
    assert captured.err.count("Loading blocks 0:2") == 2


def test_people_are_told_where_a_server_goes_and_that_it_does_not_leave(
    capsys: pytest.CaptureFixture[str],
) -> None:
    events = TextEvents("m", None, 6, is_first=True)
    events.listening(PeerId("A"), [PUBLIC])
    assert f"python -m swarm.server --model m --initial-peers {PUBLIC}" in capsys.readouterr().out
    events.phase("joining", Span(0, 2), 0.5)
    events.phase("serving", Span(0, 2), 1.0)
    events.moving(Span(0, 2), Span(4, 6))
    events.phase("draining", Span(0, 2), 1.0)
    events.phase("joining", Span(4, 6), 0.0)
    events.phase("serving", Span(4, 6), 1.0)
    events.phase("draining", Span(4, 6), 1.0)
    captured = capsys.readouterr()
    assert [line.split(".")[0] for line in captured.out.splitlines()] == [
        "Serving blocks 0:2",
        "Going on from blocks 0:2 to 4:6, where the swarm needs them more",
        "Serving blocks 4:6",
        "Leaving: running steps may end",
    ]
    assert "Loading blocks 4:6" in captured.err


def test_who_goes_on_with_another_model_listens_once_and_leaves_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    events = LastingEvents(JsonEvents())
    events.model("one", is_first=True)
    events.listening(PeerId("A"), [LOOPBACK])
    events.model("two", is_first=False)
    for phase in ("draining", "left"):
        events.phase(phase, Span(0, 2), 1.0)
    events.listening(PeerId("A"), [LOOPBACK])
    events.phase("serving", Span(0, 4), 1.0)
    events.phase("left", Span(0, 4), 1.0)
    events.end()
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        {"event": "listening", "addresses": [LOOPBACK], "peer": "A"},
        {"event": "model", "name": "one"},
        {"event": "model", "name": "two"},
        {"event": "draining", "blocks": [0, 2]},
        {"event": "serving", "blocks": [0, 4]},
        {"event": "left", "blocks": [0, 4]},
    ]


def test_who_is_stopped_while_it_goes_on_has_left(capsys: pytest.CaptureFixture[str]) -> None:
    events = LastingEvents(TextEvents("one", None, 6, is_first=False))
    events.model("one", is_first=True)
    events.listening(PeerId("A"), [LOOPBACK])
    events.phase("serving", Span(0, 2), 1.0)
    events.model("two", is_first=False)
    for phase in ("draining", "left"):
        events.phase(phase, Span(0, 2), 1.0)
    events.end()
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "Serving blocks 0:2. Ctrl-C leaves the swarm.",
        "Going on with two, which needs this server more.",
        "Left the swarm.",
    ]


@pytest.mark.parametrize("is_first", [True, False])
def test_the_first_server_prints_the_commands_to_join_by(
    capsys: pytest.CaptureFixture[str], is_first: bool
) -> None:
    events = TextEvents("m", Span(0, 2), 6, is_first=is_first)
    events.listening(PeerId("A"), [LOOPBACK, PUBLIC])
    phases: tuple[PeerState, ...] = ("joining", "serving", "draining", "left")
    for phase in phases:
        events.phase(phase, Span(0, 2), 1.0)
    said = capsys.readouterr().out
    assert LOOPBACK in said
    assert said.rstrip().endswith("Left the swarm.")
    join = f"python -m swarm.server --model m --blocks 2:6 --initial-peers {PUBLIC}"
    talk = f"python -m swarm.client chat --model m --initial-peers {PUBLIC}"
    assert ((join in said), (talk in said)) == (is_first, is_first)


KEY = SwarmKey(b"k" * 32)
SECRET = KEY.to_bytes().hex()
PEER = Identity.from_seed("server").peer
AT_HOME, OUTWARD = f"/ip4/127.0.0.1/tcp/1/p2p/{PEER}", f"/ip4/192.0.2.1/tcp/1/p2p/{PEER}"


def test_a_private_swarm_is_joined_by_its_key_file_and_the_key_is_not_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    invite = Invite(KEY, Path("my key"))
    TextEvents("m", Span(0, 2), 6, is_first=True, invite=invite).listening(PEER, [AT_HOME, OUTWARD])
    said = capsys.readouterr().out
    joining = f"--swarm-key 'my key' --initial-peers {OUTWARD}"
    assert f"python -m swarm.server --model m --blocks 2:6 {joining}" in said
    assert f"python -m swarm.client chat --model m {joining}" in said
    assert f"python -m swarm.client invite {joining}" in said
    JsonEvents(invite).listening(PEER, [AT_HOME])
    BootstrapEvents(invite, as_json=False).listening(PEER, [AT_HOME], is_first=True)
    said += capsys.readouterr().out
    assert "swarm1" not in said
    assert SECRET not in said


@pytest.mark.parametrize("key", [KEY, None])
def test_an_invitation_is_shown_only_when_asked_for(
    capsys: pytest.CaptureFixture[str], key: SwarmKey | None
) -> None:
    invite = Invite(key, is_shown=True)
    TextEvents("m", Span(0, 2), 6, is_first=False, invite=invite).listening(PEER, [AT_HOME, OUTWARD])
    BootstrapEvents(invite, as_json=False).listening(PEER, [AT_HOME, OUTWARD], is_first=False)
    words = capsys.readouterr().out.split()
    JsonEvents(invite).listening(PEER, [AT_HOME, OUTWARD])
    event = json.loads(capsys.readouterr().out)
    shown = [word for word in words if word.startswith("swarm1")]
    assert len(shown) == 2
    for text in (*shown, event["invitation"]):
        assert Invitation.parse(text) == Invitation((OUTWARD,), key)


def test_a_bootstrap_peer_says_where_it_is_and_that_it_left(capsys: pytest.CaptureFixture[str]) -> None:
    events = BootstrapEvents(Invite(), as_json=True)
    events.listening(PEER, [AT_HOME], is_first=True)
    events.left()
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        {"event": "listening", "addresses": [AT_HOME], "peer": PEER},
        {"event": "left"},
    ]
    events = BootstrapEvents(Invite(), as_json=False)
    events.listening(PEER, [AT_HOME, OUTWARD], is_first=True)
    events.left()
    said = capsys.readouterr().out
    assert f"python -m swarm.server --initial-peers {OUTWARD}" in said
    assert said.endswith("Left the swarm.\n")
