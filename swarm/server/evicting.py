"""When a server lets its shard go: on request, by a signal, and after long idleness.

How it does so is the server's business.
"""

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from swarm.server.server import Server

SIGNAL = signal.SIGUSR1


@contextmanager
def requests() -> Iterator[asyncio.Event]:
    """An event that is set whenever this process gets `SIGNAL`. Used inside a running event loop."""
    asked, loop = asyncio.Event(), asyncio.get_running_loop()
    loop.add_signal_handler(SIGNAL, asked.set)
    try:
        yield asked
    finally:
        loop.remove_signal_handler(SIGNAL)
        signal.signal(SIGNAL, signal.SIG_IGN)  # by default it would end this process, which is about to leave


async def evict_on_request(server: Server, asked: asyncio.Event) -> None:
    """Evict whenever `asked` is set; while there is nothing to evict, it is in vain. Runs until cancelled."""
    while True:
        await asked.wait()
        asked.clear()
        await server.evict()


async def evict_when_idle(server: Server, after: float) -> None:
    """Evict once the server has served for `after` seconds without an open session. Runs until cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        since = server.idle_since
        left = after if since is None else since + after - loop.time()
        if left <= 0:
            await server.evict()
        else:
            await asyncio.sleep(left)
