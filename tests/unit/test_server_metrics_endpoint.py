"""The HTTP endpoint of the metrics: what it answers, what it refuses, and what it bears. On real sockets."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus

import h11
import pytest
import uvloop
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from swarm.errors import InputError
from swarm.server import metrics_endpoint
from swarm.server.cell import OnProgress, ShardCell
from swarm.server.metrics import Metrics
from swarm.server.metrics_endpoint import MAX_CONNECTIONS, MAX_REQUEST_BYTES, serving
from swarm.spans import Span
from tests.fake_engine import FakeEngine


def empty_cell() -> ShardCell:
    async def load(on_progress: OnProgress) -> FakeEngine:
        return FakeEngine()

    return ShardCell(Span(0, 3), load)


def metrics_of(cell: ShardCell) -> Metrics:
    return Metrics(cell, model="tiny", peer="12D3KooPeer")


@dataclass(frozen=True)
class Answer:
    """An HTTP answer, taken apart."""

    status: int
    headers: dict[str, str]
    body: str

    @classmethod
    def of(cls, raw: bytes) -> "Answer":
        head, _, body = raw.decode().partition("\r\n\r\n")
        first, *lines = head.split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        assert headers["connection"] == "close"
        return cls(int(first.split()[1]), headers, body)

    @property
    def type(self) -> str:
        return self.headers["content-type"]


@dataclass(frozen=True)
class Connection:
    """A client's end of one connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def rest(self) -> bytes:
        """What still comes until the end of the connection."""
        try:
            async with asyncio.timeout(5):
                return await self.reader.read()
        except ConnectionResetError:
            return b""


@dataclass(frozen=True)
class Pages:
    """A client of the endpoint at `port`. Every answer ends with the connection."""

    port: int

    @asynccontextmanager
    async def connect(self) -> AsyncIterator["Connection"]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            yield Connection(reader, writer)
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    async def send(self, request: bytes) -> bytes:
        """What comes back for raw bytes."""
        async with self.connect() as connection:
            connection.writer.write(request)
            return await connection.rest()

    async def get(self, path: str, *headers: str, method: str = "GET") -> Answer:
        lines = [f"{method} {path} HTTP/1.1", "Host: here", *headers]
        return Answer.of(await self.send("\r\n".join([*lines, "", ""]).encode()))


@asynccontextmanager
async def serving_pages(metrics: Metrics | None = None) -> AsyncIterator[Pages]:
    async with serving(metrics or metrics_of(empty_cell()), 0) as url:
        yield Pages(int(url.removeprefix("http://127.0.0.1:").removesuffix("/metrics")))


async def test_a_scrape_can_be_read_in_both_formats() -> None:
    metrics = metrics_of(empty_cell())
    names = {family.name for family in metrics.registry.collect()}
    accept = "Accept: application/openmetrics-text;version=1.0.0,text/plain;q=0.5"
    async with serving_pages(metrics) as pages:
        plain, modern = await pages.get("/metrics"), await pages.get("/metrics", accept)
    assert plain.type == "text/plain; version=0.0.4; charset=utf-8"
    assert modern.type == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    assert {family.name for family in parse_openmetrics(modern.body)} == names
    assert {family.name.removesuffix("_info") for family in parse_text(plain.body)} >= names


async def test_the_shard_is_told_as_json() -> None:
    cell = empty_cell()
    async with serving_pages(metrics_of(cell)) as pages:
        await cell.fill()
        answer = await pages.get("/shard?now")
    assert (answer.status, answer.type) == (200, "application/json")
    told = json.loads(answer.body)
    assert (told["span"], told["loaded"], told["bytes"]) == ([0, 3], [0, 3], 1_000_000)
    assert (told["dtype"], told["state"], told["asleep"]) == ("float16", "serving", False)


async def test_who_leaves_is_not_healthy() -> None:
    cell = empty_cell()
    async with serving_pages(metrics_of(cell)) as pages:
        assert (await pages.get("/healthz")).body == "joining\n"
        await cell.fill()
        assert (await pages.get("/healthz")).status == 200
        cell.move("draining")
        answer = await pages.get("/healthz")
    assert (answer.status, answer.body) == (503, "draining\n")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/metrics/", 404),
        ("GET", "/%6detrics", 404),
        ("GET", "http://here/metrics", 404),
        ("POST", "/nowhere", 404),
        ("POST", "/metrics", 405),
        ("DELETE", "/shard", 405),
        ("OPTIONS", "/healthz", 405),
    ],
)
async def test_what_is_not_there_and_what_cannot_be_done(method: str, path: str, status: int) -> None:
    async with serving_pages() as pages:
        answer = await pages.get(path, method=method)
    assert answer.status == status
    assert answer.headers.get("allow") == ("GET, HEAD" if status == 405 else None)
    assert int(answer.headers["content-length"]) == len(answer.body)


async def test_head_has_no_body() -> None:
    async with serving_pages() as pages:
        answer = await pages.get("/shard", method="HEAD")
        whole = await pages.get("/shard")
    assert (answer.status, answer.body) == (200, "")
    assert answer.headers == whole.headers


async def test_an_old_client_is_answered() -> None:
    async with serving_pages() as pages:
        assert Answer.of(await pages.send(b"GET /healthz HTTP/1.0\r\n\r\n")).status == 200


