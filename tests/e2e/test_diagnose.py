"""`diagnose` against a real server on loopback, and against addresses that lead nowhere."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from swarm.net.identity import Identity
from swarm.processes import ServerProcess
from tests.forks import FORKS
from tests.tiny import tiny_checkpoint

pytestmark = pytest.mark.e2e

START = 90.0
OTHER = Identity.from_seed("another peer").peer


async def diagnose(*arguments: str) -> tuple[int | None, dict[str, list[dict[str, Any]]]]:
    """The exit code, and the findings by what they are about."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "swarm", "client", "diagnose", "--json", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(START):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert err == b""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in out.splitlines():
        finding = json.loads(line)
        found.setdefault(finding["check"], []).append(finding)
    return process.returncode, found


async def test_it_finds_nothing_wrong_with_a_server_and_everything_without(
    tmp_path: Path, free_port: int
) -> None:
    tiny_checkpoint(tmp_path / "model")
    asked = ("--model", str(tmp_path / "model"), "--host-maddrs", "/ip4/127.0.0.1/tcp/0", "--threads", "1")
    async with ServerProcess(asked, name="server", log=tmp_path / "log", launcher=FORKS) as server:
        (address,) = (await server.wait_for("listening", START))["addresses"]
        await server.wait_for("serving", START)
        path, _, peer = address.rpartition("/p2p/")
        dead = f"/ip4/127.0.0.1/tcp/{free_port}/p2p/{peer}"
        wrong = (dead, f"{path}/p2p/{OTHER}", f"/dns4/no-such-host.invalid/tcp/1/p2p/{peer}")
        port = path.rpartition("/")[2]
        (code, fine), (other_code, broken) = await asyncio.gather(
            diagnose("--initial-peers", address, dead, "--port", port),
            diagnose("--initial-peers", *wrong),
        )
    assert code == 0
    assert [one["level"] for one in fine.pop("initial peer")] == ["ok", "warning"]
    fine.pop("network")  # a machine without a network passes this test too
    assert {one["level"] for some in fine.values() for one in some} == {"ok"}
    assert set(fine) == {"clock", "version", "nat", "reachable", "records", "model", "server"}
    assert fine["nat"][0]["kind"] == "local"
    assert fine["reachable"][0]["cause"].startswith(f"All peers that were asked could connect to {path}")
    assert fine["server"][0]["peer"] == peer

    assert other_code == 1
    assert [one["fault"] for one in broken["initial peer"]] == ["refused", "another_peer", "unresolved"]
    assert f"peer {peer} answers instead of {OTHER}" in broken["initial peer"][1]["cause"]
    assert set(broken) == {"network", "initial peer", "time"}
