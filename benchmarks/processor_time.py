"""Where processor time goes: seconds that processes of a kind used, by the part that used them."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping

import psutil

MAIN, OTHERS, DAEMON = "main thread", "other threads", "libp2p daemon"


def seconds_used(pids: Iterable[int]) -> Counter[str]:
    """Processor seconds of these processes so far: their main thread, which runs the event loop, their
    other threads, which compute, and the libp2p daemons that they started."""
    used: Counter[str] = Counter()
    for pid in pids:
        process = psutil.Process(pid)
        for thread in process.threads():
            used[MAIN if thread.id == pid else OTHERS] += thread.user_time + thread.system_time
        for daemon in process.children(recursive=True):
            used[DAEMON] += sum(daemon.cpu_times()[:2])
    return used


def own_seconds() -> Counter[str]:
    """The same of this process, as a client that has started servers too: those are left out."""
    own = psutil.Process()
    used: Counter[str] = Counter()
    for thread in own.threads():
        used[MAIN if thread.id == os.getpid() else OTHERS] += thread.user_time + thread.system_time
    for child in own.children():
        if child.name() == "p2pd":
            used[DAEMON] += sum(child.cpu_times()[:2])
    return used


def per_token(
    before: Mapping[str, Counter[str]], after: Mapping[str, Counter[str]], tokens: int
) -> dict[str, dict[str, float]]:
    """Milliseconds of processor time a token, by kind of process and part."""
    return {
        kind: {
            part: 1000 * (after[kind][part] - before[kind][part]) / tokens for part in (MAIN, OTHERS, DAEMON)
        }
        for kind in before
    }
