"""`python -m swarm.demo`: a whole swarm on this machine, three servers and a client, in one command.

Owns the order of things: fetch the model, start the servers as processes of their own, join them, talk,
and end everything, whatever happened. The heavy rooms are imported when they are needed.
"""

import argparse
import asyncio
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from swarm import cli
from swarm.errors import InputError
from swarm.forking import IS_SUPPORTED, ForkServer
from swarm.importing import imported
from swarm.processes import Event, Interpreter, Launcher, ServerProcess, stop_all
from swarm.server.config import DTYPES
from swarm.spans import Span

if TYPE_CHECKING:
    from swarm.blocks.models import Model
    from swarm.client.facade import Swarm

T = TypeVar("T")

SERVERS = 3
READY_TIMEOUT = 120.0
"""Seconds that a server may take to serve, and then the client to join."""

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
LEAVING = ("draining", "left")
"""What servers say while the demo ends: the answer is to be the last line of it."""

CHAT_TEMPERATURE = 0.5


PROGRAM = "python -m swarm.demo"
EXAMPLES = cli.examples(
    ("chat", "%(prog)s"),
    ("ask one question", "%(prog)s 'What is a swarm?'"),
    ("ask what a file holds, and print events and the answer as JSON", "%(prog)s --json < question.txt"),
)


def parser(program: str = PROGRAM) -> cli.Parser:
    root = cli.Parser(
        prog=program,
        place=cli.Place("demo"),
        description="Start three servers on this machine, each with a third of a model, and talk to them.",
        epilog=EXAMPLES,
    )
    root.add_argument(
        "prompt",
        nargs="?",
        metavar="PROMPT",
        help="answer this and leave; without it, answer standard input or, in a terminal, open a chat",
    )
    root.add_argument_group("servers").add_argument(
        "--dtype", choices=DTYPES, default="auto", help="numbers to compute in (default: %(default)s)"
    )
    cli.shared_options(root, timeout=READY_TIMEOUT, joins=False)
    return root


def main(arguments: list[str] | None = None, program: str = PROGRAM) -> int:
    return cli.run(_main, parser(program).parse_args(arguments))


async def _main(args: argparse.Namespace) -> int:
    prompt = await _prompt(args.prompt)
    async with AsyncExitStack() as stack:
        with cli.Progress(quiet=args.json) as progress:
            model = await _fetch(args.model, progress)
            servers = await stack.enter_async_context(_serving(args, model, progress))
            swarm = await _while_all_run(servers, _join(args, servers[0], progress))
            stack.push_async_callback(swarm.close)
        return await _while_all_run(servers, _talk(swarm, prompt, as_json=args.json))


async def _prompt(given: str | None) -> str | None:
    """The prompt from the command line or a pipe; None means to chat.

    Raises:
        InputError: it is empty.
    """
    prompt = given
    if prompt is None:
        if sys.stdin.isatty():
            return None
        lines = await imported("swarm.client.lines")
        prompt = "".join([line async for line in lines.stream_lines(sys.stdin)]).removesuffix("\n")
    if not prompt.strip():
        raise InputError("The prompt is empty.", "Give some text, as an argument or on standard input.")
    return prompt


async def _fetch(name: str, progress: cli.Progress) -> "Model":
    """The model `name`, with all its files on this machine."""
    models = await imported("swarm.blocks.models")

    def fetch(on_stage: Callable[[str, float], None]) -> "Model":
        model: Model = models.resolve(name, on_progress=on_stage)
        model.ensure_files(Span(0, model.num_blocks), True, on_stage)
        return model

    return await cli.in_thread(
        fetch, lambda stage, fraction: progress.on_stage(f"{stage.capitalize()} {name}", fraction)
    )


