"""Distance on one machine: network namespaces as places, so far apart as asked.

A thread goes into a place, and what it starts there lives there: servers, and the libp2p daemon of a client,
through which all its traffic goes. The packets are carried by `benchmarks.switch`, a process of its own.
Knows nothing of swarms.
"""

import asyncio
import ctypes
import json
import os
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager

from benchmarks.switch import CLONE_NEWNET, address_of

STARTING = 20.0
"""Seconds within which the switch must have made its places."""

ENDING = 5.0


class NotAllowed(Exception):
    """This machine allows no network namespaces of our own; says why."""


class Distance:
    """Places `0 … count - 1`, all equally far from each other. `apart` makes it."""

    def __init__(self, namespaces: Sequence[int]):
        """`namespaces` are open descriptors of network namespaces."""
        self._namespaces = namespaces

    def listen_address(self, place: int) -> str:
        """Where a server at `place` listens, on a port that is free."""
        return f"/ip4/{address_of(place)}/tcp/0"

    @contextmanager
    def at(self, place: int) -> Iterator[None]:
        """Be at `place`: what this thread starts meanwhile, in any of its tasks, is there for good."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            _enter(self._namespaces[place])
            try:
                yield
            finally:
                _enter(before)
        finally:
            os.close(before)


@asynccontextmanager
async def apart(places: int, rtt_ms: float, mbit_s: float) -> AsyncIterator[Distance]:
    """`places` with `rtt_ms` between any two, each with a line of `mbit_s` megabits a second each way.

    Raises:
        NotAllowed: there can be none on this machine.
    """
    command = f"-m benchmarks.switch --peers {places} --rtt-ms {rtt_ms} --mbit-s {mbit_s}"
    pipe = asyncio.subprocess.PIPE
    switch = await asyncio.create_subprocess_exec(
        sys.executable, *command.split(), stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
    )
    try:
        with ExitStack() as stack:
            yield Distance(await _namespaces(switch, stack))
    finally:
        await _end(switch)


async def _namespaces(switch: asyncio.subprocess.Process, stack: ExitStack) -> list[int]:
    assert switch.stdout is not None
    assert switch.stderr is not None
    async with asyncio.timeout(STARTING):
        line = await switch.stdout.readline()
        if not line:
            said = (await switch.stderr.read()).decode().strip().splitlines()
            raise NotAllowed(said[-1] if said else "the switch ended without a word")
    made = json.loads(line)
    namespaces = []
    for number in made["namespaces"]:
        namespaces.append(os.open(f"/proc/{made['pid']}/fd/{number}", os.O_RDONLY))
        stack.callback(os.close, namespaces[-1])
    return namespaces


async def _end(switch: asyncio.subprocess.Process) -> None:
    """Let go of the switch, and see that it is gone."""
    assert switch.stdin is not None
    switch.stdin.close()
    try:
        async with asyncio.timeout(ENDING):
            await switch.wait()
    finally:
        if switch.returncode is None:
            switch.kill()


def _enter(namespace: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "cannot enter a network namespace")
