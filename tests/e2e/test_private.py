"""A private swarm of real processes: a peer that keeps it joinable, two servers, members and strangers."""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from swarm.net.invitation import Invitation
from swarm.processes import ServerProcess
from tests.tiny import tiny_checkpoint

pytestmark = pytest.mark.e2e

START = 60.0
REFUSED_WITHIN = 20.0
"""Seconds, on a busy machine, in which a stranger is told that it is one."""

LOCAL = ("--host-maddrs", "/ip4/127.0.0.1/tcp/0")
LIGHT = 100 * 2**20
"""Bytes that a peer without blocks takes at most."""


class Done(NamedTuple):
    code: int
    out: str
    err: str
    seconds: float


class Members:
    """A folder with all that the members of one swarm share, and a cache of their own."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.key = folder / "key"
        self.environment = {"SWARM_CACHE": str(folder / "cache"), "SWARM_SWARM_KEY": ""}

    async def run(self, *arguments: str) -> Done:
        """`python -m ARGUMENTS`, to its end."""
        began = time.monotonic()
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=os.environ | self.environment,
        )
        out, err = await process.communicate()
        assert process.returncode is not None
        return Done(process.returncode, out.decode(), err.decode(), time.monotonic() - began)

    def logs(self) -> str:
        """What the servers have said on standard error."""
        return "".join(file.read_text() for file in self.folder.glob("*.log"))

    @asynccontextmanager
    async def serving(self, name: str, *arguments: str) -> AsyncIterator[ServerProcess]:
        log = self.folder / f"{name}.log"
        process = ServerProcess([*LOCAL, *arguments], name=name, log=log, environment=self.environment)
        async with process:
            yield process


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    tiny_checkpoint(folder)
    return folder


def is_one_refusal(done: Done, says: str) -> bool:
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    return done.code == 2 and len(errors) == 1 and says in errors[0] and "Traceback" not in done.err


@pytest.mark.timeout(240)
async def test_a_private_swarm_is_its_members_alone(tmp_path: Path, checkpoint: Path) -> None:
    members = Members(tmp_path)
    for file in (members.key, tmp_path / "wrong"):
        made = await members.run("swarm.server", "--new-swarm-key", str(file), "--json")
        assert json.loads(made.out) == {"event": "made", "swarm_key": str(file)}
    secret = members.key.read_text().split()[-1]
    model = ("--model", str(checkpoint))

    async with AsyncExitStack() as stack:

        async def start(name: str, *arguments: str) -> ServerProcess:
            return await stack.enter_async_context(members.serving(name, *arguments))

        by_key = ("--swarm-key", str(members.key))
        door = await start("door", "--no-blocks", "--print-invitation", *by_key)
        listening = await door.wait_for("listening", START)
        (address,), invitation = listening["addresses"], listening["invitation"]
        assert Invitation.parse(invitation).addresses == (address,)
        by_address = ("--initial-peers", address)
        first = await start("first", *model, "--blocks", "0:3", "--threads", "1", *by_key, *by_address)
        second = await start(
            "second", *model, "--blocks", "3:6", "--threads", "1", "--initial-peers", invitation
        )
        for server in (first, second):
            await server.wait_for("serving", START)

        answered, invited, keyless, wrong = await asyncio.gather(
            members.run(
                "swarm.client", "generate", "hello", *model, "--raw", "--max-new-tokens", "3", "--json",
                "--initial-peers", invitation,
            ),
            members.run("swarm.client", "invite", *by_key, *by_address),
            members.run("swarm.client", "peers", *by_address),
            members.run("swarm.client", "peers", *by_address, "--swarm-key", str(tmp_path / "wrong")),
        )  # fmt: skip
        assert answered.code == 0, answered.err
        answer = json.loads(answered.out)
        assert len(answer["token_ids"]) == 3
        assert [hop["blocks"] for hop in answer["route"]] == [[0, 3], [3, 6]]
        assert invited.code == 0, invited.err
        assert len(Invitation.parse(invited.out.strip()).addresses) == 3, "all who are there"
        assert is_one_refusal(keyless, "This swarm is private"), keyless
        assert is_one_refusal(wrong, "This swarm has another key"), wrong
        for refused in (keyless, wrong):
            assert refused.seconds < REFUSED_WITHIN
            assert not refused.out

        process = psutil.Process(door.pid)
        assert process.memory_info().rss < LIGHT
        assert not any("torch" in used.path for used in process.memory_maps())

        process.send_signal(signal.SIGKILL)
        await door.wait_ended()
        found = await members.run("swarm.client", "peers", "--json", *by_key, *by_address)
        assert found.code == 0, found.err
        assert "Joined by peers that were remembered" in found.err
        assert {tuple(peer["blocks"]) for peer in json.loads(found.out)} == {(0, 3), (3, 6)}

    said = members.logs() + "".join(
        part for done in (answered, keyless, wrong, found) for part in (done.out, done.err)
    )
    assert secret not in said
    assert "swarm1" not in said
