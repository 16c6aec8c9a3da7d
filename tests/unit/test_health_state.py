"""The health page's state, worked out from announcements: pure, so every case is a table."""

import shlex
from dataclasses import replace
from itertools import pairwise
from math import inf, nan
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.dht.announcement import Announcement, ModelEntry, PeerState, Throughput
from swarm.health import coverage
from swarm.health.coverage import joining_command, neediest
from swarm.health.state import MAX_PEERS, Reach, Seen, shares, state_of
from swarm.net.transport import PeerId
from swarm.spans import Span

NOW = 1_000_000.0
MODEL = ModelEntry(model_id="m", name="tiny", num_blocks=6, fingerprint="f")
PAGE = PeerId("page")
ADDRESS = "/ip4/198.51.100.7/tcp/4001/p2p/12D3KooWX"


def says(peer: str, start: int, end: int, state: PeerState = "serving", **more: Any) -> Announcement:
    room = {"kv_tokens_left": 100} | more
    return Announcement(peer=peer, model_id="m", start=start, end=end, state=state, **room)


def decodes(peer: str, start: int, end: int, decode: float, state: PeerState = "serving") -> Announcement:
    return says(peer, start, end, state, throughput=Throughput(decode=decode))


def seen(*said: Announcement, **more: Any) -> Seen:
    given = {"models": [MODEL], "announcements": {"m": said}, "initial_peers": [ADDRESS]} | more
    return Seen(PAGE, "1.0", at=NOW, read_at=NOW, **given)


def model_of(*said: Announcement, **more: Any) -> Any:
    (model,) = state_of(seen(*said, **more)).models
    return model


ASLEEP: dict[str, Any] = {"asleep": True}
JOINING: PeerState = "joining"


@pytest.mark.parametrize(
    ("said", "standing"),
    [
        ([], "incomplete"),
        ([says("a", 0, 6)], "runs"),
        ([says("a", 0, 3), says("b", 3, 6)], "runs"),
        ([says("a", 0, 3), says("b", 4, 6)], "incomplete"),
        ([says("a", 0, 6, kv_tokens_left=0)], "full"),
        ([says("a", 0, 6), says("b", 2, 4, kv_tokens_left=0)], "runs"),
        ([says("a", 0, 6, "draining")], "incomplete"),
        ([says("a", 0, 6, JOINING)], "joining"),
        ([says("a", 0, 3), says("b", 3, 6, JOINING, **ASLEEP)], "wakes"),
        ([says("a", 0, 3, JOINING), says("b", 3, 6, JOINING, **ASLEEP)], "joining"),
        ([says("a", 0, 3, JOINING), says("b", 4, 6)], "incomplete"),
    ],
)
def test_whether_a_model_can_be_run(said: list[Announcement], standing: str) -> None:
    assert model_of(*said).standing == standing


def test_one_that_loads_says_how_far_the_last_of_them_is() -> None:
    model = model_of(says("a", 0, 3, JOINING, progress=0.75), says("b", 3, 6, JOINING, progress=0.25))
    assert (model.standing, model.progress) == ("joining", 0.25)


def test_coverage_says_how_often_blocks_are_served_and_which_are_missing() -> None:
    model = model_of(says("a", 0, 4), says("b", 1, 2), says("c", 4, 5, JOINING))
    assert model.coverage == ((0, 1, 1), (1, 2, 2), (2, 4, 1), (4, 6, 0))
    assert model.missing == (Span(4, 6),)
    assert model.copies == 0
    assert model.states == {"serving": 2, "joining": 1}


def test_rates_and_room_are_those_of_the_narrowest_block() -> None:
    model = model_of(decodes("a", 0, 3, 300.0), decodes("b", 3, 6, 120.0), decodes("c", 4, 6, 60.0))
    assert model.tokens_per_s == 40.0
    assert model.stream_tokens_per_s == pytest.approx(1 / (3 / 300 + 3 / 120))
    assert model.kv_tokens_left == 100


def test_rates_are_zero_where_a_block_has_nobody() -> None:
    model = model_of(decodes("a", 0, 5, 300.0))
    assert (model.tokens_per_s, model.stream_tokens_per_s, model.kv_tokens_left) == (0, 0, 0)


def test_blocks_that_only_unreachable_peers_serve_are_in_doubt() -> None:
    lost, met = Reach(False, None, NOW), Reach(True, 0.0125, NOW)
    said = (says("a", 0, 6), says("b", 0, 2), says("c", 3, 4))
    model = model_of(*said, reach={PeerId("a"): lost, PeerId("b"): met})
    assert model.standing == "runs"
    assert model.unreached == (Span(2, 3), Span(4, 6))
    views = {view.peer: (view.reachable, view.rtt_ms) for view in model.peers}
    assert views == {"a": (False, None), "b": (True, 12.5), "c": (None, None)}


@pytest.mark.parametrize(
    ("said", "span"),
    [
        ([], Span(0, 6)),
        ([says("a", 0, 2), says("b", 3, 5)], Span(2, 3)),
        ([says("a", 0, 1), says("b", 2, 4)], Span(4, 6)),
        ([decodes("a", 0, 2, 9.0), says("b", 2, 6, JOINING)], Span(2, 6)),
        ([says("a", 0, 6, "draining"), says("b", 0, 3)], Span(3, 6)),
        ([decodes("a", 0, 3, 100.0), decodes("b", 3, 6, 90.0)], Span(3, 6)),
        ([decodes("a", 0, 6, 100.0), decodes("b", 0, 2, 1.0)], Span(2, 6)),
    ],
)
def test_help_is_wanted_where_the_fewest_and_slowest_are(said: list[Announcement], span: Span) -> None:
    assert neediest(said, 6) == span


