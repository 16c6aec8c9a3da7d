"""`python -m swarm.health` beside real servers: what it tells and shows as they join, load and die."""

import asyncio
import itertools
import json
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import psutil
import pytest
import pytest_asyncio

from swarm.dht.announcement import ModelEntry, Throughput
from swarm.health.watch import Watch
from swarm.health.web import HealthSite
from swarm.listening import bind, serving
from swarm.net.identity import Identity
from swarm.processes import ServerProcess
from tests.browser import NARROW, WIDE, reading
from tests.health_swarm import AnnouncedSwarm
from tests.tiny import tiny_checkpoint

pytestmark = pytest.mark.e2e
in_module_loop = pytest.mark.asyncio(loop_scope="module")

START = 60.0
"""Seconds that a start may take on a busy machine where its speed is not what is tested."""

GONE_WITHIN = 45.0
"""Seconds after which a server that was killed is no longer announced, with time for reading."""

LEFT_WITHIN = 10.0
LOCAL = ("--host-maddrs", "/ip4/127.0.0.1/tcp/0", "--threads", "1")
NOBODY = f"/ip4/127.0.0.1/tcp/9/p2p/{Identity.from_seed('nobody').peer}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_checkpoint(folder)
    return folder


def server(tmp_path: Path, checkpoint: Path, name: str, blocks: str, *more: str) -> ServerProcess:
    asked = ["--model", str(checkpoint), "--blocks", blocks, "--public-name", name, *LOCAL, *more]
    return ServerProcess(asked, name=name, log=tmp_path / f"{name}.log")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def first(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> AsyncIterator[ServerProcess]:
    """A server of some blocks, which all tests leave in peace."""
    async with server(tmp_path_factory.mktemp("first"), checkpoint, "first", "0:2") as started:
        yield started


@asynccontextmanager
async def health(tmp_path: Path, address: str, *more: str) -> AsyncIterator[tuple[ServerProcess, str]]:
    """A health page, and its URL."""
    asked = ["--initial-peers", address, "--port", "0", "--period", "0.5", *more]
    if "--history" not in more:
        asked += ["--history", str(tmp_path / "history.sqlite")]
    async with ServerProcess(
        asked, name="health", log=tmp_path / "health.log", module="swarm.health"
    ) as page:
        yield page, str((await page.wait_for("listening", START))["url"])


@asynccontextmanager
async def beside(tmp_path: Path, first: ServerProcess) -> AsyncIterator[tuple[ServerProcess, str]]:
    """A health page of the swarm that `first` is in, without a history."""
    async with health(tmp_path, await address_of(first), "--history", "none") as page:
        yield page


async def address_of(started: ServerProcess) -> str:
    return str((await started.wait_for("listening", START))["addresses"][0])


async def ask(url: str) -> Any:
    def read() -> Any:
        with urlopen(url, timeout=20) as answer:
            return json.load(answer)

    return await asyncio.to_thread(read)


async def until(url: str, is_so: Callable[[Any], bool], timeout: float = START) -> Any:
    """The model in the page's state, once it `is_so`."""
    model = None
    try:
        async with asyncio.timeout(timeout):
            while True:
                models = (await ask(f"{url}api/v1/state"))["models"]
                model = models[0] if models else None
                if model is not None and is_so(model):
                    return model
                await asyncio.sleep(0.1)
    except TimeoutError:
        pytest.fail(f"the state stayed as it is: {model}")


def state_of(model: Any, name: str) -> str | None:
    return next((peer["state"] for peer in model["peers"] if peer["name"] == name), None)


@in_module_loop
async def test_it_tells_of_servers_that_join_and_die(
    tmp_path: Path, checkpoint: Path, first: ServerProcess
) -> None:
    address = await address_of(first)
    async with health(tmp_path, address) as (page, url):
        model = await until(url, lambda model: state_of(model, "first") == "serving")
        blocks = model["num_blocks"]
        assert (model["standing"], model["missing"]) == ("incomplete", [[2, blocks]])
        assert f"--blocks 2:{blocks} --initial-peers {address}" in model["help"]["command"]
        async with server(
            tmp_path, checkpoint, "second", f"2:{blocks}", "--initial-peers", address
        ) as second:
            model = await until(url, lambda model: state_of(model, "second") == "joining")
            assert model["standing"] == "joining"
            model = await until(url, lambda model: model["standing"] == "runs")
            assert model["tokens_per_s"] > 0
            assert model["kv_tokens_left"] > 0
            await until(url, lambda model: all(peer["reachable"] for peer in model["peers"]))
            peer = (await second.wait_for("listening", START))["peer"]
            reach = await ask(f"{url}api/v1/is_reachable/{peer}")
            assert (reach["reachable"], reach["peer"]) == (True, peer)
            second.kill()
            await until(url, lambda model: model["unreached"] == [[2, blocks]])
            model = await until(url, lambda model: state_of(model, "second") is None, GONE_WITHIN)
            assert model["standing"] == "incomplete"
        standings = [event["models"][0]["standing"] for event in page.events if event.get("models")]
        assert [standing for standing, _ in itertools.groupby(standings)][-4:] == [
            "incomplete",
            "joining",
            "runs",
            "incomplete",
        ]


@in_module_loop
async def test_a_browser_shows_it_live(tmp_path: Path, checkpoint: Path, first: ServerProcess) -> None:
    address = await address_of(first)
    async with health(tmp_path, address) as (_, url), reading(url) as reader:
        page = reader.page
        await page.get_by_text("Nobody serves").wait_for(timeout=START * 1000)
        await page.get_by_text("Live", exact=True).wait_for(timeout=START * 1000)
        await page.evaluate("window.isTheSamePage = true")
        async with server(tmp_path, checkpoint, "second", "2:4", "--initial-peers", address) as second:
            row = page.locator("tbody tr", has_text="second")
            await row.get_by_text("joining").wait_for(timeout=START * 1000)
            await row.get_by_text("serving").wait_for(timeout=START * 1000)
            await page.locator(".standing.runs, .standing.incomplete").first.wait_for(timeout=START * 1000)
            second.kill()
            await row.get_by_text("not reached").wait_for(timeout=START * 1000)
            await row.wait_for(state="detached", timeout=GONE_WITHIN * 1000)
        assert await page.evaluate("window.isTheSamePage")
        assert not reader.complaints
        assert reader.hosts == {url.split("/")[2]}


@in_module_loop
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_it_leaves_when_asked_though_somebody_reads(
    tmp_path: Path, first: ServerProcess, number: signal.Signals
) -> None:
    async with beside(tmp_path, first) as (page, url):
        with await asyncio.to_thread(urlopen, f"{url}api/v1/events", timeout=20) as news:
            assert await asyncio.to_thread(news.readline) == b"retry: 3000\n"
            daemons = psutil.Process(page.pid).children(recursive=True)
            assert daemons
            asked = time.monotonic()
            psutil.Process(page.pid).send_signal(number)
            assert await page.wait_ended() == 0
            assert time.monotonic() - asked < LEFT_WITHIN
        assert page.events[-1] == {"event": "left"}
        assert not any(daemon.is_running() for daemon in daemons)
        assert page.log_tail() == ""


@in_module_loop
async def test_its_network_dying_ends_it(tmp_path: Path, first: ServerProcess) -> None:
    async with beside(tmp_path, first) as (page, _):
        (daemon,) = psutil.Process(page.pid).children()
        daemon.kill()
        assert await page.wait_ended() == 1
        assert page.log_tail().startswith("error: ")


def run(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "swarm.health", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def test_wrong_options_are_refused_in_a_sentence(tmp_path: Path) -> None:
    noise = tmp_path / "noise"
    noise.write_text("no database " * 500)
    other = tmp_path / "other"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE recipes (name)")
    connection.close()
    for arguments in (
        [],
        ["--initial-peers", "nonsense"],
        ["--initial-peers", NOBODY, "--port", "70000"],
        ["--initial-peers", NOBODY, "--period", "0.01"],
        ["--initial-peers", NOBODY, "--timeout", "soon"],
        ["--initial-peers", NOBODY, "--history", str(noise)],
        ["--initial-peers", NOBODY, "--history", str(other)],
        ["--initial-peers", NOBODY, "--model", "x"],
    ):
        done = run(*arguments)
        assert done.returncode == 2, (arguments, done.stderr)
        assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["error", "hint"], done.stderr


def test_a_swarm_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    done = run("--initial-peers", NOBODY, "--history", "none", "--json", "--timeout", "8")
    assert done.returncode == 1
    assert json.loads(done.stdout.splitlines()[-1])["event"] == "error"
    assert "Traceback" not in done.stderr


def test_a_place_where_it_cannot_listen_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run("--initial-peers", NOBODY, "--history", "none", "--port", port)
    assert done.returncode == 2
    assert f"port {port}: another program uses it" in done.stderr
    done = run("--initial-peers", NOBODY, "--history", "none", "--host", "192.0.2.1")
    assert done.returncode == 2
    assert "192.0.2.1" in done.stderr


MODELS = [
    ModelEntry(model_id=f"m{index}", name=f"model {index}", num_blocks=80, fingerprint="f")
    for index in range(100)
]
EVIL = "</script><img src=x onerror=alert(1)><b>\u202e"


@asynccontextmanager
async def watched(swarm: AnnouncedSwarm) -> AsyncIterator[tuple[str, Watch]]:
    """The page of a swarm of announcements on a real socket: its URL, and what makes its news."""
    watch = Watch(swarm.access(), [NOBODY])
    site = HealthSite(watch)
    async with serving(site.app, bind("127.0.0.1", 0), site.close) as url:
        await watch.refresh()
        yield url, watch


@asynccontextmanager
async def shown(swarm: AnnouncedSwarm) -> AsyncIterator[str]:
    async with watched(swarm) as (url, _):
        yield url


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [WIDE, NARROW])
async def test_everybody_can_read_it_whatever_peers_say(width: int, scheme: str) -> None:
    swarm = AnnouncedSwarm(time.time)
    evil = ModelEntry(model_id=EVIL[:-1], name=EVIL, repository=EVIL * 5, num_blocks=9, fingerprint="f")
    huge = Throughput(decode=1e12, prefill=1e12, network=1e12)
    for index, name in enumerate(("plain", EVIL, "x" * 100, "\u0300" * 100, "שלום", "W" * 100)):
        states = {"queue": 2**40, "kv_tokens_left": 2**40, "version": EVIL, "dtype": "d" * 100}
        await swarm.announce(
            f"p{index}", index, index + 2, called=name, model=evil, throughput=huge, **states
        )
    await swarm.announce("a", 0, 4, model=MODELS[0], throughput=Throughput(decode=9.0))
    await swarm.announce("b", 4, 9, "joining", model=MODELS[0], progress=0.3)
    await swarm.announce("c", 9, 40, "draining", model=MODELS[0])
    await swarm.announce("d", 40, 70, "joining", model=MODELS[0], asleep=True)
    async with shown(swarm) as url, reading(url, width=width, scheme=scheme) as reader:
        await reader.page.get_by_text("Live", exact=True).wait_for()
        assert not await reader.barriers()
        assert await reader.overflow() <= 0
        assert not reader.complaints
        assert reader.hosts == {url.split("/")[2]}


async def test_it_can_be_read_without_scripts() -> None:
    swarm = AnnouncedSwarm(time.time)
    await swarm.announce("lonely", 0, 4)
    async with shown(swarm) as url, reading(url, scripts=False) as reader:
        assert await reader.page.locator("tbody tr", has_text="lonely").count() == 1
        assert await reader.page.get_by_text("Nobody serves blocks 4 to 5.").count() == 1
        assert await reader.page.locator("button:visible").count() == 0


@pytest.mark.parametrize("models", [1, 100])
async def test_a_crowd_is_shown_soon(models: int) -> None:
    swarm = AnnouncedSwarm(time.time)
    for index in range(2_000):
        start = index // models * 4 % 76
        model = MODELS[index % models]
        await swarm.announce(f"peer {index}", start, start + 4, model=model, lifetime=600, answers=False)
    async with shown(swarm) as url, reading(url) as reader:
        timing = json.loads(
            await reader.page.evaluate("JSON.stringify(performance.getEntriesByType('navigation')[0])")
        )
        assert timing["domContentLoadedEventEnd"] < 5_000
        assert await reader.page.locator("section.model").count() == models
        assert not reader.complaints


async def test_a_page_that_loses_its_server_says_so_and_comes_back(free_port: int) -> None:
    swarm = AnnouncedSwarm(time.time)
    await swarm.announce("a", 0, 4)
    watch = Watch(swarm.access(), [NOBODY])
    await watch.refresh()
    site = HealthSite(watch)
    async with serving(site.app, bind("127.0.0.1", free_port), site.close) as url:
        browser = reading(url)
        reader = await browser.__aenter__()
        await reader.page.get_by_text("Live", exact=True).wait_for()
    try:
        await reader.page.get_by_text("Connection lost").wait_for()
        await swarm.announce("newcomer", 4, 6)
        await watch.refresh()
        site = HealthSite(watch)
        async with serving(site.app, bind("127.0.0.1", free_port), site.close):
            await reader.page.get_by_text("Live", exact=True).wait_for()
            await reader.page.locator("tbody tr", has_text="newcomer").wait_for()
    finally:
        await browser.__aexit__(None, None, None)


async def test_a_page_that_gets_no_news_asks_for_it() -> None:
    swarm = AnnouncedSwarm(time.time)
    async with watched(swarm) as (url, watch), reading("about:blank") as reader:
        await reader.page.route("**/api/v1/events", lambda route: route.abort())
        await reader.page.goto(url)
        await reader.page.get_by_text("Connection lost").wait_for()
        await swarm.announce("newcomer", 0, 6)
        await watch.refresh()
        await reader.page.get_by_text("Asking every 10 seconds").wait_for()
        assert await reader.page.locator("tbody tr", has_text="newcomer").count() == 1


async def test_what_a_reader_does_outlasts_news() -> None:
    swarm = AnnouncedSwarm(time.time)
    for index in range(40):
        await swarm.announce(f"peer {index}", 0, 5, answers=False)
    async with watched(swarm) as (url, watch), reading(url) as reader:
        page = reader.page
        await page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        await page.get_by_text("Live", exact=True).wait_for()
        assert await page.locator("tbody tr:visible").count() == 0
        await page.locator("summary").press("Enter")
        assert await page.locator("tbody tr:visible").count() == 40
        await swarm.announce("newcomer", 5, 6, answers=False)
        await watch.refresh()
        await page.locator("tbody tr", has_text="newcomer").wait_for()
        assert await page.locator("tbody tr:visible").count() == 41
        assert await page.evaluate("document.activeElement.nodeName") == "SUMMARY"
        await page.get_by_role("button", name="Copy").click()
        await page.get_by_text("Copied").wait_for()
        copied = await page.evaluate("navigator.clipboard.readText()")
        assert copied == watch.state.models[0].help.command
        assert not reader.complaints


async def test_strangers_are_slowed_down() -> None:
    swarm = AnnouncedSwarm(time.time)
    async with shown(swarm) as url:
        codes = []
        for _ in range(15):
            try:
                await ask(f"{url}api/v1/is_reachable/{Identity.from_seed('nobody').peer}")
                codes.append(200)
            except HTTPError as error:
                error.close()
                codes.append(error.code)
    assert set(codes) == {200, 429}
