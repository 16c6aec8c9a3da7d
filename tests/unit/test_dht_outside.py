"""Where the internet sees a peer: what others say of it, and that its network is told."""

import asyncio
import logging

import pytest

from swarm.dht.memory import MemoryStore
from swarm.dht.outside import ASK_PERIOD, RETRY_PERIOD, looking_from_outside
from swarm.net.calls import MessageStream
from swarm.net.identity import Identity
from swarm.net.memory import MemoryNetwork
from swarm.net.messages import Observe, Observed
from swarm.net.reachability import seen_outside
from swarm.net.transport import PeerId, Stream
from swarm.net.virtual_time import in_virtual_time

OUTER, ELSEWHERE, INSIDE = "/ip4/5.6.7.8/tcp/31330", "/ip4/5.6.7.8/tcp/40000", "/ip4/10.0.0.7/tcp/31330"
RELAY = f"/ip4/1.1.1.1/tcp/1/p2p/{Identity.from_seed('relay').peer}"
RELAYED = f"{RELAY}/p2p-circuit"


class Scene:
    """A peer, and others who see it somewhere."""

    def __init__(self) -> None:
        self.network = MemoryNetwork()
        self.own = self.network.transport("own")
        self.witnesses = 0
        self.asked = 0

    async def add(self, view: str) -> PeerId:
        self.witnesses += 1
        transport = self.network.transport(f"witness {self.witnesses}")

        async def on_stream(stream: Stream) -> None:
            calls = MessageStream(stream)
            asked, _ = await calls.receive()
            assert isinstance(asked, Observe)
            self.asked += 1
            await calls.send(Observed(nonce=asked.nonce, address=view, clock=0.0, version=""))
            await calls.receive()

        await transport.listen(on_stream)
        return transport.peer


@in_virtual_time
@pytest.mark.parametrize(
    ("views", "outer"),
    [
        ([OUTER], OUTER),
        ([OUTER, OUTER, OUTER], OUTER),
        ([OUTER, RELAYED, ""], OUTER),
        ([INSIDE, OUTER], OUTER),
        ([OUTER, ELSEWHERE], None),
        ([RELAYED], None),
        ([INSIDE], None),
        (["nonsense"], None),
        ([], None),
        ([OUTER, OUTER, OUTER, ELSEWHERE], OUTER),
    ],
)
async def test_it_is_where_all_who_see_it_on_the_internet_agree(views: list[str], outer: str | None) -> None:
    scene = Scene()
    witnesses = [await scene.add(view) for view in views]
    assert await seen_outside(scene.own, [*witnesses, scene.network.peer("gone")]) == outer


@in_virtual_time
async def test_its_network_is_told_now_and_again(caplog: pytest.LogCaptureFixture) -> None:
    scene, store = Scene(), MemoryStore(lambda: 0.0)
    addresses = [f"/ip4/1.1.1.1/tcp/1/p2p/{await scene.add(OUTER)}", f"{RELAYED}/p2p/{scene.own.peer}"]
    with caplog.at_level(logging.INFO):
        async with looking_from_outside(scene.own, store, addresses):
            await asyncio.sleep(RETRY_PERIOD)
            assert (scene.asked, scene.network.places[scene.own.peer]) == (1, OUTER)
            await asyncio.sleep(ASK_PERIOD)
            assert scene.asked == 2
            await scene.own.close()
            await asyncio.sleep(2 * ASK_PERIOD)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@in_virtual_time
async def test_who_is_not_seen_asks_again_soon() -> None:
    scene, store = Scene(), MemoryStore(lambda: 0.0)
    async with looking_from_outside(scene.own, store, [f"/ip4/1.1.1.1/tcp/1/p2p/{await scene.add(INSIDE)}"]):
        await asyncio.sleep(1.5 * RETRY_PERIOD)
        assert scene.asked == 2
    await asyncio.sleep(2 * RETRY_PERIOD)
    assert scene.asked == 2
    assert scene.own.peer not in scene.network.places
