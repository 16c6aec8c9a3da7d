"""How many threads a server computes with where nobody said it: its share of this machine's cores.

More threads than cores make servers on one machine many times slower, so each takes only its part.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import psutil

MODULE = "swarm.server"


@dataclass(frozen=True)
class Process:
    """One process of this machine, as far as it matters here."""

    pid: int
    parent: int
    command: Sequence[str]

    @property
    def is_server(self) -> bool:
        return any(pair == ("-m", MODULE) for pair in zip(self.command[1:], self.command[2:], strict=False))


def default_threads(cores: int, servers: int) -> int:
    """Threads for each of `servers` servers on `cores` cores."""
    return max(1, cores // max(1, servers))


def count_servers(processes: Iterable[Process], own: int) -> int:
    """How many servers there are, that of pid `own` included. A server's copy of itself is none."""
    servers = {process.pid: process for process in processes if process.is_server}
    return len({own} | {pid for pid, process in servers.items() if process.parent not in servers})


def cores() -> int:
    """CPU cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def servers_here() -> int:
    """How many servers run on this machine now, this one included. Reads every process's command line."""
    return count_servers(processes(), os.getpid())


def processes() -> list[Process]:
    """The processes of this machine. A command that may not be read is empty."""
    found = psutil.process_iter(("pid", "ppid", "cmdline"))
    return [Process(one.info["pid"], one.info["ppid"], one.info["cmdline"] or ()) for one in found]
