"""The command `chat`: turns of a conversation in a terminal, or line by line from a pipe.

Owns what is read and shown, and what Ctrl-C means. The turns themselves are the facade's.
"""

import argparse
import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING

from swarm import cli
from swarm.client.lines import typed_lines
from swarm.client.options import Options
from swarm.client.terminal import SCREEN, answer_options, joined_swarm
from swarm.client.text import printable
from swarm.errors import SwarmError
from swarm.net.transport import TransportError

if TYPE_CHECKING:
    from swarm.client.facade import Chat, Swarm
    from swarm.client.generation import Generation, TextStream

HELP = """\
/help   this list
/reset  forget the conversation and find a new route
/route  who answers, and where the time goes
/quit   leave (or Ctrl-D)
Ctrl-C  stops an answer; twice at the prompt, it leaves"""

STOP_GRACE = 2.0
"""Seconds that a stopped answer may take for its running step; then the step is given up as well."""


async def main(args: argparse.Namespace) -> int:
    options = answer_options(args)
    async with joined_swarm(args) as swarm:
        return await run_chat(swarm, options, as_json=args.json)


async def run_chat(swarm: "Swarm", options: Options | None = None, *, as_json: bool = False) -> int:
    """Talk until the user leaves or the input ends; owns SIGINT while an answer is written.

    Returns:
        The exit code: 1 if the last answer of a conversation without a terminal failed.

    Raises:
        TransportError: this client's own network has failed.
    """
    talk = _Talk(swarm, swarm.chat(**(options or {})), as_json)
    is_terminal = sys.stdin.isatty() and not as_json
    if is_terminal:
        talk.say(f"{swarm.model.name} through {swarm.route()}. /help shows the commands.")
    try:
        async with aclosing(typed_lines(is_terminal)) as lines:
            await talk.run(lines)
    finally:
        await talk.chat.close()
    return 0 if is_terminal else int(talk.has_failed)


class _Talk:
    """One chat and its screen."""

    def __init__(self, swarm: "Swarm", chat: "Chat", as_json: bool):
        self.chat = chat
        self.has_failed = False
        self._swarm = swarm
        self._as_json = as_json
        self._last: Generation | None = None

    async def run(self, lines: AsyncIterator[str]) -> None:
        async for line in lines:
            if line == "/quit":
                return
            try:
                await self._turn(line)
            except TransportError:
                raise
            except SwarmError as error:
                self.has_failed = True
                cli.print_error(error)
                if self._as_json:
                    cli.emit_error(error)

    async def _turn(self, line: str) -> None:
        if line == "/help":
            self.say(HELP)
        elif line == "/reset":
            await self.chat.reset()
            self.say("The conversation is forgotten.")
        elif line == "/route":
            self.say(route_text(self._last) if self._last else str(self._swarm.route()))
        elif line.startswith("/"):
            self.say(f"There is no command {printable(line.split()[0])}; /help shows those there are.")
        elif line:
            await self._answer(line)

    async def _answer(self, line: str) -> None:
        self.has_failed = False
        stream = self.chat.ask(line)
        await run_stoppable(stream, self._show(stream))
        answer = self._last = stream.generation or self._last
        if stream.generation is None:
            self.say("The answer was given up.")
        elif self._as_json:
            cli.emit(stream.generation.as_json())
        elif answer is not None:
            self.say(summary(answer))

    async def _show(self, stream: "TextStream") -> None:
        async with aclosing(stream):
            try:
                async for piece in stream:
                    if not self._as_json:
                        SCREEN.write(printable(piece))
            finally:
                if not self._as_json:
                    SCREEN.end_line()

    def say(self, text: str) -> None:
        """A line of the chat itself: dim in a terminal, and never among JSON lines."""
        is_terminal = sys.stdout.isatty()
        if not self._as_json:
            print(f"\x1b[2m{printable(text)}\x1b[0m" if is_terminal else printable(text), flush=True)


async def run_stoppable(stream: "TextStream", showing: Coroutine[None, None, None]) -> None:
    """Run `showing`; Ctrl-C stops its answer `stream`, and a second one gives it up at once."""
    loop = asyncio.get_running_loop()
    task = asyncio.create_task(showing, name="answer")
    presses = 0

    def on_interrupt() -> None:
        nonlocal presses
        presses += 1
        stream.stop()
        if presses == 1:
            loop.call_later(STOP_GRACE, task.cancel)
        else:
            task.cancel()

    with on_signal(signal.SIGINT, on_interrupt):
        try:
            await asyncio.wait({task})
        finally:
            task.cancel()
            await asyncio.wait({task})
    if not task.cancelled():
        task.result()


@contextmanager
def on_signal(number: signal.Signals, react: Callable[[], None]) -> Iterator[None]:
    """Have the loop call `react` on a signal, and give the signal back to whom it belonged before."""
    loop = asyncio.get_running_loop()
    before = signal.getsignal(number)
    try:
        loop.add_signal_handler(number, react)
    except (NotImplementedError, RuntimeError, ValueError):  # not the main thread, or this platform has none
        yield
        return
    try:
        yield
    finally:
        loop.remove_signal_handler(number)
        signal.signal(number, before)


def summary(answer: "Generation") -> str:
    """Route, speed, time to the first token of an answer, and what drafts did for it, on one line."""
    hops = " → ".join(hop.label for hop in answer.route)
    drafts = answer.speculation
    drafted = f" · {drafts.accepted} of {drafts.drafted} drafted tokens right" if drafts.drafted else ""
    return f"{hops} · {answer.tokens_per_s:.1f} tokens/s · first token after {answer.ttft_ms:.0f} ms{drafted}"


def route_text(answer: "Generation") -> str:
    """The hops of an answer, one a line, with the mean times of a step."""
    return "\n".join(
        f"{hop.label}: {hop.compute_ms:.1f} ms computing, {hop.queue_ms:.1f} ms in the queue, "
        f"{hop.rtt_ms:.1f} ms on the way"
        for hop in answer.route
    )
