"""Servers as processes that choose their blocks: they cover all of them, and again when a third is killed."""

import random
from pathlib import Path

import pytest

from benchmarks.arrange import Plan, run
from tests.forks import FORKS

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

SIZES = (8, 10, 12, 14, 15, 16)
"""Blocks of each server, of a model of 30: any four of them can hold all."""


async def test_a_third_is_killed_and_the_others_take_over_while_a_chat_goes_on(tmp_path: Path) -> None:
    """The short form of `python -m benchmarks.arrange`, which takes twelve, and judges how fast it goes."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    plan = Plan("smollm2-135m", SIZES, seed=seed, killed=2, tokens=24, before=2.0)
    found = await run(plan, tmp_path, FORKS)
    assert not found["broken"], found
    assert found["moves"] or not found["hole"], found
    assert found["answers"] >= 2
