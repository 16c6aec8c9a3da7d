"""How well the blocks of a model are held: counts, rates and the span that needs help most. Pure.

Works on arrays with one number a block. Knows announcements; not how they are read or shown.
"""

import shlex
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from swarm.dht.announcement import Announcement
from swarm.net.addresses import outward
from swarm.spans import Span

PerBlock = NDArray[np.float64]

COMING = frozenset(("serving", "joining"))
LEAST_RATE, MOST_RATE = 1e-6, 1e12

SHOWN_ADDRESSES = 3
"""Initial peers that a command names: more than one, so that it works while one of them is away."""


class Run(NamedTuple):
    """Blocks `start` to `end - 1` are held by so many each."""

    start: int
    end: int
    copies: int


def per_block(
    servers: Iterable[Announcement], num_blocks: int, value: Callable[[Announcement], float]
) -> PerBlock:
    """For each block the sum of `value` over the servers that hold it, in the shape [num_blocks]."""
    sums = np.zeros(num_blocks)
    for server in servers:
        sums[server.start : server.end] += value(server)
    return sums


def copies(servers: Iterable[Announcement], num_blocks: int) -> PerBlock:
    """For each block, how many of `servers` hold it."""
    return per_block(servers, num_blocks, lambda server: 1.0)


def block_rate(server: Announcement) -> float:
    """The decode throughput that a server announces, 0 if that is no rate that a machine can have."""
    rate = server.throughput.decode
    return rate if LEAST_RATE <= rate <= MOST_RATE else 0.0


def token_rate(server: Announcement) -> float:
    """Tokens a second that a server decodes through all of its span."""
    return block_rate(server) / server.span.size


def capacity(servers: Iterable[Announcement], num_blocks: int) -> float:
    """Tokens a second of all sessions together, through the block where `servers` do least."""
    return float(per_block(servers, num_blocks, token_rate).min())


def stream_rate(servers: Iterable[Announcement], num_blocks: int) -> float:
    """Tokens a second of one session where nobody waits and no distance counts; 0 if a block has nobody."""
    fastest = np.zeros(num_blocks)
    for server in servers:
        held = fastest[server.start : server.end]
        np.maximum(held, block_rate(server), out=held)
    return float(1 / (1 / fastest).sum()) if fastest.min() > 0 else 0.0


def runs(held: PerBlock) -> list[Run]:
    """Neighbouring blocks that are held equally often, together."""
    found = []
    for count, blocks in groupby(range(len(held)), key=lambda block: int(held[block])):
        listed = list(blocks)
        found.append(Run(listed[0], listed[-1] + 1, count))
    return found


def gaps(held: PerBlock) -> list[Span]:
    """The spans that nobody holds."""
    return [Span(run.start, run.end) for run in runs(held) if run.copies == 0]


def neediest(servers: Sequence[Announcement], num_blocks: int) -> Span:
    """The span where one more server helps most.

    The longest of those that are held by the fewest who serve or load, and of these the slowest blocks.
    """
    helping = [server for server in servers if server.state in COMING]
    held = copies(helping, num_blocks)
    rate = per_block(helping, num_blocks, token_rate)
    least = held.min()
    slowest = rate[held == least].min()
    wanted = (held == least) & (rate == slowest)
    spans = [Span(run.start, run.end) for run in runs(wanted.astype(float)) if run.copies]
    return max(spans, key=lambda span: (span.size, -span.start))


def joining_command(model: str, span: Span, addresses: Sequence[str], *, is_private: bool = False) -> str:
    """What a person pastes into a shell to serve `span`. `model` is a stranger's word, and quoted.

    The key of a private swarm is not in it: it is for who has its file.
    """
    peers = " ".join(map(shlex.quote, outward(addresses)[:SHOWN_ADDRESSES]))
    name = shlex.quote(model)
    given = f"--model={name}" if model.startswith("-") else f"--model {name}"
    key = " --swarm-key FILE" if is_private else ""
    joining = f" --initial-peers {peers}" if peers else ""
    return f"python -m swarm.server {given} --blocks {span}{key}{joining}"
