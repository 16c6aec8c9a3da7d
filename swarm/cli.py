"""What every command shares: its command line, its life from start to exit code, JSON lines, logs, progress.

Imports nothing heavy, so that `--help` answers at once, and knows no room: a command hands its
coroutine to `run` and gets an exit code back.
"""

import argparse
import asyncio
import json
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Coroutine
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, Self, TypeVar

from swarm.configuring import Place
from swarm.errors import SwarmError
from swarm.help_text import examples
from swarm.importing import importing_for_good
from swarm.option_values import (
    addresses,
    count,
    duration,
    file_path,
    number,
    port,
    room,
    size,
    whole_number,
)
from swarm.parsing import DEFAULT_MODEL, Parser, shared_options

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

__all__ = [
    "DEFAULT_MODEL",
    "CommandMain",
    "OnProgress",
    "Parser",
    "Place",
    "Progress",
    "addresses",
    "configure_logging",
    "count",
    "duration",
    "emit",
    "emit_error",
    "examples",
    "file_path",
    "in_thread",
    "number",
    "port",
    "print_error",
    "room",
    "run",
    "shared_options",
    "size",
    "whole_number",
]

P = ParamSpec("P")
T = TypeVar("T")

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143

CommandMain = Callable[[argparse.Namespace], Coroutine[Any, Any, int]]
OnProgress = Callable[[float], None]
"""Called with the finished fraction of a long step, 0 to 1."""


def emit(event: dict[str, Any] | list[Any]) -> None:
    """Print one line of JSON on standard output, at once."""
    print(json.dumps(event, allow_nan=False), flush=True)


def use_threads_sparingly() -> None:
    """Let libraries start no threads beside torch's. To be called before they are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's are waited for on the event loop, spinning


def configure_logging(verbose: bool) -> None:
    """Log to standard error, libraries quietly unless `verbose`. To be called before they are imported."""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO if verbose else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        force=True,
    )
    logging.getLogger("swarm").setLevel(logging.DEBUG if verbose else logging.WARNING)
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    if verbose:
        return
    os.environ.setdefault("HIVEMIND_LOGLEVEL", "CRITICAL")  # the daemon's lines pass through this logger
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def run(main: CommandMain, args: argparse.Namespace) -> int:
    """Run a command's coroutine on its own event loop and answer for every way it can end.

    A first SIGINT or SIGTERM cancels the coroutine, which cleans up; a second one ends at once. A
    coroutine that wants to end in its own way takes the signals over with `loop.add_signal_handler`.

    Returns:
        The coroutine's own exit code, the `exit_code` of a SwarmError, 130 after SIGINT, 143 after
        SIGTERM, 1 for a bug or a reader of standard output that went away.
    """
    use_threads_sparingly()
    configure_logging(args.verbose)
    with importing_for_good():
        try:
            with asyncio.Runner(loop_factory=_loop_factory()) as runner:
                code = runner.run(_until_terminated(main, args))
            sys.stdout.flush()
            return code
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED
        except asyncio.CancelledError:
            return EXIT_TERMINATED
        except Exception as error:
            return _report(error, as_json=args.json)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    if sys.platform == "win32":
        return asyncio.new_event_loop
    import uvloop

    return uvloop.new_event_loop


async def _until_terminated(main: CommandMain, args: argparse.Namespace) -> int:
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None

    def on_terminate() -> None:
        loop.remove_signal_handler(signal.SIGTERM)
        task.cancel()

    with suppress(NotImplementedError):  # no signal handlers in this platform's event loop
        loop.add_signal_handler(signal.SIGTERM, on_terminate)
    return await main(args)


def _report(error: Exception, *, as_json: bool) -> int:
    """Say what went wrong, and give the exit code for it."""
    causes = _leaves(error)
    if all(isinstance(cause, BrokenPipeError) for cause in causes):
        _discard_stdout()
        return EXIT_FAILED
    expected = [cause for cause in causes if isinstance(cause, SwarmError)]
    if len(expected) < len(causes):
        print("error: This is a bug in swarm; please report the lines below.", file=sys.stderr)
        traceback.print_exception(error, file=sys.stderr)
        if as_json:
            emit_error(
                SwarmError(f"This is a bug in swarm: {error!r}.", "The lines on standard error say more.")
            )
        return EXIT_FAILED
    print_error(expected[0])
    if as_json:
        emit_error(expected[0])
    return expected[0].exit_code


async def in_thread(work: Callable[[Callable[P, None]], T], on_progress: Callable[P, None]) -> T:
    """The result of `work`, which blocks and reports its progress, from a thread.

    When this is cancelled, the next report that `work` makes raises out of it: Ctrl-C ends a long step
    soon, rather than after it.
    """
    is_given_up = threading.Event()

    def report(*args: P.args, **kwargs: P.kwargs) -> None:
        if is_given_up.is_set():
            raise _GivenUp
        on_progress(*args, **kwargs)

    try:
        return await asyncio.to_thread(work, report)
    finally:
        is_given_up.set()


class _GivenUp(Exception):
    """Nobody waits for this work any more."""


def print_error(error: SwarmError) -> None:
    """The error and its hint, for a person, on standard error."""
    print(f"error: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)


def emit_error(error: SwarmError) -> None:
    """The error and its hint as a JSON line, unless nobody reads standard output any more."""
    try:
        emit({"event": "error", "message": error.message, "hint": error.hint})
    except BrokenPipeError:
        _discard_stdout()


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
    return [error]


def _discard_stdout() -> None:
    """Keep the interpreter from failing once more when it flushes standard output at its end."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Progress:
    """Progress bars of long steps, on standard error.

    A terminal gets bars; anything else gets one line a stage; `quiet` (with `--json`) gets nothing.
    A context manager: leaving it ends the display.
    """

    def __init__(self, *, quiet: bool = False):
        self._quiet = quiet
        self._bars: RichProgress | None = None
        self._stages: dict[str, OnProgress] = {}

    def __enter__(self) -> Self:
        if not self._quiet and sys.stderr.isatty():
            self._bars = _rich_bars()
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def stage(self, label: str, *, counted: bool = True) -> OnProgress:
        """Begin a stage. What is returned takes the finished fraction and may be called from any thread.

        A stage that is not `counted` shows that it runs, until it is called with 1.
        """
        if self._quiet:
            return lambda fraction: None
        if self._bars is None:
            print(f"{label}…", file=sys.stderr, flush=True)
            return lambda fraction: None
        bars = self._bars
        bar = bars.add_task(label, total=1.0 if counted else None)

        def on_progress(fraction: float) -> None:
            finished = min(max(fraction, 0.0), 1.0)
            if counted:
                bars.update(bar, completed=finished)
            elif finished == 1.0:
                bars.update(bar, total=1.0, completed=1.0)

        return on_progress

    def on_stage(self, label: str, fraction: float) -> None:
        """Show how far the stage of that name is; the first call begins it. May be called from any thread."""
        if label not in self._stages:
            self._stages[label] = self.stage(label)
        self._stages[label](fraction)


def _rich_bars() -> "RichProgress":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )
