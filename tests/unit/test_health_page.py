"""The health page over a swarm of announcements: what it watches, answers and bears. No network, no clock."""

import asyncio
import gzip
import json
import os
import re
import signal
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families as parse_metrics
from starlette.types import Message

from swarm.allowance import MAX_CLIENTS, Allowance
from swarm.dht.announcement import MODELS_KEY, ModelEntry, Throughput, block_key
from swarm.dht.records import sign
from swarm.dht.store import StoreUnreachable
from swarm.health import inspecting
from swarm.health import web as web_room
from swarm.health.command import SIGNALS, Stopping
from swarm.health.drawing import MAX_LANES, lanes, map_of, number, ticks
from swarm.health.history import History
from swarm.health.inspecting import INNOCENT, PERIOD, RETRY_PERIOD
from swarm.health.probes import PER_ROUND
from swarm.health.reading import REMEMBERED
from swarm.health.watch import Watch
from swarm.health.web import HEADERS, HealthSite
from swarm.net.calls import MessageStream
from swarm.net.identity import Identity
from swarm.net.messages import Error, ErrorCode
from swarm.net.transport import Stream
from swarm.net.virtual_time import VirtualTimeLoop, in_virtual_time
from swarm.spans import Span
from tests.health_swarm import LIFETIME, TINY, AnnouncedSwarm

FIVE = Throughput(decode=5.0)


def loop_now() -> float:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    return loop.now()


