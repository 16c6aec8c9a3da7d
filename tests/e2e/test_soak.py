"""A short soak: random sessions, intrusions and refusals against three servers, as `benchmarks.soak` does."""

import random
from pathlib import Path

import pytest

from benchmarks.soak import Soak, run
from tests.forks import FORKS

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

SECONDS = 30.0


async def test_every_answer_is_exact_and_every_page_free_again(tmp_path: Path) -> None:
    """Memory is judged by the long run: in seconds it has not settled yet."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    soak = Soak(
        seconds=SECONDS, seed=seed, guests=3, passages=4, answer_tokens=24, quiet_period=10.0, growth=0.1
    )
    summary = await run(soak, tmp_path, FORKS)
    assert not summary["broken"], summary
    assert summary["counts"]["answers"] >= 10
    assert summary["quiet_moments"] >= 2
