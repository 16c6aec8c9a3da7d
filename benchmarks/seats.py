"""Places in a swarm that are held by one server after another: who loses its server gets a new one.

Owns the processes, and the rule that a span never loses all who serve it. Does not know who uses them.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from benchmarks.servers import STARTING, kill, server_process
from swarm.net.transport import PeerId
from swarm.processes import Launcher, ServerProcess, stop_all
from swarm.spans import Span

LEAVING = 60.0
"""Seconds within which a server that was asked to leave must be gone."""

Start = Callable[["Seat"], ServerProcess]


class Seat:
    """A place for a server of `span`. `peer` is who serves there, None while nobody does."""

    def __init__(self, span: Span, name: str, new_server: Start):
        self.span = span
        self.name = name
        self.peer: PeerId | None = None
        self.addresses: list[str] = []
        self.servers: list[ServerProcess] = []
        self.loading_seconds: list[float] = []
        self._new_server = new_server

    async def listen(self, initial_peers: Sequence[str]) -> None:
        """Start a new server; return when it can be joined by."""
        server = self._new_server(self)
        self.servers.append(server)
        await server.start(["--initial-peers", *initial_peers] if initial_peers else ())
        self.addresses = (await server.wait_for("listening", STARTING))["addresses"]

    async def serve(self) -> None:
        """Return when the server that was started serves."""
        said = await self.servers[-1].wait_for("listening", STARTING)
        await self.servers[-1].wait_for("serving", STARTING)
        self.peer = said["peer"]

    async def end(self, *, politely: bool) -> None:
        """End the server with all it has started: at once, or by asking it to leave, which takes a while."""
        server = self.servers[-1]
        self.peer, self.addresses = None, []
        if politely:
            server.terminate()
            async with asyncio.timeout(LEAVING):
                await server.wait_ended()
            return
        kill(server)
        await server.stop()


class Seats:
    """All seats of a swarm."""

    def __init__(self, seats: Sequence[Seat]):
        self.all = seats

    @property
    def addresses(self) -> list[str]:
        """Where the swarm can be joined by now."""
        return [address for seat in self.all for address in seat.addresses]

    def can_lose(self) -> list[Seat]:
        """Seats whose span would still be served without them."""
        serving = [seat for seat in self.all if seat.peer]
        return [seat for seat in serving if any(one.span == seat.span and one is not seat for one in serving)]

    async def fill(self) -> None:
        """Put a server on every seat, by the first one. As many load at a time as there are cores."""
        first, *others = self.all
        await self.refill(first)
        turn = asyncio.Semaphore(os.cpu_count() or 1)

        async def take(seat: Seat) -> None:
            async with turn:
                await self.refill(seat)

        async with asyncio.TaskGroup() as tasks:
            for seat in others:
                tasks.create_task(take(seat), name=f"fill {seat.name}")

    async def refill(self, seat: Seat) -> None:
        """Put a new server on a seat that has lost its own; return when it serves."""
        started = time.monotonic()
        await seat.listen(self.addresses)
        await seat.serve()
        seat.loading_seconds.append(time.monotonic() - started)


@asynccontextmanager
async def seated(
    model: str,
    dtype: str,
    spans: Sequence[Span],
    logs: Path,
    *options: str,
    launcher: Launcher | None = None,
) -> AsyncIterator[Seats]:
    """A seat for each of `spans`, of which some may be the same, once all serve; logs go to `logs`."""

    def new_server(seat: Seat) -> ServerProcess:
        log = logs / f"{seat.name}-{len(seat.servers) + 1}.log"
        return server_process(model, dtype, seat.span, log, options, launcher=launcher)

    seats = Seats(
        [
            Seat(span, f"blocks-{span.start}-{span.end}-seat-{number}", new_server)
            for number, span in enumerate(spans)
        ]
    )
    try:
        await seats.fill()
        yield seats
    finally:
        await stop_all(server for seat in seats.all for server in seat.servers)
