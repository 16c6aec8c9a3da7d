"""The API under random requests, made from what its OpenAPI document says."""

import pytest

from swarm.client.http.site import SiteOptions
from tests.fuzz_api import fuzz
from tests.toy_api import toy_api

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

KEY = "a-key"


def test_random_requests_break_nothing() -> None:
    with toy_api(SiteOptions(max_answers=4)) as url:
        done = fuzz(url, "-n", "20", "--phases", "coverage,fuzzing", timeout=150)
    assert done.returncode == 0, done.stdout


def test_nobody_asks_without_a_key() -> None:
    with toy_api(SiteOptions(keys=(KEY,))) as url:
        known = ["--header", f"Authorization: Bearer {KEY}"]
        done = fuzz(url, "-n", "5", "--phases", "fuzzing", *known, timeout=150)
    assert done.returncode == 0, done.stdout
