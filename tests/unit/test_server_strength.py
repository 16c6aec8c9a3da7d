"""How fast a server is: measured, remembered, measured again; and the network, by moving bytes to peers."""

import asyncio
import os
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from swarm.dht.announcement import Throughput
from swarm.net.messages import MAX_PROBE_BYTES, Probe, Probed
from swarm.net.virtual_time import in_virtual_time
from swarm.server.drift import ENOUGH, FACTOR, PROMPT_ROWS, Seen, has_drifted
from swarm.server.gauge import MOST_KEPT, Gauge, Setting
from swarm.server.mean_queue import MEMORY, MeanQueue
from swarm.server.network_rate import network_rate
from swarm.server.probes import PAUSE, PAUSE_OF_ALL, Probes
from swarm.server.together import Together
from swarm.spans import Span
from tests.fake_engine import FakeEngine
from tests.hosting import ONE, ask, ended, hosting, opened, opening, refusal
from tests.server_swarm import World

SETTING = Setting(
    hardware="a processor x 2",
    model_id="m",
    blocks=3,
    dtype="auto",
    quantization="none",
    device="auto",
    threads=1,
    version="1",
)


@dataclass(frozen=True)
class Ran:
    """Implements `BatchReport`."""

    steps: int = 1
    decode_tokens: int = 1
    prefill_tokens: int = 0
    seconds: float = 0.03
    pairs: int = 3


async def test_what_was_measured_is_remembered_for_the_same_setting_alone(tmp_path: Path) -> None:
    engine, gauge = FakeEngine(), Gauge(SETTING, tmp_path)
    assert gauge.known() == Throughput()
    assert await gauge.rates(engine) == Throughput(decode=100.0, prefill=1000.0)
    again = FakeEngine(rates=(7.0, 8.0))
    assert Gauge(SETTING, tmp_path).known() == await Gauge(SETTING, tmp_path).rates(again)
    assert (engine.measured, again.measured) == (1, 0)
    for other in ({"hardware": "another"}, {"dtype": "float32"}, {"blocks": 4}, {"version": "2"}):
        assert Gauge(replace(SETTING, **other), tmp_path).known() == Throughput()
    assert await gauge.rates(FakeEngine(threads=2, rates=(7.0, 8.0))) == Throughput(decode=7.0, prefill=8.0)


async def test_measured_anew_it_is_remembered_anew(tmp_path: Path) -> None:
    gauge = Gauge(SETTING, tmp_path)
    await gauge.rates(FakeEngine())
    assert await gauge.measure(FakeEngine(rates=(7.0, 8.0))) == Throughput(decode=7.0, prefill=8.0)
    assert gauge.known() == Throughput(decode=7.0, prefill=8.0)


@pytest.mark.parametrize("content", [b"", b"{", b'{"decode": -1, "prefill": 2}', b'{"decode": 1}', b"\xff"])
async def test_a_file_that_makes_no_sense_is_written_anew(tmp_path: Path, content: bytes) -> None:
    gauge = Gauge(SETTING, tmp_path)
    await gauge.rates(FakeEngine())
    gauge.path.write_bytes(content)
    assert gauge.known() == Throughput()
    await gauge.rates(FakeEngine())
    assert gauge.known().decode == 100.0


async def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    gauges = [Gauge(replace(SETTING, blocks=blocks), tmp_path) for blocks in range(1, MOST_KEPT + 3)]
    for at, gauge in enumerate(gauges):
        await gauge.rates(FakeEngine())
        os.utime(gauge.path, (at, at))
    assert [gauge.known().decode for gauge in gauges] == [0.0] * 2 + [100.0] * MOST_KEPT


async def test_a_folder_that_cannot_be_written_to_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    gauge = Gauge(SETTING, tmp_path / "file" / "speed")
    assert (await gauge.rates(FakeEngine())).decode == 100.0


@pytest.mark.parametrize(
    ("rate", "count", "drifted"),
    [
        (100.0, ENOUGH, False),
        (100.0 * FACTOR * 0.99, ENOUGH, False),
        (100.0 * FACTOR * 1.01, ENOUGH, True),
        (100.0 / FACTOR * 0.99, ENOUGH, True),
        (1.0, ENOUGH - 1, False),
    ],
)
def test_it_takes_many_and_clear_differences_to_tell_a_drift(rate: float, count: int, drifted: bool) -> None:
    assert has_drifted(100.0, [rate] * count) is drifted
    assert has_drifted(100.0, [100.0] * (count + 1) + [rate] * count) is False


