"""A server behind a router that translates addresses: how it is reached, and that it says why."""

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from swarm.processes import ServerProcess
from tests.natted import Internet, NotAllowed, internet, started_at
from tests.tiny import tiny_checkpoint

pytestmark = pytest.mark.e2e

START = 90.0
PORT = "31330"


@pytest.fixture
def net() -> Iterator[Internet]:
    """Besides the server, two clients are behind routers; what `strict`'s lets out changes its port."""
    try:
        with internet(["relay", "client"], ["hidden", "home", "strict"], symmetric=["strict"]) as made:
            yield made
    except NotAllowed as reason:
        pytest.skip(f"this machine has no network namespaces with translation: {reason}")


def server(net: Internet, host: str, folder: Path, *options: str) -> ServerProcess:
    asked = ("--port", PORT, "--model", str(folder / "model"), "--threads", "1", *options)
    return ServerProcess(asked, name=host, log=folder / f"{host}.log", environment=cache(folder))


def cache(folder: Path) -> dict[str, str]:
    return {"SWARM_CACHE": str(folder / "cache")}


async def answer_at(net: Internet, host: str, *arguments: str) -> tuple[int, list[dict[str, Any]], str]:
    """The exit code of a client command at `host`, what it printed, and what it said besides."""
    process = await started_at(net, host, sys.executable, "-m", "swarm.client", *arguments, "--json")
    async with asyncio.timeout(START):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, [json.loads(line) for line in out.splitlines()], err.decode()


async def started(net: Internet, relay: ServerProcess, hidden: ServerProcess) -> tuple[str, list[str]]:
    """Where the relay can be joined, and the addresses that the hidden server tells, once both listen."""
    with net.at("relay"):
        await relay.start()
    addresses = (await relay.wait_for("listening", START))["addresses"]
    (join,) = [one for one in addresses if net.addresses["relay"] in one]
    with net.at("hidden"):
        await hidden.start(["--initial-peers", join])
    return join, (await hidden.wait_for("listening", START))["addresses"]


async def test_a_server_behind_a_router_serves_through_a_relay(net: Internet, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    tiny_checkpoint(tmp_path / "model")
    relay = server(net, "relay", tmp_path, "--no-blocks")
    hidden = server(net, "hidden", tmp_path)
    try:
        join, told = await started(net, relay, hidden)
        assert f"{join}/p2p-circuit/p2p/{told[0].rpartition('/')[2]}" in told
        await hidden.wait_for("serving", START)
        asked = ("--model", str(tmp_path / "model"), "--initial-peers", join)
        code, (answer,), errors = await answer_at(
            net, "client", "generate", "Hello", "--raw", "--max-new-tokens", "8", *asked
        )
        assert (code, len(answer["token_ids"])) == (0, 8), errors
        code, (peers,), errors = await answer_at(net, "client", "peers", "--initial-peers", join)
        assert (code, [peer["state"] for peer in peers]) == (0, ["serving"]), errors
        code, found, _ = await answer_at(net, "hidden", "diagnose", "--initial-peers", join)
        (reach,) = [one for one in found if one["check"] == "reachable"]
        assert (reach["level"], reach["relays"]) == ("warning", 1)
        assert "through a relay" in reach["advice"]
    finally:
        await hidden.stop()
        await relay.stop()
    said = [line for line in (tmp_path / "hidden.log").read_text().splitlines() if "cannot connect" in line]
    assert len(said) == 1
    assert "through a relay" in said[0]
    assert f"TCP port {PORT}" in said[0]


async def test_without_a_relay_it_says_what_to_do(net: Internet, tmp_path: Path) -> None:
    relay = server(net, "relay", tmp_path, "--no-blocks", "--no-relay")
    hidden = server(net, "hidden", tmp_path, "--no-blocks")
    try:
        with net.at("relay"):
            await relay.start()
        addresses = (await relay.wait_for("listening", START))["addresses"]
        with net.at("hidden"):
            await hidden.start(["--initial-peers", *addresses])
        told = (await hidden.wait_for("listening", START))["addresses"]
        assert not any("p2p-circuit" in one for one in told)
    finally:
        await hidden.stop()
        await relay.stop()
    log = (tmp_path / "hidden.log").read_text()
    assert log.count("nobody elsewhere can use it, and no peer that it knows is a relay") == 1
    assert "--public-ip" in log


async def visits(net: Internet, host: str, join: str, address: str, seconds: int) -> list[str]:
    """Where a client at `host` found the peer at `address`, the last time at the end."""
    command = (sys.executable, "-m", "tests.visitor", join, address, str(seconds))
    process = await started_at(net, host, *command)
    async with asyncio.timeout(START):
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode().split()


async def test_clients_come_straight_to_a_server_behind_a_router(net: Internet, tmp_path: Path) -> None:
    relay, hidden = (server(net, host, tmp_path, "--no-blocks") for host in ("relay", "hidden"))
    try:
        join, told = await started(net, relay, hidden)
        (relayed,) = [one for one in told if "p2p-circuit" in one]
        home, client, strict = await asyncio.gather(
            visits(net, "home", join, relayed, 30),
            visits(net, "client", join, relayed, 30),
            visits(net, "strict", join, relayed, 12),
        )
    finally:
        await hidden.stop()
        await relay.stop()
    assert home[-1] == client[-1] == f"/ip4/{net.addresses['router of hidden']}/tcp/{PORT}"
    assert net.bytes_sent("home", to="hidden") > 1000
    assert net.bytes_sent("hidden", to="home") > 1000
    assert all("p2p-circuit" in one for one in strict)
