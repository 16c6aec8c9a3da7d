"""What the commands share: the options of an answer, joining a swarm, and showing both to a person."""

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from swarm import cli
from swarm.client.options import Options, generation_options
from swarm.client.route import NoRoute, label
from swarm.dht.joining import require_peers
from swarm.errors import SwarmError
from swarm.importing import imported
from swarm.net.entrance import entrance_of

if TYPE_CHECKING:
    from swarm.client.facade import Swarm


@asynccontextmanager
async def joined_swarm(args: argparse.Namespace) -> "AsyncIterator[Swarm]":
    """The swarm that the shared options name, joined with progress on standard error.

    Raises:
        SwarmError: see `swarm.client.api.connect`.
    """
    require_peers(await asyncio.to_thread(entrance_of, args))  # before what takes long
    with cli.Progress(quiet=args.json) as progress:
        started = progress.stage("Starting", counted=False)
        api = await imported("swarm.client.api")
        started(1.0)
        swarm: Swarm = await api.connect(
            args.initial_peers,
            args.model,
            timeout=args.timeout,
            identity=args.identity,
            swarm_key=args.swarm_key,
            allow_peers=args.allow_peers,
            block_peers=args.block_peers,
            remembers=args.remembers,
            draft_model=getattr(args, "draft_model", None),
            on_progress=Stages(progress),
            on_waiting=waiting_reporter(quiet=args.json),
            push=args.push,
            wire=args.wire,
            standby=args.standby,
            journal_memory=args.journal_memory,
            journal_disk=args.journal_disk,
            trust_first_last=args.trust_first_last,
            trust_depth=args.trust_depth,
            max_share=args.max_share,
            audit_rate=args.audit_rate,
            evidence_folder=args.evidence_folder,
        )
    async with swarm:
        yield swarm


class Stages:
    """Shows each stage of finding the model as a bar of its own."""

    def __init__(self, progress: cli.Progress):
        self._progress = progress
        self._bars: dict[str, cli.OnProgress] = {}

    def __call__(self, stage: str, fraction: float) -> None:
        if stage not in self._bars:
            self._bars[stage] = self._progress.stage(f"{stage.capitalize()} the model")
        self._bars[stage](fraction)


def answer_options(args: argparse.Namespace) -> Options:
    """The options of an answer as given on the command line, checked.

    Raises:
        InputError: a value is out of its range.
    """
    options: Options = {
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "repetition_penalty": args.repetition_penalty,
        "seed": args.seed,
        "stop": args.stop,
        "ignore_eos": getattr(args, "ignore_eos", False),
        "speculate": args.speculate,
    }
    generation_options(options)
    return options


class Screen:
    """Standard output, to which an answer is written, and standard error beside it: often one terminal."""

    def __init__(self) -> None:
        self._is_mid_line = False

    def write(self, piece: str) -> None:
        """Show what an answer goes on with."""
        print(piece, end="", flush=True)
        if piece:
            self._is_mid_line = not piece.endswith("\n")

    def end_line(self) -> None:
        print(flush=True)
        self._is_mid_line = False

    def notice(self, line: str) -> None:
        """Say something on standard error, on a line of its own."""
        if self._is_mid_line and sys.stdout.isatty():
            self.end_line()
        print(line, file=sys.stderr, flush=True)


SCREEN = Screen()
"""The one of this process."""


def waiting_reporter(*, quiet: bool = False) -> Callable[[SwarmError], None]:
    """Says on standard error why there is no route, and who is woken for it; but not each new percentage."""
    said: object = None

    def report(reason: SwarmError) -> None:
        nonlocal said
        key = (
            (reason.missing, *([server.peer for server in some] for some in (reason.loading, reason.to_wake)))
            if isinstance(reason, NoRoute)
            else reason.message
        )
        if key != said and not quiet:
            SCREEN.notice("\n".join(_news(reason)))
        said = key

    return report


def _news(reason: SwarmError) -> list[str]:
    """What is done about having no route, line by line: waking others, or waiting."""
    if isinstance(reason, NoRoute) and reason.to_wake:
        return [f"Waking blocks {server.span} at {label(server)}." for server in reason.to_wake]
    return [f"Waiting. {reason.message}"]