def test_only_what_one_session_had_to_itself_counts() -> None:
    seen, announced = Seen(), Throughput(decode=100.0, prefill=1000.0)
    for _ in range(ENOUGH):
        seen.add(Ran())
        seen.add(Ran(steps=2, decode_tokens=2, pairs=6, seconds=1.0))
        seen.add(Ran(decode_tokens=0, prefill_tokens=PROMPT_ROWS - 1, seconds=1.0))
    assert not seen.differs(announced)
    for _ in range(ENOUGH):
        seen.add(Ran(decode_tokens=0, prefill_tokens=PROMPT_ROWS, pairs=3 * PROMPT_ROWS, seconds=1.0))
    assert seen.differs(announced)
    assert not seen.differs(Throughput(decode=100.0, prefill=3.0 * PROMPT_ROWS))
    seen.forget()
    assert not seen.differs(announced)


def test_steps_that_run_together_take_a_part_of_what_they_take_alone() -> None:
    together = Together()
    assert together.part(100.0) == 1.0
    together.add(Ran())
    assert together.part(100.0) == pytest.approx(1.0)
    assert together.part(50.0) == pytest.approx(0.5)
    assert together.part(0.0) == 1.0
    together.add(Ran(decode_tokens=8, prefill_tokens=512, pairs=1560, seconds=3.0))
    assert together.part(100.0) == pytest.approx(1.0), "what prefills tells nothing"
    for _ in range(100):
        together.add(Ran(steps=8, decode_tokens=8, pairs=24, seconds=0.06))
    assert together.part(100.0) == pytest.approx(0.25, rel=0.01)
    for _ in range(100):
        together.add(Ran(decode_tokens=5, pairs=15, seconds=0.03))
    assert together.part(100.0) == pytest.approx(1.0, rel=0.05), "rows of one step are one step"
    for _ in range(100):
        together.add(Ran(steps=8, decode_tokens=8, pairs=24, seconds=1.0))
    assert together.part(100.0) == 1.0, "being slow is no reason to seem busier"


@in_virtual_time
async def test_steps_that_run_together_are_announced_as_fewer() -> None:
    world = World()
    async with world.server("alice") as life:
        await asyncio.sleep(12)
        engine = world.engines["alice"]
        engine.queue = 8
        assert life.server.announcement().queue == 8
        assert engine.on_batch is not None
        for _ in range(100):
            engine.on_batch(Ran(steps=8, decode_tokens=8, pairs=24, seconds=0.06))
        assert life.server.announcement().queue in (2, 3)
        engine.queue = 1
        assert life.server.announcement().queue == 1
        engine.queue = 0
        assert life.server.announcement().queue == 0


def test_the_mean_queue_follows_what_is_seen() -> None:
    queue = MeanQueue()
    queue.see(3, 100.0)
    assert queue.steps == 3
    queue.see(0, 100.0)
    assert queue.steps == 3, "no time has passed"
    for tick in range(50):
        queue.see(4 * (tick % 2), 100.0 + tick * MEMORY / 10)
    assert queue.steps == pytest.approx(2, abs=0.3)
    queue.see(0, 200.0)
    assert queue.steps < 1e-3


@in_virtual_time
async def test_what_is_in_the_queue_now_and_then_is_announced_as_its_mean() -> None:
    world = World()
    async with world.server("alice") as life:
        await asyncio.sleep(12)
        assert life.server.announcement().mean_queue == 0
        engine = world.engines["alice"]
        for _ in range(40):
            engine.queue = 2
            await asyncio.sleep(0.5)
            engine.queue = 0
            await asyncio.sleep(0.5)
        announced = life.server.announcement()
        assert announced.queue == 0
        assert announced.mean_queue == pytest.approx(1, abs=0.2)
        assert announced.queued == announced.mean_queue


@in_virtual_time
async def test_what_held_up_the_event_loop_counts_as_queued() -> None:
    """Nobody sees it in the queue: it is computed within one callback of the loop."""
    world = World()
    async with world.server("alice") as life:
        await asyncio.sleep(12)
        engine = world.engines["alice"]
        assert engine.on_batch is not None
        for _ in range(100):
            engine.on_batch(Ran(steps=1, seconds=0.06))
            await asyncio.sleep(0.2)
        assert life.server.announcement().mean_queue == pytest.approx(0.3, abs=0.05)


