"""The chat page in a browser when something goes wrong: servers, keys, connections, storage."""

import json
import re
from pathlib import Path
from typing import Any

import httpx2
import pytest

from swarm.client.http.site import SiteOptions
from swarm.net.messages import Error
from swarm.processes import ServerProcess, stop_all
from tests.browser import NARROW, WIDE, reading_in
from tests.chat_swarm import GREETING, HELLO, chat
from tests.forks import FORKS

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120), pytest.mark.asyncio(loop_scope="module")]

DASH = "\N{EN DASH}"


@pytest.mark.parametrize("width", [WIDE, NARROW])
async def test_a_recovery_is_shown_as_it_happens(browser: Any, width: int) -> None:
    async with chat(browser, width=width) as it:
        it.pace(0.02)
        await it.send(HELLO)
        await it.answer.get_by_text("Hel").wait_for()
        name = await it.page.locator(".card tbody tr:nth-child(2) bdi").text_content()
        [other] = {"bob", "cyd"} - {name}
        it.toy[other].refuse = [Error(code="no_capacity", message="full", retry_after=0.5)]
        it.toy[name].kill()
        looking = it.page.locator(".changes li.looking")
        await looking.wait_for()
        assert await it.page.locator(".card tbody .gone").count() == 1
        assert await looking.inner_text() == (
            f"{name} was lost: it closed the connection. Looking for another server for blocks 3{DASH}5…"
        )
        assert not await it.reader.barriers()
        await it.page.locator(".changes li.moved").wait_for()
        await it.ended()
        said = await it.page.locator(".changes li").all_inner_texts()
        assert len(said) == 1
        assert f"Blocks 3{DASH}5 moved to {other}, and the answer went on after" in said[0]
        assert await it.answer.inner_text() == GREETING
        assert "1 recovery" in await it.summary.inner_text()
        assert await it.page.locator(".card tbody tr:nth-child(2) bdi").text_content() == other
        assert not await it.reader.barriers()
        assert await it.reader.overflow() <= 0


async def test_where_nobody_takes_over_the_answer_says_so_and_stays(browser: Any) -> None:
    async with chat(browser, timeout=1.0) as it:
        it.pace(0.02)
        await it.send(HELLO)
        await it.answer.get_by_text("Hel").wait_for()
        for name in ("bob", "cyd"):
            it.toy[name].kill()
        await it.page.locator(".note.bad").wait_for()
        assert await it.page.locator(".changes li.gone").count() == 1
        assert (await it.answer.inner_text()).startswith("Hel")
        await it.button("Try again").wait_for()
        await it.heard("The answer failed.")
        assert not await it.reader.barriers()


async def test_a_key_is_asked_for_and_kept_for_the_tab(browser: Any) -> None:
    async with chat(browser, site=SiteOptions(keys=("right",))) as it:
        key = it.page.get_by_label("Key", exact=True)
        await key.fill("wrong")
        assert not await it.reader.barriers()
        await it.button("Use it").click()
        await it.page.get_by_text("The server does not know this API key.").wait_for()
        await key.fill("right")
        await it.button("Use it").click()
        await it.page.locator("#model[data-state=ready]").wait_for()
        assert await it.ask(HELLO) == GREETING
        await it.page.reload()
        assert await it.ask("And now?")
        kept = await it.page.evaluate("[localStorage['swarm.key'], sessionStorage['swarm.key']]")
        assert kept == [None, "right"]
        it.reader.complaints = [one for one in it.reader.complaints if "401" not in one]


async def test_who_must_wait_is_told_how_long(browser: Any) -> None:
    async with chat(browser, site=SiteOptions(max_answers=1)) as it, httpx2.AsyncClient() as http:
        it.pace(0.05)
        asked = {"model": "toy", "messages": [{"role": "user", "content": "Go on."}], "stream": True}
        async with http.stream("POST", f"{it.url}v1/chat/completions", json=asked):
            await it.send(HELLO)
            note = it.page.locator(".note.bad")
            await note.wait_for()
            assert await note.inner_text() == (
                "The swarm is busy. 1 answers are being written, of 1 at most. Try again in about 5 seconds."
            )
        it.pace(0.0)
        await it.free()
        await it.button("Try again").click()
        await it.shown(GREETING).wait_for()
        await it.ended()
        assert await it.page.locator(".versions").count() == 0, "what failed without a word is no version"
        it.reader.complaints = [one for one in it.reader.complaints if "429" not in one]


async def test_what_is_too_long_is_told(browser: Any) -> None:
    async with chat(browser) as it:
        await it.send("long " * 1000)
        await it.shown("This conversation is longer than the model can read.").wait_for()
        it.reader.complaints = [one for one in it.reader.complaints if "400" not in one]