def split(num_blocks: int, parts: int) -> list[Span]:
    """`num_blocks` blocks as `parts` spans of nearly the same size; fewer where there are fewer."""
    parts = min(parts, num_blocks)
    edges = [part * num_blocks // parts for part in range(parts + 1)]
    return [Span(start, end) for start, end in pairwise(edges)]


@asynccontextmanager
async def _serving(
    args: argparse.Namespace, model: "Model", progress: cli.Progress
) -> AsyncIterator[list[ServerProcess]]:
    """A server process for each third of the model, all of them serving; ended together on leaving.

    Raises:
        ProcessEnded: one of them ended, or does not serve within `args.timeout` seconds.
    """
    spans = split(model.num_blocks, SERVERS)
    with tempfile.TemporaryDirectory(prefix="swarm-demo-") as folder, _launcher() as launcher:
        servers = [
            _server(f"server-{number}", span, args, Path(folder), progress, launcher)
            for number, span in enumerate(spans, start=1)
        ]
        first, *others = servers
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(imported("swarm.client.api"), name="import the client")
                await first.start()
                peers = ["--initial-peers", *await _addresses(first, args.timeout)]
                for server in others:
                    await server.start(peers)
                for server in servers:
                    tasks.create_task(server.wait_for("serving", args.timeout), name=f"await {server.name}")
            yield servers
        finally:
            await stop_all(servers)


@contextmanager
def _launcher() -> Iterator[Launcher]:
    """Starts servers: where that can be, as forks, so that they import only once what they need."""
    environment = {"OMP_NUM_THREADS": _threads()}
    if not IS_SUPPORTED:
        yield Interpreter("swarm.server", environment)
        return
    with ForkServer("swarm.server", "swarm.server.preload", environment=environment) as fork_server:
        yield fork_server


def _threads() -> str:
    """How many threads a server computes with."""
    return str(max(1, (os.cpu_count() or 1) // SERVERS))


def _server(
    name: str,
    span: Span,
    args: argparse.Namespace,
    folder: Path,
    progress: cli.Progress,
    launcher: Launcher,
) -> ServerProcess:
    options = {
        "--model": args.model,
        "--blocks": str(span),
        "--dtype": args.dtype,
        "--threads": _threads(),
        "--host-maddrs": LOOPBACK,
        "--public-name": name,
    }
    switches = ["--exit-with-stdin", "--no-remembered-peers"]
    on_fraction = progress.stage(f"Starting {name} with blocks {span}")

    def on_event(event: Event) -> None:
        if args.json and event["event"] not in LEAVING:
            cli.emit({**event, "server": name})
        on_fraction(1.0 if event["event"] == "serving" else event.get("progress", 0.0))

    return ServerProcess(
        [part for option in options.items() for part in option] + switches,
        name=name,
        log=folder / f"{name}.log",
        on_event=on_event,
        launcher=launcher,
    )


async def _addresses(server: ServerProcess, timeout: float) -> list[str]:
    listening = await server.wait_for("listening", timeout)
    return list(listening["addresses"])


async def _join(args: argparse.Namespace, server: ServerProcess, progress: cli.Progress) -> "Swarm":
    on_fraction = progress.stage("Joining the swarm", counted=False)
    api = await imported("swarm.client.api")
    peers = await _addresses(server, args.timeout)
    swarm: Swarm = await api.connect(
        peers, args.model, timeout=args.timeout, dtype=args.dtype, remembers=False
    )
    on_fraction(1.0)
    return swarm


async def _talk(swarm: "Swarm", prompt: str | None, *, as_json: bool) -> int:
    """A chat until the user leaves it, or one answer."""
    chat = await imported("swarm.client.chat")
    if prompt is None:
        code: int = await chat.run_chat(swarm, {"temperature": CHAT_TEMPERATURE}, as_json=as_json)
        return code
    generate = await imported("swarm.client.generate")
    answer = await generate.answer(swarm, prompt, {}, as_json=as_json)
    if not as_json:
        print(chat.summary(answer), flush=True)
    return 0


async def _while_all_run(servers: Sequence[ServerProcess], work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, given up as soon as a server ends.

    Raises:
        ExceptionGroup: of a ProcessEnded, a server has ended.
    """
    async with asyncio.TaskGroup() as tasks:
        watching = [tasks.create_task(_watch(server), name=f"watch {server.name}") for server in servers]
        result = await work
        for task in watching:
            task.cancel()
    return result


async def _watch(server: ServerProcess) -> None:
    await server.wait_ended()
    raise server.failure()


if __name__ == "__main__":
    sys.exit(main())
