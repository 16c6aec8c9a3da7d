"""The command's life: join the swarm, watch it, answer over HTTP, and leave when asked to.

Puts the parts together in order. What they do is not known here.
"""

import argparse
import asyncio
import signal
from contextlib import AsyncExitStack

from swarm import cli
from swarm.dht.joining import Network, join, require_peers
from swarm.errors import SwarmError
from swarm.health.history import History, default_path
from swarm.health.watch import Watch
from swarm.health.web import HealthSite
from swarm.listening import bind, serving
from swarm.net.entrance import Entrance, entrance_of

SIGNALS = (signal.SIGTERM, signal.SIGINT)


async def main(args: argparse.Namespace) -> int:
    """Serve the page until a signal.

    Raises:
        InputError: an address, the history, the host or the port cannot be used.
        SwarmError: the swarm cannot be reached, or this peer's network failed.
    """
    way_in = await asyncio.to_thread(entrance_of, args)
    require_peers(way_in)
    async with AsyncExitStack() as stack:
        bound = stack.enter_context(await asyncio.to_thread(bind, args.host, args.port))
        history = await _history(args, way_in)
        if history is not None:
            stack.push_async_callback(history.close)
        network = await _joined(stack, args, way_in)
        is_private = way_in.door.key is not None
        watch = Watch(network, way_in.addresses, history, args.period, is_private=is_private)
        site = HealthSite(watch)
        url = await stack.enter_async_context(serving(site.app, bound, site.close))
        stopping = Stopping()
        _say(args, {"event": "listening", "url": url, "peer": watch.peer}, f"Health page: {url}")
        await _watched(watch, network, stopping.asked, args)
    _say(args, {"event": "left"}, "Left the swarm.")
    return 0


async def _history(args: argparse.Namespace, way_in: Entrance) -> History | None:
    if args.history == "none":
        return None
    path = cli.file_path(args.history) if args.history else default_path(way_in.swarm)
    return await History.open(path)


async def _joined(stack: AsyncExitStack, args: argparse.Namespace, way_in: Entrance) -> Network:
    """
    Raises:
        SwarmError: the swarm was not reached in time.
    """
    with cli.Progress(quiet=args.json) as progress:
        joined = progress.stage("Joining the swarm", counted=False)
        try:
            async with asyncio.timeout(args.timeout):
                network = await join(stack, way_in, args.identity)
        except TimeoutError as error:
            raise SwarmError(
                f"The swarm was not reached within {args.timeout:g} seconds.",
                "Check the initial peers, or give more time with --timeout.",
            ) from error
        joined(1.0)
    return network


async def _watched(watch: Watch, network: Network, stop: asyncio.Event, args: argparse.Namespace) -> None:
    """Watch until `stop`.

    Raises:
        SwarmError: this peer's network failed.
    """
    async with asyncio.TaskGroup() as tasks:
        beside = [
            tasks.create_task(watch.run(), name="watch the swarm"),
            tasks.create_task(_until_failed(network), name="watch this peer's network"),
        ]
        if args.json:
            beside.append(tasks.create_task(_tell(watch), name="tell of models"))
        await stop.wait()
        for task in beside:
            task.cancel()


async def _until_failed(network: Network) -> None:
    raise await network.transport.wait_failed()


async def _tell(watch: Watch) -> None:
    """A line for each change of what models there are and whether they can be run."""
    version, told = 0, None
    while True:
        version = await watch.newer_than(version)
        models = [
            {
                "model": model.name,
                "model_id": model.model_id,
                "standing": model.standing,
                "peers": model.num_peers,
            }
            for model in watch.state.models
        ]
        if models != told and watch.records.read_at:
            cli.emit({"event": "models", "models": models})
            told = models


class Stopping:
    """`asked` is set by the first SIGTERM or SIGINT; a second one cancels the task that made this."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self._task = asyncio.current_task()
        for number in SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self.on_signal)

    def on_signal(self) -> None:
        if self.asked.is_set() and self._task is not None:
            self._task.cancel()
        self.asked.set()


def _say(args: argparse.Namespace, event: dict[str, str], text: str) -> None:
    if args.json:
        cli.emit(event)
    else:
        print(text, flush=True)
