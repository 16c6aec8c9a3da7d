"""The chat page in a browser: conversations, what is kept of them, settings, how it is heard."""

from typing import Any

import pytest

from tests.browser import NARROW, WIDE
from tests.chat_swarm import GREETING, HELLO, LESSON, chat

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120), pytest.mark.asyncio(loop_scope="module")]

DASH = "\N{EN DASH}"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [WIDE, NARROW])
async def test_a_conversation(browser: Any, width: int, scheme: str) -> None:
    async with chat(browser, width=width, scheme=scheme) as it:
        it.script.answer("u:Teach me.\na:", LESSON)
        it.pace(0.001)
        await it.send("Teach me.")
        await it.answer.get_by_role("heading", name="Recursion").wait_for()
        assert await it.answer.get_by_role("table").count() == 0, "it is shown while it is written"
        assert await it.page.locator("#composer.answering").count() == 1
        assert not await it.reader.barriers()
        await it.ended()
        assert await it.answer.locator("ol > li ul > li").inner_text() == "smaller by one"
        assert await it.answer.locator("pre code .word").first.inner_text() == "def"
        assert await it.answer.get_by_role("cell", name="120").count() == 1
        assert await it.answer.locator("blockquote a").get_attribute("href") == "https://docs.python.org/3/"
        assert await it.answer.locator("blockquote del").inner_text() == "nothing else"
        if width == NARROW:
            await it.summary.click()  # else it is open, beside the answer
        rows = await it.page.locator(".card tbody tr").all_inner_texts()
        assert [row.split()[:2] for row in rows] in (
            [["ada", f"0{DASH}2"], [other, f"3{DASH}5"]] for other in ("bob", "cyd")
        )
        assert all(float(row.split()[2]) == 2.0 for row in rows)
        assert await it.page.locator(".card dl").get_by_text("tokens/s").count() == 1
        assert not await it.reader.barriers()
        assert await it.reader.overflow() <= 0


async def test_code_is_copied_as_it_is(browser: Any) -> None:
    async with chat(browser) as it:
        await it.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        it.script.answer("u:Code.\na:", "Here:\n```sh\necho '<b>' && ls  # all\n```\n")
        await it.ask("Code.")
        await it.button("Copy", exact=True).click()
        await it.shown("Copied").wait_for()
        assert await it.page.evaluate("navigator.clipboard.readText()") == "echo '<b>' && ls  # all"
        await it.button("Copy answer").click()
        copied = "navigator.clipboard.readText().then(text => text.startsWith('Here:'))"
        assert await it.page.evaluate(copied)


async def test_an_answer_is_stopped_and_made_anew(browser: Any) -> None:
    async with chat(browser) as it:
        it.pace(0.01)
        await it.send("Go on.")
        await it.begun()
        await it.button("Stop").click()
        await it.shown("Stopped here.").wait_for()
        stopped = await it.answer.inner_text()
        assert stopped
        await it.free()
        it.script.answer("u:Go on.\na:", "Another one.")
        await it.button("Regenerate").click()
        await it.shown("Another one.").wait_for()
        await it.ended()
        assert await it.shown("2 of 2").count() == 1
        await it.button("Previous answer").click()
        assert await it.answer.inner_text() == stopped
        await it.button("Next answer").click()
        assert await it.answer.inner_text() == "Another one."
        await it.page.get_by_label("Your message").press("ArrowUp")
        await it.page.get_by_label("Your question").fill(HELLO)
        await it.page.keyboard.press("Enter")
        await it.shown(GREETING).wait_for()
        assert await it.page.locator(".bubble").all_inner_texts() == [HELLO]
        await it.ended()
        it.script.answer(f"u:{HELLO}\na:{GREETING}\nu:More!\na:", "That was all.")
        assert await it.ask("More!") == "That was all."


async def test_conversations_outlast_the_page(browser: Any) -> None:
    async with chat(browser) as it:
        assert await it.ask(HELLO) == GREETING
        await it.button("New conversation").click()
        await it.ask("<i>Second</i>")
        assert await it.titles() == ["<i>Second</i>", HELLO]
        await it.page.reload()
        assert await it.page.locator(".bubble").all_inner_texts() == ["<i>Second</i>"]
        await it.button(HELLO, exact=True).click()
        assert await it.answer.inner_text() == GREETING
        assert (await it.summary.inner_text()).startswith("ada → ")
        await it.page.go_back()
        await it.page.locator(".bubble", has_text="Second").wait_for()
        await it.page.locator("#conversations li", has_text=HELLO).hover()
        await it.button(f"Rename {HELLO}").click()
        await it.page.keyboard.type("Greetings")
        await it.page.keyboard.press("Enter")
        assert await it.titles() == ["<i>Second</i>", "Greetings"]
        await it.button("Delete <i>Second</i>").click()
        assert await it.titles() == ["Greetings"]
        assert await it.page.locator(".bubble").count() == 0
        await it.button("Undo").click()
        assert await it.titles() == ["<i>Second</i>", "Greetings"]
        assert await it.page.locator(".bubble").count() == 1
        await it.page.locator("#conversations li", has_text="Greetings").hover()
        await it.button("Delete Greetings").click()
        await it.page.reload()
        assert await it.titles() == ["<i>Second</i>"]