@dataclass
class Answer:
    """What an application sent for one request."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Page:
    """A health page and those who ask it."""

    def __init__(self, swarm: AnnouncedSwarm, history: History | None = None, period: float = 5.0):
        self.swarm = swarm
        self.watch = Watch(swarm.access(), ["/ip4/198.51.100.7/tcp/1/p2p/x"], history, period)
        self.site = HealthSite(self.watch)

    async def ask(self, path: str, *, client: str = "192.0.2.1", **headers: str) -> Answer:
        answer = Answer()
        async for message in self.stream(path, client=client, **headers):
            if message["type"] == "http.response.start":
                answer.status = message["status"]
                answer.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            else:
                answer.body += message.get("body", b"")
        return answer

    async def stream(self, path: str, *, client: str = "192.0.2.1", **headers: str) -> AsyncIterator[Message]:
        """The messages of one answer as they come; leaving early is a client that goes away."""
        sent: asyncio.Queue[Message | None] = asyncio.Queue()
        gone = asyncio.Event()
        requests = iter([{"type": "http.request"}])

        async def receive() -> Message:
            if (request := next(requests, None)) is not None:
                return request
            await gone.wait()
            return {"type": "http.disconnect"}

        async def answer() -> None:
            try:
                await self.site.app(scope(path, client, headers), receive, sent.put)
            finally:
                await sent.put(None)

        task = asyncio.create_task(answer())
        try:
            while (message := await sent.get()) is not None:
                yield message
        finally:
            gone.set()
            await task


def scope(path: str, client: str, headers: dict[str, str]) -> dict[str, Any]:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": raw,
        "client": (client, 1),
        "server": ("localhost", 80),
    }


@asynccontextmanager
async def running(watch: Watch) -> AsyncIterator[None]:
    task = asyncio.create_task(watch.run())
    yield
    assert not task.done()
    task.cancel()
    await asyncio.wait((task,))


@in_virtual_time
async def test_the_state_follows_the_swarm() -> None:
    swarm = AnnouncedSwarm(loop_now)
    page = Page(swarm)
    async with running(page.watch):
        version = await page.watch.newer_than(0)
        assert (await page.ask("/api/v1/state")).json["models"] == []
        await swarm.announce("a", 0, 3, throughput=FIVE, kv_tokens_left=64, dtype="bfloat16", version="0.1.0")
        await swarm.announce("b", 3, 6, "joining", progress=0.5)
        await asyncio.sleep(10)
        (model,) = (await page.ask("/api/v1/state")).json["models"]
        assert (model["standing"], model["progress"], model["missing"]) == ("joining", 0.5, [[3, 6]])
        first, second = model["peers"]
        assert (first["name"], first["dtype"], first["version"]) == ("a", "bfloat16", "0.1.0")
        assert (first["reachable"], second["state"]) == (True, "joining")
        await swarm.announce("b", 3, 6, throughput=FIVE, lifetime=LIFETIME + 5, kv_tokens_left=64)
        await asyncio.sleep(10)
        assert await page.watch.newer_than(version) > version
        (model,) = (await page.ask("/api/v1/state")).json["models"]
        assert model["standing"] == "runs"


@in_virtual_time
async def test_a_killed_peer_is_not_reached_then_gone_and_its_model_stays() -> None:
    swarm = AnnouncedSwarm(loop_now)
    page = Page(swarm)
    await swarm.announce("a", 0, 6)
    async with running(page.watch):
        await asyncio.sleep(6)
        assert page.watch.state.models[0].peers[0].reachable is True
        swarm.kill("a")
        await asyncio.sleep(15)
        (model,) = page.watch.state.models
        assert (model.peers[0].reachable, list(model.unreached)) == (False, [(0, 6)])
        await asyncio.sleep(LIFETIME)
        (model,) = page.watch.state.models
        assert (model.standing, model.peers) == ("incomplete", ())
        assert "Nobody serves" in (await page.ask("/")).text
        await asyncio.sleep(REMEMBERED + 10)
        assert page.watch.state.models == ()


@in_virtual_time
async def test_what_cannot_be_read_is_said_and_kept() -> None:
    swarm = AnnouncedSwarm(loop_now)
    page = Page(swarm)
    await swarm.announce("a", 0, 6)
    assert (await page.ask("/healthz")).status == 503
    await page.watch.refresh()
    assert (await page.ask("/healthz")).status == 200
    swarm.own_store.reachable = False
    await page.watch.refresh()
    assert [model.num_peers for model in page.watch.state.models] == [1]
    assert "Not up to date" in (await page.ask("/")).text
    await asyncio.sleep(120)
    assert (await page.ask("/healthz")).status == 503
    swarm.own_store.reachable = True
    await page.watch.refresh()
    assert page.watch.state.error == ""


@in_virtual_time
async def test_a_model_that_cannot_be_read_spares_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    swarm = AnnouncedSwarm(loop_now)
    page = Page(swarm)
    slow = ModelEntry(model_id="aaa", name="aaa", num_blocks=1, fingerprint="f")
    await swarm.announce("a", 0, 6)
    await swarm.announce("b", 0, 1, model=slow)
    read = swarm.own_store.get

    async def get(keys: list[str]) -> dict[str, list[Any]]:
        if block_key("aaa", 0) in keys:
            await asyncio.sleep(3600)
        return await read(keys)

    monkeypatch.setattr(swarm.own_store, "get", get)
    await page.watch.refresh()
    assert {model.model_id: model.num_peers for model in page.watch.state.models} == {
        "aaa": 0,
        TINY.model_id: 1,
    }
    assert page.watch.state.error == "1 of 2 models could not be read."


@in_virtual_time
async def test_models_that_hang_do_not_keep_the_others_from_being_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    swarm = AnnouncedSwarm(loop_now)
    page = Page(swarm)
    for index in range(20):
        await swarm.announce(
            "b", 0, 1, model=ModelEntry(model_id=f"a{index}", name="a", num_blocks=1, fingerprint="f")
        )
    read = swarm.own_store.get

    async def get(keys: list[str]) -> dict[str, list[Any]]:
        if keys[0].startswith("a"):
            await asyncio.sleep(3600)
        return await read(keys)

    monkeypatch.setattr(swarm.own_store, "get", get)
    await page.watch.refresh()
    for _ in range(3):
        await swarm.announce("a", 0, 6)
        await page.watch.refresh()
        assert {model.num_peers for model in page.watch.state.models if model.name == "tiny"} == {1}


@in_virtual_time
async def test_history_is_kept_and_drawn(tmp_path: Path) -> None:
    swarm = AnnouncedSwarm(loop_now)
    history = await History.open(tmp_path / "h.sqlite")
    page = Page(swarm, history)
    async with running(page.watch):
        for _ in range(60):
            await swarm.announce("a", 0, 3)
            await asyncio.sleep(20)
        told = (await page.ask("/api/v1/state")).json["models"][0]["history"]
        text = (await page.ask("/")).text
    await history.close()
    assert len(told) >= 2
    assert {(one["covered"], one["peers"]) for one in told} == {(0.5, 1.0)}
    assert "Blocks served in the last day: 50 to 50 %, last 50 %" in text


@in_virtual_time
async def test_history_is_kept_of_what_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swarm = AnnouncedSwarm(loop_now)
    history = await History.open(tmp_path / "h.sqlite")
    page = Page(swarm, history)
    await swarm.announce("a", 0, 6)
    await swarm.announce("b", 0, 1, model=ModelEntry(model_id="aaa", name="a", num_blocks=1, fingerprint="f"))
    read = swarm.own_store.get

    async def get(keys: list[str]) -> dict[str, list[Any]]:
        if block_key("aaa", 0) in keys:
            raise StoreUnreachable("too much to read")
        return await read(keys)

    monkeypatch.setattr(swarm.own_store, "get", get)
    await page.watch.refresh()
    await page.watch.remember(history)
    assert list(await history.points(loop_now())) == [TINY.model_id]
    await history.close()


@in_virtual_time
async def test_a_history_that_breaks_does_not_stop_the_page(tmp_path: Path) -> None:
    swarm = AnnouncedSwarm(loop_now)
    history = await History.open(tmp_path / "h.sqlite")
    with sqlite3.connect(history.path) as connection:
        connection.execute("DROP TABLE samples")
    connection.close()
    page = Page(swarm, history)
    await swarm.announce("a", 0, 6)
    async with running(page.watch):
        await asyncio.sleep(6)
        assert page.watch.state.models[0].num_peers == 1
        assert page.watch.state.models[0].history == ()
    await history.close()


@in_virtual_time
async def test_news_come_as_events_until_the_site_closes() -> None:
    swarm = AnnouncedSwarm(loop_now)
    page = Page(swarm)
    lines: list[str] = []

    async def read() -> None:
        async for message in page.stream("/api/v1/events"):
            lines.append(message.get("body", b"").decode())

    reading = asyncio.create_task(read())
    await asyncio.sleep(1)
    await page.watch.refresh()
    await asyncio.sleep(1)
    assert lines[1:4] == ["retry: 3000\n\n", "event: state\ndata: 0\n\n", "event: state\ndata: 1\n\n"]
    await asyncio.sleep(web_room.HEARTBEAT + 1)
    assert lines[4] == ": still here\n\n"
    page.site.close()
    await reading
    assert (await page.ask("/api/v1/events")).status == 503


@in_virtual_time
async def test_readers_are_bounded_and_one_that_leaves_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_room, "MAX_READERS", 1)
    page = Page(AnnouncedSwarm(loop_now))
    stream = page.stream("/api/v1/events")
    for _ in range(2):
        await anext(stream)
    refusal = await page.ask("/api/v1/events")
    assert (refusal.status, refusal.headers["retry-after"]) == (503, "10")
    await stream.aclose()
    stream = page.stream("/api/v1/events")
    assert (await anext(stream))["status"] == 200
    await stream.aclose()


@in_virtual_time
async def test_an_answer_is_made_once_a_version_and_kept_by_browsers() -> None:
    swarm = AnnouncedSwarm(loop_now)
    page = Page(swarm)
    await swarm.announce("a", 0, 6)
    await page.watch.refresh()
    for path in ("/", "/api/v1/state"):
        plain, zipped = await page.ask(path), await page.ask(path, accept_encoding="gzip, br")
        assert zipped.headers["content-encoding"] == "gzip"
        assert gzip.decompress(zipped.body) == plain.body
        same = await page.ask(path, if_none_match=plain.headers["etag"])
        assert (same.status, same.body) == (304, b"")
    await page.watch.refresh()
    assert (await page.ask("/", if_none_match=plain.headers["etag"])).status == 200


@in_virtual_time
async def test_every_answer_is_guarded() -> None:
    page = Page(AnnouncedSwarm(loop_now))
    for path in ("/", "/api/v1/state", "/metrics", "/healthz", "/static/page.css", "/static/page.js", "/no"):
        answer = await page.ask(path)
        assert {name: answer.headers[name.lower()] for name in HEADERS} == HEADERS, path
    assert "unsafe" not in HEADERS["Content-Security-Policy"]
    for path in ("/static/../web.py", "/static/%2e%2e/web.py", "/page.html", "/static/"):
        assert (await page.ask(path)).status == 404


@in_virtual_time
async def test_a_peer_is_asked_whether_it_is_reachable() -> None:
    swarm = AnnouncedSwarm(loop_now)
    page = Page(swarm)
    said = await swarm.announce("a", 0, 6)
    met = (await page.ask(f"/api/v1/is_reachable/{said.peer}")).json
    assert (met["peer"], met["reachable"]) == (said.peer, True)
    assert met["rtt_ms"] >= 0
    swarm.kill("a")
    assert (await page.ask(f"/api/v1/is_reachable/{said.peer}")).json == met  # fresh enough
    await asyncio.sleep(11)
    assert (await page.ask(f"/api/v1/is_reachable/{said.peer}")).json["reachable"] is False
    stranger = Identity.from_seed("stranger").peer
    assert (await page.ask(f"/api/v1/is_reachable/{stranger}")).json["reachable"] is False


@in_virtual_time
@pytest.mark.parametrize("peer", ["x", "12D3KooWx", "<script>", "a" * 5000])
async def test_what_is_no_peer_is_refused(peer: str) -> None:
    page = Page(AnnouncedSwarm(loop_now))
    answer = await page.ask(f"/api/v1/is_reachable/{peer}")
    assert answer.status == 400
    assert peer not in answer.text or len(peer) == 1


@in_virtual_time
async def test_who_asks_too_often_must_wait_and_others_need_not() -> None:
    page = Page(AnnouncedSwarm(loop_now))
    path = f"/api/v1/is_reachable/{Identity.from_seed('nobody').peer}"
    answers = [await page.ask(path) for _ in range(30)]
    refused = [answer for answer in answers if answer.status == 429]
    assert refused
    assert 1 <= int(refused[0].headers["retry-after"]) <= 2
    assert (await page.ask(path, client="192.0.2.2")).status == 200
    await asyncio.sleep(5)
    assert (await page.ask(path)).status == 200


@in_virtual_time
async def test_many_questions_at_once_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_room, "MAX_CHECKS", 2)
    page = Page(AnnouncedSwarm(loop_now))
    peers = [Identity.from_seed(f"nobody {index}").peer for index in range(4)]
    page.swarm.network.partition(["page"], peers)
    answers = await asyncio.gather(*(page.ask(f"/api/v1/is_reachable/{peer}", client=peer) for peer in peers))
    assert sorted(answer.status for answer in answers) == [200, 200, 503, 503]


async def test_a_second_signal_ends_it_at_once() -> None:
    async def stopped_twice() -> None:
        stopping = Stopping()
        os.kill(os.getpid(), signal.SIGTERM)
        await stopping.asked.wait()
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(5)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(asyncio.CancelledError):
        await asyncio.create_task(stopped_twice())
    for one in SIGNALS:
        asyncio.get_running_loop().remove_signal_handler(one)
    signal.signal(signal.SIGINT, before)


def test_an_allowance_refills_and_forgets_the_oldest() -> None:
    allowance = Allowance(rate=0.5, burst=2)
    assert [allowance.take("a", 0.0) for _ in range(3)] == [0, 0, 2.0]
    assert allowance.take("b", 0.0) == 0
    assert allowance.take("a", 1.0) == 1.0
    assert allowance.take("a", 2.0) == 0
    assert allowance.take("a", 1.0) > 0  # a clock that goes back gives nothing
    for index in range(MAX_CLIENTS):
        allowance.take(f"c{index}", 3.0)
    assert len(allowance._buckets) == MAX_CLIENTS


@in_virtual_time
async def test_peers_are_pinged_in_turn() -> None:
    swarm = AnnouncedSwarm(loop_now)
    page = Page(swarm)
    for index in range(PER_ROUND + 6):
        await swarm.announce(f"p{index}", 0, 1)
    await page.watch.refresh()
    await page.watch.probe()
    assert sum(peer.reachable is None for peer in page.watch.state.models[0].peers) == 6
    await asyncio.sleep(1)
    await page.watch.probe()
    assert all(peer.reachable for peer in page.watch.state.models[0].peers)


@in_virtual_time
async def test_who_announces_and_does_not_serve_is_shown_as_that() -> None:
    swarm = AnnouncedSwarm(loop_now)
    page = Page(swarm)
    long = {"throughput": FIVE, "lifetime": 1000.0}
    await swarm.announce("honest", 0, 3, **long)
    await swarm.announce("liar", 0, 6, serves=False, **long)
    await swarm.announce("asleep", 0, 6, "joining", asleep=True, serves=False, lifetime=1000.0)
    async with running(page.watch):
        await asyncio.sleep(15)
        assert not any(peer.serves is False for peer in page.watch.state.models[0].peers), "one miss only"
        await asyncio.sleep(RETRY_PERIOD + 10)
        (model,) = page.watch.state.models
        assert {peer.name: peer.serves for peer in model.peers} == {
            "honest": True,
            "liar": False,
            "asleep": None,
        }
        assert all(peer.reachable for peer in model.peers)
        assert model.unreached == (Span(3, 6),)
        assert [one.name for one in page.watch.state.contributors] == ["honest"]
        assert "opens no session</strong>" in (await page.ask("/")).text
        assert "swarm_health_model_peers_not_serving" in (await page.ask("/metrics")).text
        swarm.serve("liar")
        await asyncio.sleep(RETRY_PERIOD + 10)
        assert all(peer.serves for peer in page.watch.state.models[0].peers if peer.state == "serving")


@in_virtual_time
@pytest.mark.parametrize("code", sorted(INNOCENT))
async def test_who_has_no_room_or_admits_others_serves_all_the_same(code: ErrorCode) -> None:
    swarm = AnnouncedSwarm(loop_now)
    page = Page(swarm)

    async def refuse(stream: Stream) -> None:
        calls = MessageStream(stream)
        await calls.receive()
        await calls.send(Error(code=code, message="Not now."))
        await calls.receive()

    said = await swarm.announce("a", 0, 6, lifetime=1000.0)
    await swarm.transports["a"].listen(refuse)
    await page.watch.refresh()
    for _ in range(3):
        await page.watch.inspect()
        await asyncio.sleep(PERIOD + 1)
    assert page.watch.inspections.known()[said.peer_id].serves


@in_virtual_time
async def test_few_are_inspected_at_a_time_and_each_rarely() -> None:
    swarm = AnnouncedSwarm(loop_now)
    page = Page(swarm)
    for index in range(inspecting.PER_ROUND + 3):
        await swarm.announce(f"p{index}", 0, 1, lifetime=1000.0)
    await page.watch.refresh()
    for expected in (inspecting.PER_ROUND, inspecting.PER_ROUND + 3):
        await page.watch.inspect()
        assert len(page.watch.inspections.known()) == expected
    before = page.watch.inspections.known()
    await asyncio.sleep(PERIOD / 2)
    await page.watch.inspect()
    assert page.watch.inspections.known() == before


@in_virtual_time
async def test_metrics_tell_the_state() -> None:
    swarm = AnnouncedSwarm(loop_now)
    page = Page(swarm)
    await swarm.announce("a", 0, 4, kv_tokens_left=7)
    await swarm.announce("b", 4, 6, "joining", asleep=True)
    await page.watch.refresh()
    text = (await page.ask("/metrics")).text
    told = {
        (one.name, one.labels.get("state", "")): one.value
        for family in parse_metrics(text)
        for one in family.samples
    }
    assert told["swarm_health_models", ""] == 1
    assert told["swarm_health_model_blocks_served", ""] == 4
    assert told["swarm_health_model_runs", ""] == 0
    assert told["swarm_health_model_peers", "serving"] == 1
    assert told["swarm_health_model_peers", "asleep"] == 1


EVIL = "</title><script>alert(1)</script><img src=x onerror=alert(1)>'\"&{{7*7}}"
TURNED = "\u202egnorw\u202c \u2066x\u2069 \u0000\u001b[31m\n"


class Tags(HTMLParser):
    """Collects which tags and attributes a page has."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.scripts: list[dict[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag == "script":
            self.scripts.append(dict(attrs))