def test_the_command_to_join_serves_what_is_wanted() -> None:
    wanted = model_of(says("a", 0, 4)).help
    assert (wanted.blocks, wanted.copies) == (Span(4, 6), 0)
    assert wanted.command == f"python -m swarm.server --model tiny --blocks 4:6 --initial-peers {ADDRESS}"


@pytest.mark.parametrize("name", ["x; rm -rf ~", "$(id)", "`id`", "a'b", '"', "a b", "-h", "--json", "é &"])
def test_a_name_that_a_shell_would_obey_is_quoted(name: str) -> None:
    words = shlex.split(joining_command(name, Span(0, 1), ["/ip4/127.0.0.1/tcp/1/p2p/x"]), posix=True)
    assert words[:3] == ["python", "-m", "swarm.server"]
    given = words[3].removeprefix("--model=") if "=" in words[3] else words[4]
    assert given == name
    assert words[-4:] == ["--blocks", "0:1", "--initial-peers", "/ip4/127.0.0.1/tcp/1/p2p/x"]


def test_addresses_that_lead_here_alone_are_named_only_if_there_are_no_others() -> None:
    local = "/ip4/127.0.0.1/tcp/1/p2p/x"
    assert joining_command("m", Span(0, 1), [local, ADDRESS]).endswith(f"--initial-peers {ADDRESS}")
    assert joining_command("m", Span(0, 1), [local]).endswith(f"--initial-peers {local}")


def test_the_command_to_join_a_private_swarm_names_a_key_and_has_none() -> None:
    command = joining_command("m", Span(0, 1), [ADDRESS], is_private=True)
    assert (
        command == f"python -m swarm.server --model m --blocks 0:1 --swarm-key FILE --initial-peers {ADDRESS}"
    )


def test_contributors_are_ranked_by_blocks_times_throughput() -> None:
    state = state_of(
        seen(
            decodes("a", 0, 2, 10.0),
            decodes("b", 0, 6, 9.0),
            decodes("c", 0, 6, 99.0, "draining"),
            says("d", 0, 6),
        )
    )
    assert [(one.peer, one.score) for one in state.contributors] == [("b", 54.0), ("a", 20.0)]


@given(st.lists(st.integers(0, 50), max_size=8), st.integers(0, 100))
def test_places_are_shared_out_fairly(wanted: list[int], total: int) -> None:
    given = shares(wanted, total)
    assert sum(given) == min(total, sum(wanted))
    assert all(0 <= got <= want for got, want in zip(given, wanted, strict=True))
    unfilled = [got for got, want in zip(given, wanted, strict=True) if got < want]
    assert not unfilled or min(unfilled) >= max(given) - 1


def test_a_crowd_is_counted_but_not_all_listed() -> None:
    crowd = [says(f"p{index}", index % 6, index % 6 + 1) for index in range(MAX_PEERS + 500)]
    other = msgspec.structs.replace(MODEL, model_id="n")
    state = state_of(seen(models=[MODEL, other], announcements={"m": crowd, "n": [says("q", 0, 6)]}))
    first, second = state.models
    assert len(first.peers) == MAX_PEERS - 1
    assert first.peers_left_out == 501
    assert first.num_peers == MAX_PEERS + 500
    assert first.copies == (MAX_PEERS + 500) // 6
    assert len(second.peers) == 1


@pytest.mark.parametrize("value", [nan, inf, -inf, 5e-324])
def test_numbers_that_are_none_never_get_out(value: float) -> None:
    odd = Throughput(decode=value, prefill=value, network=value)
    state = state_of(seen(says("a", 0, 6, throughput=odd), says("b", 0, 6, JOINING, progress=value)))
    assert state.models[0].peers[0].decode == 0
    view = state.models[0]
    assert (view.tokens_per_s, view.stream_tokens_per_s) == (0, 0)
    assert all(0 <= peer.progress < 1 for peer in view.peers)


def test_the_largest_numbers_that_records_allow_stay_finite() -> None:
    huge = Throughput(decode=1e12, prefill=1e12, network=1e12)
    said = [says(f"p{index}", 0, 6, throughput=huge, kv_tokens_left=2**40) for index in range(2_000)]
    model = model_of(*said)
    assert model.tokens_per_s == pytest.approx(2_000 * 1e12 / 6)
    assert model.kv_tokens_left == 2_000 * 2**40


@st.composite
def announced(draw: st.DrawFn) -> list[Announcement]:
    spans = draw(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6)), max_size=12))
    states = st.sampled_from(("serving", "joining", "draining"))
    return [
        says(f"p{index}", start, min(start + size, 6), draw(states))
        for index, (start, size) in enumerate(spans)
    ]


@given(announced())
def test_runs_and_gaps_make_up_the_model(said: list[Announcement]) -> None:
    model = model_of(*said)
    assert (model.coverage[0].start, model.coverage[-1].end) == (0, 6)
    assert all(
        one.end == other.start and one.copies != other.copies for one, other in pairwise(model.coverage)
    )
    held = coverage.copies([one for one in said if one.state == "serving"], 6)
    missing = {block for span in model.missing for block in span.blocks}
    assert missing == {block for block in range(6) if held[block] == 0}
    assert (model.standing == "runs") == (not missing)


def test_one_state_is_json_and_nothing_else() -> None:
    state = state_of(replace(seen(says("a", 0, 6)), error="away"))
    told = msgspec.json.decode(msgspec.json.encode(state))
    assert told["error"] == "away"
    assert told["models"][0]["peers"][0]["blocks"] == [0, 6]