async def test_an_answer_whose_page_was_left_is_kept_as_far_as_it_came(browser: Any) -> None:
    async with chat(browser) as it:
        it.pace(0.02)
        await it.send("Go on.")
        await it.begun()
        await it.page.reload()
        await it.shown("the page was left while it was written").wait_for()
        assert await it.answer.inner_text()
        it.script.answer("u:Go on.\na:", "Now whole.")
        await it.button("Try again").click()
        await it.shown("Now whole.").wait_for()


async def test_answers_go_on_while_another_conversation_is_shown(browser: Any) -> None:
    async with chat(browser) as it:
        it.pace(0.005)
        await it.send(HELLO)
        await it.answer.get_by_text("H").wait_for()
        await it.button("New conversation").click()
        assert await it.page.locator("#conversations .busy").count() == 1
        assert await it.page.locator(".turn").count() == 0
        await it.page.locator("#conversations .busy").wait_for(state="detached")
        await it.page.locator("#conversations .open").click()
        assert await it.answer.inner_text() == GREETING


async def test_settings_reach_the_model(browser: Any) -> None:
    async with chat(browser) as it:
        assert not await it.reader.barriers()
        asked: list[Any] = []
        it.page.on(
            "request", lambda request: request.method == "POST" and asked.append(request.post_data_json)
        )
        await it.button("Settings").click()
        assert not await it.reader.barriers()
        await it.page.get_by_label("System prompt").fill("Be brief.")
        await it.page.get_by_label("Most tokens").fill("0")
        await it.button("Save").click()
        assert await it.page.get_by_role("dialog").count() == 1, "0 tokens are no answer"
        for label, value in (("Most tokens", "5"), ("Seed", "7"), ("Top-p", "0.9"), ("Top-k", "3")):
            await it.page.get_by_label(label).fill(value)
        await it.button("Save").click()
        it.script.answer(f"s:Be brief.\nu:{HELLO}\na:", GREETING)
        assert await it.ask(HELLO) == GREETING[:5]
        assert await it.shown("reached the most tokens").count() == 1
        sent = asked[-1]
        assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
        expected = {"max_tokens": 5, "seed": 7, "top_p": 0.9, "top_k": 3, "temperature": 0}
        assert {name: sent[name] for name in expected} == expected
        await it.page.reload()
        await it.button("New conversation").click()
        await it.button("Settings").click()
        assert await it.page.get_by_label("Seed").input_value() == "7"


async def test_it_is_used_by_keyboard_and_heard(browser: Any) -> None:
    async with chat(browser, width=NARROW) as it:
        await it.page.evaluate(
            "window.heard = []; const region = document.getElementById('status');"
            " new MutationObserver(() => { if (region.textContent) heard.push(region.textContent) })"
            ".observe(region, {childList: true})"
        )
        await it.page.keyboard.press("Tab")
        assert await it.page.evaluate("document.activeElement.textContent") == "Skip to your message"
        await it.page.keyboard.press("Enter")
        await it.page.keyboard.type(HELLO)
        await it.page.keyboard.press("Shift+Enter")
        await it.page.keyboard.press("Backspace")
        await it.page.keyboard.press("Enter")
        await it.ended()
        await it.page.wait_for_function("() => heard.length > 1")
        assert await it.page.evaluate("heard") == ["Answering.", f"Answer: {GREETING}"]
        assert await it.page.evaluate("document.activeElement.id") == "message"
        await it.button("Conversations").press("Enter")
        assert await it.page.evaluate("document.activeElement.id") == "close-side"
        assert not await it.reader.barriers()
        await it.page.keyboard.press("Escape")
        assert await it.page.evaluate("document.activeElement.id") == "open-side"
        it.pace(0.02)
        await it.send("Go on.")
        await it.begun()
        await it.page.keyboard.press("Escape")
        await it.shown("Stopped here.").wait_for()


async def test_two_windows_show_the_same_conversations(browser: Any) -> None:
    async with chat(browser) as it:
        async with it.page.expect_popup() as opening:
            await it.page.evaluate("void open('/')")
        other = await opening.value
        await it.ask(HELLO)
        await other.locator("#conversations .open").click()
        assert await other.locator(".markdown").inner_text() == GREETING
        await it.button(f"Delete {HELLO}").click()
        await other.locator("#conversations .open").wait_for(state="detached")
