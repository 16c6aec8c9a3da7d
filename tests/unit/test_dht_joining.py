"""Joining over real daemons: by initial peers, by remembered ones, with keys, or beginning anew."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from swarm.dht import joining
from swarm.dht.joining import Network, join, require_peers
from swarm.dht.reaching import Listening
from swarm.errors import InputError
from swarm.net.entrance import Entrance, entrance
from swarm.net.identity import Identity
from swarm.net.peer_memory import PeerMemory
from swarm.net.swarm_key import SwarmKey
from swarm.net.transport import PeerUnreachable

LOOPBACK = Listening(("/ip4/127.0.0.1/tcp/0",))
GONE = f"/ip4/127.0.0.1/tcp/1/p2p/{Identity.from_seed('gone').peer}"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SWARM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def key(tmp_path: Path) -> Path:
    SwarmKey.generate().save_new(tmp_path / "key")
    return tmp_path / "key"


@asynccontextmanager
async def joined(way_in: Entrance, listening: Listening | None = None) -> AsyncIterator[Network]:
    async with AsyncExitStack() as stack:
        yield await join(stack, way_in, listening=listening)


class Noting(PeerMemory):
    """A memory that says when it was given something to remember."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._loop = asyncio.get_running_loop()
        self._noted = asyncio.Event()

    def remember(self, addresses: Iterable[str], now: float) -> None:
        try:
            super().remember(addresses, now)
        finally:
            self._loop.call_soon_threadsafe(self._noted.set)

    async def wait(self) -> None:
        async with asyncio.timeout(10):
            await self._noted.wait()


def noting(way_in: Entrance) -> tuple[Entrance, Noting]:
    assert way_in.memory is not None
    memory = Noting(way_in.memory._path)
    return replace(way_in, memory=memory), memory


async def addresses_of(network: Network) -> list[str]:
    return await network.transport.addresses()


JOINED = "Joined by peers that were remembered, since no initial peer answers."


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name == joining.__name__]


async def test_a_client_finds_back_by_peers_that_it_met_before(caplog: pytest.LogCaptureFixture) -> None:
    async with joined(Entrance(), LOOPBACK) as first:
        assert first.is_new
        initial = await addresses_of(first)
        way_in = entrance(initial)
        async with joined(entrance(initial), LOOPBACK) as second:
            assert not second.is_new
            noting_way, memory = noting(way_in)
            async with joined(noting_way):
                await memory.wait()
            assert len(memory.recall(0)) == 2
            await first.store.close()
            await first.transport.close()
            assert not warnings(caplog)
            async with joined(way_in) as back:
                assert second.transport.peer in {
                    address.rpartition("/")[2] for address in await back.store.neighbours(9)
                }
            assert JOINED in warnings(caplog)
            await second.transport.close()
            for remembers in (True, False):
                with pytest.raises(PeerUnreachable, match=f"The initial peer {initial[0]} cannot be reached"):
                    async with joined(entrance(initial, remembers=remembers)):
                        pass


async def test_a_private_swarm_is_remembered_by_its_key(
    key: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    async with joined(entrance(swarm_key=key), LOOPBACK) as first:
        way_in, memory = noting(entrance(await addresses_of(first), key))
        async with joined(way_in, LOOPBACK) as second:
            await memory.wait()
            async with joined(entrance(swarm_key=key)) as client:
                assert client.transport.peer != second.transport.peer
            async with joined(entrance(swarm_key=key), LOOPBACK) as server:
                assert not server.is_new, "a first server that comes back does not split the swarm"
    assert warnings(caplog) == [JOINED] * 2
    assert memory._path.parent == cache / "peers"


async def test_a_swarm_that_has_died_out_begins_anew(key: Path, caplog: pytest.LogCaptureFixture) -> None:
    way_in = entrance(swarm_key=key)
    assert way_in.memory is not None
    way_in.memory.remember([GONE], 2e9)
    async with joined(way_in, LOOPBACK) as network:
        assert network.is_new
    assert "begins the swarm anew" in warnings(caplog)[-1]
    with pytest.raises(PeerUnreachable, match="Nobody answers at the addresses remembered"):
        async with joined(way_in):
            pass


async def test_whom_to_join_by_must_be_said(key: Path) -> None:
    for way_in in (Entrance(), entrance(swarm_key=key)):
        with pytest.raises(InputError, match="no peer to join by"):
            async with joined(way_in):
                pass
    with pytest.raises(InputError, match="no peer to join by"):
        require_peers(Entrance())
    require_peers(entrance(swarm_key=key))


async def test_a_wrong_key_is_not_mended_by_memory(key: Path, tmp_path: Path) -> None:
    SwarmKey.generate().save_new(tmp_path / "other")
    async with joined(entrance(swarm_key=key), LOOPBACK) as first:
        initial = await addresses_of(first)
        for file, says in ((tmp_path / "other", "another key"), (None, "is private")):
            way_in = entrance(initial, file)
            assert way_in.memory is not None
            way_in.memory.remember([GONE], 2e9)
            with pytest.raises(InputError, match=says):
                async with joined(way_in):
                    pass


@pytest.fixture
def full_cache(cache: Path) -> None:
    cache.write_text("a file in the place of a folder")


@pytest.mark.usefixtures("full_cache")
async def test_a_cache_that_cannot_be_written_does_no_harm() -> None:
    async with joined(Entrance(), LOOPBACK) as first:
        way_in, memory = noting(entrance(await addresses_of(first)))
        async with joined(way_in) as client:
            await memory.wait()
            assert await client.store.get(["k"]) == {"k": []}
    assert memory.recall(0) == ()
