"""Who serves in a simulated swarm: how strong servers are, how much they hold, when they come and go.

The model. Strengths are log-uniform from 1 to 50 times the weakest's, and a server can hold 5 to 40 per cent
of the blocks, whatever its strength. All of a first crowd come within a minute; later ones come at random, so
many that as many are there as before. A server stays for a time that is log-normal with a mean of an hour.
Half of them say goodbye, the others vanish.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

WEAKEST, STRONGEST = 20.0, 50.0
"""(token, block) pairs a second of the weakest server, and how many times that the strongest computes."""

SMALLEST, LARGEST = 0.05, 0.4
MEAN_STAY, SPREAD = 3600.0, 1.0
"""Seconds that a server stays on average, and the standard deviation of their logarithm."""

POLITE = 0.5
"""The part of servers that say goodbye."""

JOINING = 60.0
"""Seconds within which the first crowd comes."""

LOADING = 2.0
"""Seconds that a block takes to load, whether from a disk or over a network."""


@dataclass(frozen=True)
class Member:
    """A server of `size` blocks and `strength` (token, block) pairs a second, from `comes` to `goes`."""

    number: int
    size: int
    strength: float
    comes: float
    goes: float
    is_polite: bool

    @property
    def name(self) -> str:
        return f"server {self.number}"

    @property
    def loading(self) -> float:
        """Seconds that its blocks take to load."""
        return LOADING * self.size


def members(
    rng: np.random.Generator,
    count: int,
    num_blocks: int,
    seconds: float,
    *,
    churns: bool = True,
    joining: float = JOINING,
) -> list[Member]:
    """All servers of a swarm of about `count` that come within so many `seconds`, in that order.

    Without churn there are exactly `count`, which stay.
    """
    times = sorted(rng.uniform(0, joining, count).tolist())
    if churns:
        times += list(_arrivals(rng, MEAN_STAY / count, joining, seconds))
    found = []
    for number, comes in enumerate(times):
        stays = float(np.exp(rng.normal(np.log(MEAN_STAY) - SPREAD**2 / 2, SPREAD)))
        found.append(
            Member(
                number=number,
                size=max(1, round(num_blocks * rng.uniform(SMALLEST, LARGEST))),
                strength=WEAKEST * float(np.exp(rng.uniform(0, np.log(STRONGEST)))),
                comes=comes,
                goes=comes + stays if churns else float("inf"),
                is_polite=bool(rng.random() < POLITE),
            )
        )
    return found


def _arrivals(rng: np.random.Generator, gap: float, start: float, end: float) -> Iterator[float]:
    at = start
    while (at := at + float(rng.exponential(gap))) < end:
        yield at