@in_virtual_time
async def test_a_server_that_got_slower_is_measured_again_once_it_is_idle() -> None:
    world = World()
    async with world.server("alice") as life:
        await asyncio.sleep(12)
        engine = world.engines["alice"]
        engine.rates, engine.queue = (10.0, 1000.0), 1
        assert engine.on_batch is not None
        for _ in range(ENOUGH):
            engine.on_batch(Ran(seconds=0.3))
        await asyncio.sleep(30)
        assert [one.throughput.decode for one in await world.listed()] == [100.0]
        engine.queue = 0
        await asyncio.sleep(10)
        assert [one.throughput.decode for one in await world.listed()] == [10.0]
        for _ in range(ENOUGH):
            engine.on_batch(Ran())
        await asyncio.sleep(60)
        assert engine.measured == 2, "it is not measured again and again"
        assert life.server.cell.phase == "serving"


@in_virtual_time
async def test_the_network_is_measured_with_others_by_the_slower_direction() -> None:
    world = World()
    wires = world.network.wires(world.network.peer("alice"), world.network.peer("bob"))
    for wire, bandwidth in zip(wires, (1e6, 4e6), strict=True):
        wire.link = replace(wire.link, latency=0.05, bandwidth=bandwidth)
    async with world.server("alice", Span(0, 3)), world.server("bob", Span(3, 6)):
        await asyncio.sleep(12)
        assert [one.throughput.network for one in await world.listed()] == [0.0, 0.0]
        await asyncio.sleep(40)
        for one in await world.listed():
            assert one.throughput.network == pytest.approx(1e6, rel=0.1)


@in_virtual_time
async def test_a_peer_that_does_not_answer_or_allows_nothing_costs_little_time() -> None:
    world = World()
    async with world.server("alice") as alice, world.server("bob", Span(3, 6)):
        await asyncio.sleep(12)
        listed = {one.name: one for one in await world.listed()}
        loop = asyncio.get_running_loop()
        transport = world.network.transport("prober")
        assert await network_rate(transport, [listed["bob"]]) > 0
        assert await network_rate(transport, [listed["bob"]]) == 0, "once is enough for now"
        world.network.kill("bob")
        started = loop.time()
        assert await network_rate(transport, [listed["bob"], listed["alice"]]) > 0
        assert loop.time() - started < 30
        assert alice.server.cell.phase == "serving"


@in_virtual_time
async def test_how_much_may_be_moved_is_said_first_and_then_held_to() -> None:
    async with hosting() as host:
        client = await host.client()
        allowed = await ask(client, Probe(nonce=1))
        assert allowed == Probed(nonce=1, size=0, allowed=MAX_PROBE_BYTES)
        asked = Probe(nonce=2, size=1000, back=500)
        answer, body = await client.call(asked, bytes(1000), timeout=5, max_body=500)
        assert answer == Probed(nonce=2, size=500, allowed=MAX_PROBE_BYTES - 1500)
        assert len(body) == 500
        assert (await refusal(client, Probe(nonce=3, back=MAX_PROBE_BYTES))).code == "bad_request"
        assert await ask(client, Probe(nonce=4)) == Probed(nonce=4, size=0, allowed=MAX_PROBE_BYTES - 1500)
        other = await host.client()
        error = await refusal(other, Probe(nonce=1))
        assert (error.code, error.retry_after) == ("no_capacity", pytest.approx(PAUSE, abs=1))
        assert host.refusals() == {("probe", "bad_request"): 1, ("probe", "no_capacity"): 1}


@in_virtual_time
async def test_what_was_not_allowed_is_not_taken() -> None:
    async with hosting() as host:
        client = await host.client()
        await client.send(Probe(nonce=1, size=10), bytes(10))
        await ended(client)
        client = await host.client("other")
        await ask(client, Probe(nonce=1))
        await client.send(Probe(nonce=2, size=11), bytes(10))
        await ended(client)
        client = await opened(host, ONE)
        assert (await refusal(client, Probe(nonce=1))).code == "bad_request"


@in_virtual_time
async def test_having_measured_a_stream_may_carry_a_session() -> None:
    async with hosting() as host:
        client = await host.client()
        await ask(client, Probe(nonce=1))
        assert (await ask(client, opening(ONE))).session_id == ONE


def test_a_crowd_of_peers_gets_no_more_than_one_does() -> None:
    probes, let = Probes(), 0
    for second in range(3000):
        let += not probes.take(f"peer {second}", float(second))
    assert let == 3000 / PAUSE_OF_ALL
    assert probes.take("peer 3000", 1e4) == 0
    assert probes.take("peer 3000", 1e4 + PAUSE_OF_ALL) == pytest.approx(PAUSE - PAUSE_OF_ALL)
    assert probes.take("another", 1e4 + PAUSE_OF_ALL) == 0
    assert probes.take("a third", 1e4 + PAUSE_OF_ALL + 1) == pytest.approx(PAUSE_OF_ALL - 1)
