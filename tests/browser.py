"""A headless Chromium for tests, and what no page may do in it: complain, leave its host, keep people out."""

import importlib.resources
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WIDE, NARROW = 1280, 390

AXE = """async () => (await axe.run({resultTypes: ['violations']})).violations.map(
    found => `${found.id}: ${found.nodes.map(node => node.html.slice(0, 200)).slice(0, 3).join(' ')}`)"""


@dataclass
class Reader:
    """One page that somebody reads, and all that was wrong with it so far."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)

    def listen(self) -> None:
        self.page.on("console", lambda said: said.type in ("error", "warning") and self.complain(said.text))
        self.page.on("pageerror", lambda error: self.complain(str(error)))
        self.page.on("dialog", lambda dialog: self.complain(f"dialog: {dialog.message}"))
        self.page.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))

    def complain(self, text: str) -> None:
        self.complaints.append(text)

    async def barriers(self) -> list[str]:
        """What axe-core finds that keeps people from reading the page."""
        source = importlib.resources.files("axe_playwright_python").joinpath("axe.min.js").read_text()
        await self.page.evaluate(source)
        found: list[str] = await self.page.evaluate(AXE)
        return found

    async def overflow(self) -> int:
        """Pixels by which the page is wider than its window."""
        pixels: int = await self.page.evaluate("document.documentElement.scrollWidth - innerWidth")
        return pixels


@asynccontextmanager
async def browsing() -> AsyncIterator[Any]:
    """A fresh browser. Skips the test where there is none."""
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    playwright = pytest.importorskip("playwright.async_api", reason="playwright is not installed")
    async with playwright.async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        try:
            yield browser
        finally:
            await browser.close()


@asynccontextmanager
async def reading(
    url: str, *, width: int = WIDE, scheme: str = "light", scripts: bool = True
) -> AsyncIterator[Reader]:
    """The page at `url` in a browser of its own."""
    async with (
        browsing() as browser,
        reading_in(browser, url, width=width, scheme=scheme, scripts=scripts) as reader,
    ):
        yield reader


@asynccontextmanager
async def reading_in(
    browser: Any,
    url: str,
    *,
    width: int = WIDE,
    scheme: str = "light",
    scripts: bool = True,
    before: str = "",
) -> AsyncIterator[Reader]:
    """The page at `url` as somebody reads it who was never there; the script `before` runs before it does."""
    page = await browser.new_page(
        viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=scripts
    )
    try:
        reader = Reader(page)
        reader.listen()
        await page.add_init_script(before)
        await page.goto(url)
        yield reader
    finally:
        await page.close()
