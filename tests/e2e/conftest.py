"""What these tests share: a process to fork servers from, and one browser for all tests of a module."""

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import pytest_asyncio

from tests.browser import browsing
from tests.forks import FORKS


@pytest.fixture(scope="session", autouse=True)
def fork_server(no_process_left: None) -> Iterator[None]:
    with FORKS:
        yield


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Any]:
    async with browsing() as browser:
        yield browser