def hostile_texts() -> Iterator[str]:
    yield EVIL
    yield TURNED
    yield "x" * 100
    yield "\u0300" * 100
    yield "\U0001f9d1\u200d\U0001f4bb" * 20
    yield "שלום עולם"
    yield ""


@in_virtual_time
async def test_markup_in_records_stays_text() -> None:
    swarm = AnnouncedSwarm(loop_now)
    page = Page(swarm)
    for index, text in enumerate(hostile_texts()):
        model = ModelEntry(
            model_id=f"m{index}-{EVIL}"[:128], name=text, repository=text, num_blocks=6, fingerprint=text
        )
        more = {"dtype": text, "quantization": text, "version": text, "adapters": (text,) * 16}
        await swarm.announce(f"p{index}", 0, 6, model=model, called=text, throughput=FIVE, **more)
    await page.watch.refresh()
    await page.watch.probe()
    text = (await page.ask("/")).text
    tags = Tags()
    tags.feed(text)
    assert len(page.watch.state.models) == len(list(hostile_texts()))
    assert tags.scripts == [{"src": "static/page.js", "defer": None}]
    assert "img" not in tags.tags
    assert not {name for name in tags.attributes if name.startswith("on") or name == "style"}
    assert "49" not in re.findall(r"&amp;(\d+)", text)
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u0000\u001b]", text)
    assert "\u202e" not in (await page.ask("/api/v1/state")).text
    assert (await page.ask("/metrics")).status == 200


