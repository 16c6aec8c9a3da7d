"""Audits between real processes: two honest servers find out one that lies, and its signature proves it."""

import asyncio
import json
from pathlib import Path

import pytest

import swarm
from swarm.client.__main__ import main
from swarm.processes import ServerProcess, stop_all
from tests.forks import FORKS

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

START = 90.0
LOCAL = ("--dtype", "float16", "--blocks", "0:30", "--threads", "1", "--host-maddrs", "/ip4/127.0.0.1/tcp/0")
PROMPT = "The capital of France is"
SESSIONS = 10
"""Asked at most until the liar has been on a route, or a witness."""


def test_a_liar_is_found_out_and_its_signature_proves_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evidence = tmp_path / "evidence"
    liar = asyncio.run(find_out(tmp_path, evidence))
    [file] = evidence.iterdir()
    assert main(["audit", str(file), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["holds"]
    assert said["accused"] == liar


async def find_out(folder: Path, evidence: Path) -> str:
    """Have a liar caught among three servers; its peer id."""
    asked = [*LOCAL, "--exit-with-stdin"]
    servers = [
        ServerProcess(asked, name="liar", log=folder / "liar.log", module="tests.lying_server"),
        ServerProcess(asked, name="b", log=folder / "b.log", launcher=FORKS),
        ServerProcess(asked, name="c", log=folder / "c.log", launcher=FORKS),
    ]
    try:
        await servers[0].start()
        addresses = list((await servers[0].wait_for("listening", START))["addresses"])
        for server in servers[1:]:
            await server.start(["--initial-peers", *addresses])
        for server in servers:
            await server.wait_for("serving", START)
        async with swarm.connect(addresses, audit_rate=1.0, evidence_folder=evidence) as client:
            for _ in range(SESSIONS):
                await client.generate(PROMPT, raw=True, max_new_tokens=4)
                await client.settle_audits(START)
                if client.audits.caught:
                    break
            assert client.audits.caught == 1
            answer = await client.generate(PROMPT, raw=True, max_new_tokens=4)
            assert "Paris" in answer.text
            liar = str(addresses[0].rpartition("/")[-1])
            assert liar not in [hop.peer for hop in answer.route]
            return liar
    finally:
        await stop_all(servers)
