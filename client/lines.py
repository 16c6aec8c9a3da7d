"""What the user types: lines from a terminal with editing and history, or from a pipe."""

import asyncio
import sys
import threading
from collections.abc import AsyncGenerator
from typing import TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.history import InMemoryHistory

LEAVE_HINT = "Press Ctrl-C again or Ctrl-D to leave."


async def typed_lines(is_terminal: bool) -> AsyncGenerator[str, None]:
    """Lines without surrounding space, until the input ends or the user leaves."""
    lines = (
        terminal_lines(PromptSession(history=InMemoryHistory())) if is_terminal else stream_lines(sys.stdin)
    )
    async for line in lines:
        yield line.strip()


async def terminal_lines(session: "PromptSession[str]") -> AsyncGenerator[str, None]:
    """Ctrl-C clears the line; twice in a row, or Ctrl-D, ends the input."""
    interrupts = 0
    while interrupts < 2:
        try:
            line = await session.prompt_async("> ")
        except KeyboardInterrupt:
            interrupts += 1
            if interrupts < 2:
                print(LEAVE_HINT, flush=True)
        except EOFError:
            return
        else:
            interrupts = 0
            yield line


async def stream_lines(source: TextIO) -> AsyncGenerator[str, None]:
    """Lines of a file or pipe, read on a thread that never holds up the end of the program."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[str] = asyncio.Queue()
    wanted = threading.Semaphore(0)

    def read() -> None:
        while wanted.acquire():
            line = source.readline()
            if loop.is_closed():
                return
            loop.call_soon_threadsafe(queue.put_nowait, line)
            if not line:
                return

    threading.Thread(target=read, name="stdin", daemon=True).start()
    while True:
        wanted.release()
        line = await queue.get()
        if not line:
            return
        yield line
