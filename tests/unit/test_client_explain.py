"""The command `route`: what it says of a route, its JSON, what it reads of a swarm, and its mistakes."""

import asyncio
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from rich.console import Console

from swarm import cli
from swarm.client.__main__ import main, parser
from swarm.client.costs import Costs, Demand
from swarm.client.explain import Explanation, explain
from swarm.client.peers import find_model
from swarm.client.route import NoRoute
from swarm.client.route_command import drawn, look
from swarm.dht.announcement import Announcement, ModelEntry, Throughput
from swarm.dht.announcer import Announcer
from swarm.dht.memory import MemoryStore
from swarm.errors import InputError
from swarm.net.calls import MessageStream
from swarm.net.identity import Identity
from swarm.net.memory import MemoryNetwork
from swarm.net.messages import Ping, Pong
from swarm.net.transport import PeerId, Stream, StreamClosed
from swarm.net.virtual_time import VirtualTimeLoop, in_virtual_time

ENTRY = ModelEntry(model_id="toy-1", name="toy", repository="me/toy", num_blocks=6, fingerprint="1")
DEMAND = Demand(128, 100)


def server(name: str, start: int, end: int, decode: float = 100.0, **more: Any) -> Announcement:
    fields: dict[str, Any] = {"state": "serving", "kv_tokens_left": 1000, "name": name, **more}
    fields.setdefault("throughput", Throughput(decode=decode, prefill=10 * decode))
    return Announcement(peer=fields.pop("peer", name), model_id="toy-1", start=start, end=end, **fields)


def explained(*servers: Announcement, rtt: float | None = 0.02, **known: Any) -> Explanation:
    return explain(servers, 6, Costs(rtt=lambda peer: rtt, **known), DEMAND, model="toy")


