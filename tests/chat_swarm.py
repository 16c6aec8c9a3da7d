"""The chat page of a toy swarm whose model answers what its test says, and somebody who reads it."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from swarm.client.http.site import ApiSite, SiteOptions
from swarm.listening import bind, serving
from swarm.spans import Span
from tests.browser import WIDE, Reader, reading_in
from tests.byte_tokenizer import byte_tokenizer
from tests.toy_swarm import EOS, Toy, letters, toy_swarm

HELLO = "Say hello."
GREETING = "Hello, and good morning to all of you."
LESSON = """\
# Recursion

A **recursive** function *calls itself*:

1. a base case
2. a step
   - smaller by one

```python
def factorial(n: int) -> int:
    return 1 if n < 2 else n * factorial(n - 1)  # 120
```

| Call | Returns |
|---|---:|
| `factorial(5)` | 120 |

> See [the manual](https://docs.python.org/3/) and ~~nothing else~~.
"""
MOST_LETTERS = 256
SPANS = {"ada": Span(0, 3), "bob": Span(3, 6), "cyd": Span(3, 6)}

GREEDY = """if (!localStorage["swarm.settings"]) localStorage["swarm.settings"] = '{"temperature": 0}'"""
"""What people get is the likeliest, unless they chose otherwise."""


@dataclass
class Script:
    """What the toy answers to each prompt; to others, some letters."""

    _tokens: dict[tuple[int, int], dict[str, int]] = field(default_factory=dict)
    """By the sum and the number of all tokens, the next one of each prompt whose answer comes there."""
    _prompt: str = ""

    def answer(self, prompt: str, text: str) -> None:
        """Let it answer `prompt`, as its chat template writes a conversation, with `text`."""
        tokens, begun = text.encode(), prompt.encode()
        totals = accumulate(tokens, initial=sum(begun))
        for at, (total, token) in enumerate(zip(totals, [*tokens, EOS], strict=True)):
            self._tokens.setdefault((total, len(begun) + at), {})[prompt] = token

    def next_token(self, total: int, count: int) -> int:
        """One answer is written at a time: where several come by, it is the one that was begun last."""
        found = self._tokens.get((total, count), {})
        self._prompt = next((prompt for prompt in found if len(prompt.encode()) == count), self._prompt)
        return found.get(self._prompt, letters(total, count) if count % MOST_LETTERS else EOS)


@dataclass
class Chat:
    """A chat page that somebody reads, and the swarm behind it."""

    url: str
    toy: Toy
    script: Script
    site: ApiSite
    reader: Reader

    @property
    def page(self) -> Any:
        return self.reader.page

    @property
    def answer(self) -> Any:
        """The newest one."""
        return self.page.locator(".turn").last.locator(".markdown")

    @property
    def summary(self) -> Any:
        """Of its route."""
        return self.page.locator(".turn").last.locator(".route summary")

    def shown(self, text: str) -> Any:
        """What says this in the conversation."""
        return self.page.locator("#thread").get_by_text(text)

    def button(self, name: str, **more: Any) -> Any:
        return self.page.get_by_role("button", name=name, **more)

    def pace(self, seconds: float) -> None:
        """Let a step of each server take so long."""
        for server in self.toy.servers.values():
            server.seconds = seconds

    async def send(self, text: str) -> None:
        await self.page.get_by_label("Your message").fill(text)
        await self.page.keyboard.press("Enter")

    async def begun(self) -> None:
        """Wait until something is written."""
        await self.answer.get_by_text(re.compile(".")).first.wait_for()

    async def ended(self) -> None:
        """Wait until nothing is written any more."""
        await self.page.locator("#composer:not(.answering)").wait_for()

    async def ask(self, text: str) -> str:
        await self.send(text)
        await self.ended()
        return str(await self.answer.inner_text())

    async def titles(self) -> list[str]:
        found: list[str] = await self.page.locator("#conversations .open").all_inner_texts()
        return found

    async def free(self) -> None:
        """Wait until no answer is written any more, and no server holds a session."""
        async with asyncio.timeout(5):
            while self.site.answers or any(self.toy.sessions.values()):  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    async def heard(self, text: str) -> None:
        """Wait until screen readers are told this."""
        await self.page.locator("#status", has_text=text).wait_for()


@asynccontextmanager
async def chat(
    browser: Any,
    *,
    width: int = WIDE,
    scheme: str = "light",
    before: str = GREEDY,
    site: SiteOptions | None = None,
    timeout: float = 5.0,
) -> AsyncIterator[Chat]:
    """A page on which the script `before` has run. It must not complain, nor ask another host."""
    script = Script()
    script.answer(f"u:{HELLO}\na:", GREETING)
    async with toy_swarm(SPANS, next_token=script.next_token, timeout=timeout) as toy:
        toy.ends.tokenizer = byte_tokenizer()  # type: ignore[assignment]
        api = ApiSite(toy.swarm, site)
        async with (
            serving(api.app, bind("127.0.0.1", 0)) as url,
            reading_in(browser, url, width=width, scheme=scheme, before=before) as reader,
        ):
            yield Chat(url, toy, script, api, reader)
            assert not reader.complaints
            assert reader.hosts == {url.split("/")[2]}