@in_virtual_time
async def test_records_that_are_malformed_are_counted_and_break_nothing() -> None:
    swarm = AnnouncedSwarm(loop_now)
    page = Page(swarm)
    said = await swarm.announce("a", 0, 6)
    liar = Identity.from_seed("liar")
    expires_at = loop_now() + 30
    nan = msgspec.msgpack.encode(
        msgspec.to_builtins(said)
        | {
            "peer": liar.peer,
            "progress": float("nan"),
            "throughput": {"decode": float("inf"), "prefill": float("nan")},
        }
    )
    huge = msgspec.msgpack.encode(msgspec.to_builtins(said) | {"peer": liar.peer, "queue": 2**63})
    for block, body in enumerate((b"noise", huge, msgspec.msgpack.encode({"peer": "x" * 4000}), nan)):
        swarm.store.plant(
            block_key(TINY.model_id, block),
            liar.peer,
            sign(liar, block_key(TINY.model_id, block), body, expires_at).pack(),
        )
    swarm.store.plant(MODELS_KEY, liar.peer, sign(liar, MODELS_KEY, b"\xc1" * 99, expires_at).pack())
    swarm.store.plant(block_key(TINY.model_id, 5), "nobody", b"\x00" * 9000)
    await page.watch.refresh()
    state = (await page.ask("/api/v1/state")).json
    assert [peer["name"] for peer in state["models"][0]["peers"]][:1] == ["a"]
    assert state["dropped"]["bad_body"] >= 3
    assert "NaN" not in (await page.ask("/")).text
    assert "refused" in (await page.ask("/")).text