def text(explanation: Explanation, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(drawn(explanation, "toy"))
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


A, B, C = server("a", 0, 2, rtts={"b": 0.004}), server("b", 2, 4), server("c", 4, 6, dtype="bfloat16")
SPARE = server("spare", 2, 4, decode=50.0)


def test_the_shares_add_up_to_a_token() -> None:
    found = explained(A, B, C, SPARE)
    said = found.as_json()
    assert [hop["peer"] for hop in said["hops"]] == ["a", "b", "c"]
    assert [hop["is_direct"] for hop in said["hops"]] == [False, True, False]
    parts = [hop["way_ms"] + hop["queue_ms"] + hop["compute_ms"] for hop in said["hops"]]
    assert sum(parts) + said["back_ms"] == pytest.approx(said["token_ms"], abs=0.01)
    assert sum(hop["share"] for hop in said["hops"]) + said["back_ms"] / said["token_ms"] == pytest.approx(
        1, abs=1e-3
    )
    growth = 1 + (128 + 99 / 2) / 16_384
    assert said["token_ms"] == pytest.approx(10 + 2 + 20 + 10 + 3 + 60 * growth, abs=0.01)
    assert said["tokens_per_s"] == pytest.approx(1000 / said["token_ms"], rel=1e-3)
    assert said["hops"][1]["way_ms"] == pytest.approx(3.0)
    assert json.loads(json.dumps(said)) == said


def test_the_first_token_waits_for_the_prompt_on_each_hop() -> None:
    said = explained(A, B, C).as_json()
    prompt = 3 * 2 * 128 / 1000 * (1 + 64 / 16_384)
    assert said["first_token_ms"] == pytest.approx(1000 * (0.045 + prompt), abs=0.01)


def test_the_runner_up_avoids_one_of_the_peers() -> None:
    found = explained(A, B, C, SPARE)
    assert found.runner_up is not None
    assert [hop.peer for hop in found.runner_up.hops] == ["a", "spare", "c"]
    assert found.as_json()["runner_up"]["slower"] == pytest.approx(found.slower, abs=1e-4)
    assert 0.2 < found.slower < 0.5
    assert f"The runner-up is {found.slower:.0%} slower" in " ".join(text(found).split())
    alone = explained(A, B, C)
    assert alone.as_json()["runner_up"] is None
    assert "There is no other route" in text(alone)


def test_says_how_long_others_wait_and_what_would_be_faster_without_that() -> None:
    near, far = server("near", 0, 6, queue=1), server("far", 0, 6, decode=60.0)
    found = explained(near, far)
    said = found.as_json()
    assert [hop["peer"] for hop in said["hops"]] == ["far"]
    assert said["toll_ms"] == said["hops"][0]["toll_ms"] == 0
    assert said["runner_up"]["toll_ms"] == pytest.approx(180, abs=0.01)
    assert said["runner_up"]["slower"] > 0
    busy = explained(near)
    assert busy.as_json()["toll_ms"] == pytest.approx(180, abs=0.01)
    assert "Others are taken to wait 180.0 ms for it" in text(busy)
    assert "Others are" not in text(found)
    faster = explained(near, server("far", 0, 6, decode=40.0))
    assert faster.slower < 0
    assert "faster, but others would wait 180.0 ms more" in " ".join(text(faster).split())


def test_says_what_takes_longest() -> None:
    def first(explanation: Explanation) -> str:
        return explanation.advice[0]

    assert "A faster server for blocks 2 to 3" in first(explained(A, server("b", 2, 4, decode=5), C))
    assert "queue of b (…b)" in first(explained(A, server("b", 2, 4, queue=9), C))
    assert "nearer to you: the way to" in first(explained(A, B, C, rtt=1.0))
    far, near = server("a", 0, 2, rtts={"b": 0.6}), server("b", 2, 4, rtts={"c": 0.1})
    assert "nearer to a (…a): the way to b (…b)" in first(explained(far, near, C, rtt=0.5))


def test_says_what_is_unknown_what_cannot_push_and_what_is_at_risk() -> None:
    advice = "\n".join(explained(A, B, C, SPARE, rtt=None).advice)
    assert "Nothing is known of the distance to a (…a)" in advice
    assert "b (…b) announces no distance to c (…c)" in advice
    assert "A second server for blocks 0 to 1: a (…a) alone has them" in advice
    assert "blocks 2 to 3: " not in advice
    assert "not measured its speed" not in advice
    broken = "\n".join(explained(A, B, C, broken={(PeerId("a"), PeerId("b"))}).advice)
    assert "a (…a) cannot reach b (…b)" in broken
    assert "c (…c) has not measured its speed" in "\n".join(
        explained(A, B, server("c", 4, 6, throughput=Throughput())).advice
    )


def test_the_table_is_for_a_terminal_and_safe() -> None:
    evil = msgspec.structs.replace(C, name="c\x1b[2J[bold]x")
    shown = text(explained(A, B, evil))
    assert "\x1b" not in shown
    assert "[bold]x" in shown
    assert "↳ 3.0" in shown
    assert "back to you" in shown
    assert "100%" not in shown
    assert text(explained(A, B, C), width=60)


def test_a_model_is_found_by_what_people_call_it() -> None:
    other = ModelEntry(model_id="other-2", name="other", num_blocks=1, fingerprint="2")
    for name in ("toy", "me/toy", "toy-1", "/models/toy", "./toy/"):
        assert find_model([other, ENTRY], name) == ENTRY
    with pytest.raises(InputError, match=r"carries no model nope\. It carries: other, toy"):
        find_model([other, ENTRY], "nope")
    with pytest.raises(InputError, match="Start a server"):
        find_model([], "toy")
    twin = ModelEntry(model_id="toy-9", name="toy", num_blocks=6, fingerprint="9")
    with pytest.raises(InputError, match="by its id: toy-1, toy-9"):
        find_model([ENTRY, twin], "toy")


async def pong(stream: Stream) -> None:
    calls = MessageStream(stream)
    while True:
        try:
            asked, _ = await calls.receive()
        except StreamClosed:
            return
        assert isinstance(asked, Ping), "nobody is asked for more than the time of day"
        await calls.send(Pong(nonce=asked.nonce))


@asynccontextmanager
async def announced(*servers: Announcement) -> AsyncIterator[tuple[Any, MemoryStore, dict[str, Announcer]]]:
    """A client's transport and store in a swarm of `servers`, 5 ms apart; they answer pings alone."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    network, store = MemoryNetwork(), MemoryStore(loop.now)
    announcers = {}
    for one in servers:
        identity = Identity.from_seed(one.name)
        await network.transport(identity).listen(pong)
        network.set_link(identity, "client", latency=0.005)
        announcers[one.name] = Announcer(store.another(), identity, ENTRY, period=1000.0)
        await announcers[one.name].publish(
            server(one.name, *one.span, peer=identity.peer, state=one.state, progress=one.progress)
        )
    async with network.transport("client") as transport:
        yield transport, store, announcers


@in_virtual_time
async def test_reads_the_swarm_and_measures_distances() -> None:
    async with announced(A, B, C) as (transport, store, _):
        found = await look(transport, store, ENTRY, DEMAND, timeout=5.0)
        assert [hop.announcement.name for hop in found.route.hops] == ["a", "b", "c"]
        assert found.times.back == pytest.approx(0.005)


@in_virtual_time
async def test_a_gap_is_said_at_once_and_servers_that_load_are_waited_for() -> None:
    async with announced(A, C) as (transport, store, _):
        with pytest.raises(NoRoute, match="blocks 2 to 3 of toy"):
            await look(transport, store, ENTRY, DEMAND, timeout=60.0)
    async with announced(A, C, server("b", 2, 4, state="joining", progress=0.5)) as (transport, store, _):
        with pytest.raises(NoRoute, match="is loading blocks 2 to 3, 50% done"):
            await look(transport, store, ENTRY, DEMAND, timeout=3.0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["route"], "error: There is no peer to join by."),
        (["route", "--prompt-tokens", "0"], "error: Argument --prompt-tokens: '0' is not a whole number"),
        (["route", "--new-tokens", "many"], "error: Argument --new-tokens: 'many' is not a whole number"),
        (["route", "--initial-peers", "nonsense"], "error: "),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_two(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    monkeypatch.delenv("SWARM_INITIAL_PEERS", raising=False)
    monkeypatch.setattr(cli, "configure_logging", lambda verbose: None)
    try:
        code: object = main(arguments)
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert code == 2, err
    assert said in err
    assert "hint: " in err
    assert out == ""


def test_options_have_the_documented_defaults() -> None:
    args = parser().parse_args(["route"])
    assert (args.prompt_tokens, args.new_tokens, args.json) == (512, 128, False)
