"""What tests of pages share: one browser for all tests of a module."""

from collections.abc import AsyncIterator
from typing import Any

import pytest_asyncio

from tests.browser import browsing


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Any]:
    async with browsing() as browser:
        yield browser
