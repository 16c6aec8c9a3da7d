"""`python -m swarm.fork_server FD COMMAND MODULE...`: imports MODULEs once, then forks into COMMANDs.

torch and transformers take seconds of processor time to import; a fork has them at once, in memory that it
shares with the others, and goes on as `python -m COMMAND`. Forks are ordered on the socket FD: by a JSON list
of the command's arguments, and four files, which are standard input, output and error, and a socket on which
the fork's process id is told, and later how it ended, each in a packet. Ends when nobody can order any more.
Must hold nothing that forks may not share: it starts no thread and opens no device. `swarm.forking` is who
asks it. Knows no room.
"""

import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from swarm.cli import configure_logging, use_threads_sparingly
from swarm.importing import importing

MAX_ORDER_BYTES = 64 * 1024


def main() -> None:
    _, number, command, *modules = sys.argv
    use_threads_sparingly()
    configure_logging(verbose=False)
    with importing():
        for module in modules:
            importlib.import_module(module)
    gc.freeze()  # no fork looks for garbage in there, which would copy its memory
    arguments = serve(socket.socket(fileno=int(number)))
    if arguments is not None:
        Path("/proc/self/comm").write_text(command)  # what top and pkill know it by
        sys.argv = [command, *arguments]
        runpy.run_module(command, run_name="__main__", alter_sys=True)


def serve(orders: socket.socket) -> list[str] | None:
    """Fork for each order. In a fork: its command's arguments. Else None, once nobody can order any more."""
    tellers: dict[int, int] = {}
    ended, wakes = socket.socketpair()
    with orders, ended, wakes, selectors.DefaultSelector() as selector:
        wakes.setblocking(False)
        signal.set_wakeup_fd(wakes.fileno())
        signal.signal(signal.SIGCHLD, lambda number, frame: None)  # without a handler nothing is woken
        selector.register(orders, selectors.EVENT_READ)
        selector.register(ended, selectors.EVENT_READ)
        while True:
            ready = {key.fileobj for key, _ in selector.select()}
            if ended in ready:
                ended.recv(4096)
                tell_ended(tellers)
            if orders not in ready:
                continue
            order, files, *_ = socket.recv_fds(orders, MAX_ORDER_BYTES, 4)
            if not order:
                return None
            *standard, teller = files
            pid = os.fork()
            if pid == 0:
                settle(standard, teller, tellers.values())
                arguments: list[str] = json.loads(order)
                return arguments
            tellers[pid] = teller
            for file in standard:
                os.close(file)


def settle(standard: Sequence[int], teller: int, not_mine: Iterable[int]) -> None:
    """Be like a process that was started anew: in a session of its own, with standard files of its own."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    for number, file in enumerate(standard):
        os.dup2(file, number)
    tell(teller, os.getpid())
    for file in (*standard, teller, *not_mine):
        os.close(file)


def tell_ended(tellers: dict[int, int]) -> None:
    """Tell of each fork that has ended its exit code, negative the number of the signal that ended it."""
    while tellers:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        teller = tellers.pop(pid)
        with suppress(OSError):  # nobody asks for it any more
            tell(teller, os.waitstatus_to_exitcode(status))
        os.close(teller)


def tell(teller: int, number: int) -> None:
    os.write(teller, b"%d" % number)


if __name__ == "__main__":
    main()
