"""How many threads a server computes with where nobody said it: its share of this machine's cores.

More threads than cores make servers on one machine many times slower, so each takes only its part.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import psutil

MODULE = "swarm.server"
FORK_SERVER = "swarm.fork_server"


@dataclass(frozen=True)
class Process:
    """One process of this machine, as far as it matters here."""

    pid: int
    parent: int
    command: Sequence[str]

    def runs(self, module: str) -> bool:
        return any(pair == ("-m", module) for pair in zip(self.command[1:], self.command[2:], strict=False))


def default_threads(cores: int, servers: int) -> int:
    """Threads for each of `servers` servers on `cores` cores."""
    return max(1, cores // max(1, servers))


def count_servers(processes: Iterable[Process], own: int) -> int:
    """How many servers there are, that of pid `own` included. A server's copy of itself is none; what a fork
    server has forked is one, though it shows the fork server's command."""
    all_ = list(processes)
    servers, forking = ({one.pid for one in all_ if one.runs(module)} for module in (MODULE, FORK_SERVER))
    fork_servers = {one.pid for one in all_ if one.pid in forking and one.parent not in forking}
    found = {one.pid for one in all_ if one.pid in servers and one.parent not in servers}
    forked = {one.pid for one in all_ if one.parent in fork_servers}
    return len({own} | found | forked)


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