async def test_what_breaks_is_told_and_what_came_stays(browser: Any) -> None:
    async with chat(browser) as it:
        begun = {"choices": [{"index": 0, "delta": {"content": "Half an"}, "finish_reason": None}]}
        half = f"data: {json.dumps(begun)}\n\n"
        await it.page.route(
            "**/v1/chat/completions",
            lambda route: route.fulfill(body=half, content_type="text/event-stream"),
            times=1,
        )
        assert await it.ask(HELLO) == "Half an"
        await it.shown("The connection broke before the answer was complete.").wait_for()
        await it.page.route("**/v1/chat/completions", lambda route: route.abort(), times=1)
        await it.button("Try again").click()
        await it.shown("The server of this page cannot be reached.").wait_for()
        await it.button("Try again").click()
        await it.shown(GREETING).wait_for()
        await it.ended()
        await it.button("Previous answer").click()
        assert await it.answer.inner_text() == "Half an"
        it.reader.complaints = [one for one in it.reader.complaints if "ERR_FAILED" not in one]


BROKEN = """
localStorage["swarm.settings"] = '{"temperature": 0, "top_p": "x", "seed": -1, "system": 5}';
localStorage["swarm.conversation.a"] = "{";
localStorage["swarm.conversation.b"] = '{"id": "b", "turns": [null, 5, {"answers": [{}, 7]}]}';
localStorage["swarm.conversation.c"] = '{"id": "other", "turns": []}';
localStorage["swarm.conversation.d"] = JSON.stringify({id: "d", turns: [{question: "old", shown: 9, answers: [
    {text: "x", pauses: ["y"], route: {hops: [{blocks: [5, 2]}, 3], changes: [{}]}}]}]});
"""


async def test_what_is_kept_may_be_nonsense(browser: Any) -> None:
    async with chat(browser, before=BROKEN) as it:
        assert sorted(await it.titles()) == ["New conversation", "old"]
        for title in ("New conversation", "old"):
            await it.page.locator("#conversations .open", has_text=title).click()
            assert await it.page.locator(".turn").count() == 1
        await it.button("New conversation", exact=True).first.click()
        assert await it.ask(HELLO) == GREETING


@pytest.mark.parametrize(
    "before",
    [
        "Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError') };",
        "for (const name of ['localStorage', 'sessionStorage'])"
        " Object.defineProperty(window, name, {get() { throw new DOMException('no', 'SecurityError') }});",
    ],
    ids=["full", "forbidden"],
)
async def test_without_storage_conversations_last_as_long_as_the_page(browser: Any, before: str) -> None:
    async with chat(browser, before=before) as it:
        await it.button("Settings").click()
        await it.page.get_by_label("Temperature").fill("0")
        await it.button("Save").click()
        assert await it.ask(HELLO) == GREETING
        await it.page.get_by_text("This browser does not keep all conversations").wait_for()
        await it.button("New conversation").first.click()
        await it.ask("Second")
        await it.button(HELLO, exact=True).click()
        assert await it.answer.inner_text() == GREETING
        assert not await it.reader.barriers()


async def test_a_server_of_a_real_swarm_is_killed_while_it_streams(browser: Any, tmp_path: Path) -> None:
    common = [
        "--dtype",
        "float16",
        "--threads",
        "1",
        "--exit-with-stdin",
        "--host-maddrs",
        "/ip4/127.0.0.1/tcp/0",
    ]
    servers = [
        ServerProcess(
            [*common, "--blocks", blocks, "--public-name", name],
            name=name,
            log=tmp_path / f"{name}.log",
            launcher=FORKS,
        )
        for name, blocks in (("first", "0:15"), ("second", "15:30"), ("third", "15:30"))
    ]
    api = ServerProcess(["serve", "--port", "0"], name="api", log=tmp_path / "api.log", module="swarm.client")
    try:
        await servers[0].start()
        peers = (await servers[0].wait_for("listening", 60))["addresses"]
        for server in servers[1:]:
            await server.start(["--initial-peers", *peers])
        for server in servers:
            await server.wait_for("serving", 60)
        await api.start(["--initial-peers", *peers])
        url = (await api.wait_for("listening", 60))["page"]
        async with reading_in(browser, url) as reader:
            page = reader.page
            await page.get_by_label("Your message").fill("Write a long story about a river.")
            await page.keyboard.press("Enter")
            await page.locator(".markdown").get_by_text(re.compile(r"\w+ \w+")).first.wait_for(timeout=60_000)
            name = await page.locator(".card tbody tr:nth-child(2) bdi").text_content()
            next(server for server in servers if server.name == name).kill()
            moved = page.locator(".changes li.moved", has_text="the answer went on after")
            await moved.wait_for(timeout=60_000)
            [other] = {"second", "third"} - {name}
            assert f"{name} was lost" in await moved.inner_text()
            assert f"Blocks 15{DASH}29 moved to {other}" in await moved.inner_text()
            length = len(await page.locator(".markdown").inner_text())
            await page.wait_for_function(
                "length => document.querySelector('.markdown').innerText.length > length + 20", arg=length
            )
            await page.get_by_role("button", name="Stop").click()
            assert not reader.complaints
            assert reader.hosts == {url.split("/")[2]}
    finally:
        await stop_all([api, *servers])