@pytest.mark.parametrize(
    "accepted",
    ["", "*/*", "text/plain;version=x", "application/json", "\xff" * 100, "text/plain;version=1.0.0"],
)
async def test_whatever_is_accepted_metrics_are_given(accepted: str) -> None:
    async with serving_pages() as pages:
        raw = await pages.send(
            b"GET /metrics HTTP/1.1\r\nHost: a\r\nAccept: %b\r\n\r\n" % accepted.encode("latin1")
        )
    assert "swarm_sessions" in {family.name for family in parse_text(Answer.of(raw).body)}


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 a TLS hello\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n", 400),
        (b"GET  /metrics\r\n\r\n", 400),
        (b"\x00" * 100 + b"\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 2 * MAX_REQUEST_BYTES, 431),
        (b"G" * 2 * MAX_REQUEST_BYTES, 431),
    ],
)
async def test_what_is_no_request_is_told_so(request_bytes: bytes, status: int) -> None:
    async with serving_pages() as pages:
        assert Answer.of(await pages.send(request_bytes)).status == status
        assert (await pages.get("/healthz")).status == 200


@pytest.mark.parametrize(("begun", "status"), [(b"GET /metrics HTTP/1.1\r\nHost:", 400), (b"", None)])
async def test_a_connection_may_end_before_the_request(begun: bytes, status: int | None) -> None:
    async with serving_pages() as pages, pages.connect() as connection:
        connection.writer.write(begun)
        connection.writer.write_eof()
        answer = await connection.rest()
    assert (Answer.of(answer).status if answer else None) == status


async def test_who_never_ends_a_request_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_endpoint, "DEADLINE", 0.02)
    async with serving_pages() as pages:
        assert await pages.send(b"GET /metrics HTTP/1.1\r\n") == b""


async def test_who_does_not_read_the_answer_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = asyncio.Event()

    def huge_page(request: h11.Request, metrics: Metrics) -> metrics_endpoint.Page:
        asked.set()
        return metrics_endpoint.Page(HTTPStatus.OK, "text/plain", bytes(20_000_000))

    monkeypatch.setattr(metrics_endpoint, "DEADLINE", 0.05)
    monkeypatch.setitem(metrics_endpoint.PAGES, "/huge", huge_page)
    async with serving_pages() as pages, pages.connect() as connection:
        connection.writer.transport.pause_reading()  # type: ignore[attr-defined]
        connection.writer.write(b"GET /huge HTTP/1.1\r\nHost: a\r\n\r\n")
        await asked.wait()
        answering = [task for task in asyncio.all_tasks() if task.get_name() == "answer a metrics request"]
        await asyncio.wait(answering, timeout=5)
        assert all(task.done() for task in answering)


async def test_a_fault_of_our_own_is_owned(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = metrics_of(empty_cell())
    monkeypatch.setattr(metrics.cell, "view", lambda: 1 / 0)
    async with serving_pages(metrics) as pages:
        assert [(await pages.get(path)).status for path in ("/shard", "/metrics")] == [500, 500]
    assert "ZeroDivisionError" in caplog.text


async def test_there_are_so_many_connections_and_no_more() -> None:
    async with serving_pages() as pages, AsyncExitStack() as stack:
        held = [await stack.enter_async_context(pages.connect()) for _ in range(MAX_CONNECTIONS)]
        assert await pages.send(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n") == b""
        for connection in held:
            connection.writer.write_eof()
            await connection.rest()
        assert (await pages.get("/healthz")).status == 200


async def test_leaving_ends_what_is_open_and_gives_the_port_back() -> None:
    before = asyncio.all_tasks()
    async with AsyncExitStack() as stack:
        async with serving_pages() as pages:
            connection = await stack.enter_async_context(pages.connect())
            connection.writer.write(b"GET /metrics HTTP/1.1\r\n")
            assert (await pages.get("/healthz")).status == 200
        assert await connection.rest() == b""
    assert asyncio.all_tasks() == before
    async with serving(metrics_of(empty_cell()), pages.port):
        pass


async def test_a_port_in_use_is_told_in_a_sentence() -> None:
    async with serving_pages() as pages:
        with pytest.raises(InputError, match=f"port {pages.port}: another program uses it") as caught:
            async with serving(metrics_of(empty_cell()), pages.port):
                pass
    assert "--metrics-port" in caught.value.hint


@pytest.mark.parametrize("port", [-1, 65536, 70000])
async def test_no_port_at_all(port: int) -> None:
    with pytest.raises(InputError, match=f"port {port}: ports go from 1 to 65535"):
        async with serving(metrics_of(empty_cell()), port):
            pass


async def test_the_event_loop_is_watched_while_the_endpoint_is_there() -> None:
    def watchers() -> list[str]:
        return [task.get_name() for task in asyncio.all_tasks() if "watch" in task.get_name()]

    async with serving_pages():
        assert watchers() == ["watch the event loop"]
    assert not watchers()


def test_it_runs_on_uvloop_too() -> None:
    async def scrape() -> tuple[Answer, Answer]:
        async with serving_pages() as pages:
            with pytest.raises(InputError):
                async with serving(metrics_of(empty_cell()), pages.port):
                    pass
            return await pages.get("/metrics"), Answer.of(await pages.send(b"nonsense\r\n\r\n"))

    good, bad = uvloop.run(scrape())
    assert (good.status, bad.status) == (200, 400)