@in_virtual_time
async def test_a_page_without_models_says_so() -> None:
    page = Page(AnnouncedSwarm(loop_now))
    assert "are being read" in (await page.ask("/")).text
    await page.watch.refresh()
    assert "No server is announced" in (await page.ask("/")).text


@in_virtual_time
async def test_a_crowd_shares_lanes() -> None:
    swarm = AnnouncedSwarm(loop_now)
    page = Page(swarm)
    for index in range(400):
        await swarm.announce(f"p{index}", index % 6, index % 6 + 1, answers=False)
    await page.watch.refresh()
    (model,) = page.watch.state.models
    placed = lanes(model.peers)
    for row in {row for row, _ in placed}:
        spans = [peer.blocks for other, peer in placed if other == row and row < MAX_LANES]
        assert all(one.end <= other.start for one, other in pairwise(spans))
    drawn = map_of(model)
    assert not drawn.names
    assert len(drawn.bars) == 400
    assert len({bar.y for bar in drawn.bars}) == 67


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.254, "0.25"),
        (12.54, "13"),
        (980.4, "980"),
        (12_345, "12.3k"),
        (34e6, "34M"),
        (2e15, "2e+15"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize("blocks", [1, 5, 30, 36, 80, 126, 999, 1000])
def test_ticks_are_few_and_round(blocks: int) -> None:
    found = ticks(blocks)
    assert 1 <= len(found) <= 9
    assert found[0].text == "0"
