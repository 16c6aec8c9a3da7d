"""How many threads a server takes by itself."""

import asyncio
import os
import sys

import pytest

from swarm.server.threads import Process, cores, count_servers, default_threads, processes, servers_here

SERVER = ("python", "-m", "swarm.server", "--model", "m")


@pytest.mark.parametrize(
    ("cores", "servers", "threads"), [(8, 1, 8), (8, 2, 4), (8, 3, 2), (2, 3, 1), (1, 1, 1), (4, 0, 4)]
)
def test_cores_are_shared(cores: int, servers: int, threads: int) -> None:
    assert default_threads(cores, servers) == threads


@pytest.mark.parametrize(
    ("command", "is_server"),
    [
        (SERVER, True),
        (("/venv/bin/python3", "-X", "dev", "-m", "swarm.server"), True),
        (("python", "-m", "swarm.demo"), False),
        (("python", "-m", "swarm.server.other"), False),
        (("tail", "-f", "swarm.server"), False),
        (("p2pd", "-m"), False),
        ((), False),
    ],
)
def test_a_server_is_known_by_its_command(command: tuple[str, ...], is_server: bool) -> None:
    assert Process(2, 1, command).runs("swarm.server") == is_server


def test_this_server_counts_however_it_was_started_and_copies_of_a_server_do_not() -> None:
    shell = Process(1, 0, ("bash",))
    one, two, copy = Process(2, 1, SERVER), Process(3, 1, SERVER), Process(4, 2, SERVER)
    assert count_servers([shell], own=1) == 1
    assert count_servers([shell, one, copy, two], own=2) == 2
    assert count_servers([shell, one, copy, two], own=1) == 3
    assert count_servers([], own=9) == 1


def test_forks_of_a_fork_server_count_and_it_does_not() -> None:
    command = ("python", "-m", "swarm.fork_server", "7", "swarm.server")
    fork_server, one, two = Process(2, 1, command), Process(3, 2, command), Process(4, 2, command)
    copy, daemon = Process(5, 3, command), Process(6, 3, ("p2pd",))
    assert count_servers([fork_server, one, two, copy, daemon], own=3) == 2
    assert count_servers([fork_server, one, two, copy, daemon, Process(7, 1, SERVER)], own=7) == 3


async def test_servers_of_this_machine_are_found() -> None:
    sleeper = "import time; time.sleep(60)"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", sleeper, "-m", "swarm.server")
    try:
        assert process.pid in {one.pid for one in processes() if one.runs("swarm.server")}
        assert servers_here() >= 2
    finally:
        process.kill()
        await process.wait()
    assert 1 <= cores() <= (os.cpu_count() or 1)
