"""`python -m swarm.server` as a real process on loopback: its life, its refusals, and what it survives."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from array import array
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any
from urllib.request import urlopen

import psutil
import pytest
import transformers

from swarm.blocks.models import Model, resolve
from swarm.dht.announcement import Announcement, ModelEntry
from swarm.dht.directory import list_models, list_peers
from swarm.dht.kademlia import KademliaStore
from swarm.errors import SwarmError
from swarm.net import messages
from swarm.net.calls import MessageStream, Refused
from swarm.net.identity import Identity
from swarm.net.libp2p import Libp2pTransport
from swarm.net.libp2p_stream import Libp2pStream
from swarm.processes import Launcher, ServerProcess
from tests.forks import FORKS
from tests.tiny import COMMON, tiny_checkpoint, tiny_tokenizer

pytestmark = pytest.mark.e2e

LISTED_WITHIN = 6.0
"""Seconds of processor time that a server takes at most until it is listed: it has loaded nothing by then."""

LEFT_WITHIN = 10.0
START = 60.0
"""Seconds that a start may take on a busy machine where its speed is not what is tested."""

LOCAL = ("--host-maddrs", "/ip4/127.0.0.1/tcp/0", "--threads", "1")
FRAMES = 10_000
AT_ONCE = 25


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Model:
    return resolve(str(checkpoint))


@asynccontextmanager
async def serving(
    tmp_path: Path,
    checkpoint: Path,
    *arguments: str,
    name: str = "server",
    until: str = "serving",
    launcher: Launcher | None = FORKS,
) -> AsyncIterator[ServerProcess]:
    asked = ["--model", str(checkpoint), *LOCAL, *arguments]
    async with ServerProcess(asked, name=name, log=tmp_path / f"{name}.log", launcher=launcher) as server:
        await server.wait_for(until, START)
        yield server


async def address_of(server: ServerProcess) -> str:
    listening = await server.wait_for("listening", START)
    return str(listening["addresses"][0])


@asynccontextmanager
async def client_of(server: ServerProcess) -> AsyncIterator[tuple[Libp2pTransport, KademliaStore]]:
    address = await address_of(server)
    async with (
        await Libp2pTransport.start(Identity.generate(), [address], host_maddrs=()) as transport,
        await KademliaStore.start(transport, [address], client_mode=True) as store,
    ):
        yield transport, store


async def opened(transport: Libp2pTransport, server: ServerProcess, model: Model, sign: str) -> MessageStream:
    listening = await server.wait_for("listening", START)
    calls = MessageStream(await transport.open_stream(listening["peer"], listening["addresses"]))
    asked = messages.Open(
        session_id=sign * 32, model_id=model.model_id, start=0, end=model.num_blocks, max_tokens=8
    )
    try:
        answer, _ = await calls.call(asked, timeout=10)
    except SwarmError:
        calls.close()
        raise
    assert isinstance(answer, messages.Opened)
    return calls


async def stepped(calls: MessageStream, model: Model, sign: str, seq_pos: int = 0) -> messages.Result:
    step = messages.Step(
        session_id=sign * 32,
        number=time.monotonic_ns(),
        seq_pos=seq_pos,
        payload_type="hidden_states",
        response_type="hidden_states",
        shape=(1, model.hidden_size),
        dtype="float32",
    )
    body = bytes(messages.body_bytes(step))
    answer, data = await calls.call(step, body, timeout=10, max_body=len(body))
    assert isinstance(answer, messages.Result)
    assert len(data) == len(body)
    return answer


def daemons_of(server: ServerProcess) -> list[psutil.Process]:
    return psutil.Process(server.pid).children(recursive=True)


async def test_a_server_lives_from_listening_to_left(tmp_path: Path, checkpoint: Path, model: Model) -> None:
    async with serving(tmp_path, checkpoint) as server, client_of(server) as (transport, store):
        calls = await opened(transport, server, model, "a")
        assert (await stepped(calls, model, "a")).compute_ms > 0
        assert (await stepped(calls, model, "a", 1)).seq_pos == 1
        assert isinstance(calls._stream, Libp2pStream)
        async with asyncio.timeout(10):
            while not calls._stream.is_short:
                await stepped(calls, model, "a", 1)
        assert (await stepped(calls, model, "a", 2)).seq_pos == 2
        (entry,) = await list_models(store)
        assert entry.model_id == model.model_id
        (listed,) = await list_peers(store, entry)
        assert listed.state == "serving"
        assert listed.throughput.decode > 0
        assert listed.throughput.prefill > 0
        daemons = daemons_of(server)
        assert daemons
        asked = time.monotonic()
        server.terminate()
        assert await server.wait_ended() == 0
        assert time.monotonic() - asked < LEFT_WITHIN
        names = [event["event"] for event in server.events]
        assert names[0] == "listening"
        assert names[-3:] == ["serving", "draining", "left"]
        assert set(names[1:-3]) == {"joining"}
        progress = [event["progress"] for event in server.events if event["event"] == "joining"]
        assert progress == sorted(progress)
        assert (progress[0], progress[-1]) == (0.0, 1.0)
        assert not any(daemon.is_running() for daemon in daemons)


async def test_it_is_listed_within_seconds_says_to_wait_and_takes_its_announcement_with_it(
    tmp_path: Path, checkpoint: Path, model: Model
) -> None:
    async with serving(tmp_path, checkpoint, name="first") as first, client_of(first) as (transport, store):
        address = await address_of(first)
        joins = ("--initial-peers", address)
        async with serving(
            tmp_path, checkpoint, *joins, name="second", until="listening", launcher=None
        ) as second:
            listed = await until_listed(store, second)
            assert sum(psutil.Process(second.pid).cpu_times()[:2]) < LISTED_WITHIN
            assert listed.state == "joining"
            with pytest.raises(Refused) as refused:
                await opened(transport, second, model, "b")
            assert refused.value.error.code == "warming_up"
            assert refused.value.error.retry_after
            await second.wait_for("serving", START)
            await opened(transport, second, model, "b")
            (entry,) = await list_models(store)
            assert await listed_peers(store, entry) == 2
            second.terminate()
            assert await second.wait_ended() == 0
            assert await listed_peers(store, entry) == 1


async def until_listed(store: KademliaStore, server: ServerProcess) -> Announcement:
    peer = (await server.wait_for("listening", START))["peer"]
    async with asyncio.timeout(START):
        while True:
            for entry in await list_models(store):
                for announcement in await list_peers(store, entry):
                    if announcement.peer == peer:
                        return announcement
            await asyncio.sleep(0.05)


async def listed_peers(store: KademliaStore, entry: ModelEntry) -> int:
    return len(await list_peers(store, entry))


@pytest.mark.parametrize(("second", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
async def test_a_second_signal_ends_it_at_once(
    tmp_path: Path, checkpoint: Path, second: signal.Signals, code: int
) -> None:
    async with serving(tmp_path, checkpoint) as server:
        daemons = daemons_of(server)
        server.terminate()
        await server.wait_for("draining", LEFT_WITHIN)
        asked = time.monotonic()
        os.kill(server.pid, second)
        assert await server.wait_ended() == code
        assert time.monotonic() - asked < 1
        assert not any(daemon.is_running() and daemon.status() != "zombie" for daemon in daemons)


async def test_a_fork_server_holds_nothing_that_forks_may_not_share(tmp_path: Path, checkpoint: Path) -> None:
    async with serving(tmp_path, checkpoint) as server:
        fork_server = psutil.Process(server.pid).parent()
        assert fork_server is not None
        assert "swarm.fork_server" in fork_server.cmdline()
        assert fork_server.num_threads() == 1
        assert {path for path in files_of(fork_server) if path.startswith("/dev/")} == {os.devnull}


def files_of(process: psutil.Process) -> set[str]:
    return {os.readlink(file) for file in Path(f"/proc/{process.pid}/fd").iterdir()}


async def test_a_signal_while_it_starts_ends_it_politely(tmp_path: Path, checkpoint: Path) -> None:
    arguments = ["--model", str(checkpoint), *LOCAL]
    async with ServerProcess(arguments, name="server", log=tmp_path / "log") as server:
        await server.wait_for("joining", START)
        server.terminate()
        async with asyncio.timeout(LEFT_WITHIN):
            assert await server.wait_ended() == 0
        assert [event["event"] for event in server.events][-1] == "left"


async def test_a_dead_daemon_ends_it_with_the_reason(tmp_path: Path, checkpoint: Path) -> None:
    async with serving(tmp_path, checkpoint) as server:
        for daemon in daemons_of(server):
            daemon.kill()
        async with asyncio.timeout(LEFT_WITHIN):
            assert await server.wait_ended() == 1
        assert "daemon" in server.failure().message


def test_it_leaves_when_standard_input_ends(checkpoint: Path) -> None:
    asked = ["--model", str(checkpoint), *LOCAL, "--json", "--exit-with-stdin"]
    command = [sys.executable, "-m", "swarm.server", *asked]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        assert "listening" in server.stdout.readline()
        server.stdin.close()
        assert '"left"' in server.stdout.read()
        assert server.wait(LEFT_WITHIN) == 0


def refused(*arguments: str, code: int, says: str) -> None:
    """The command ends with `code`, one sentence that matches `says`, a hint, and no traceback."""
    found, said = asyncio.run(ended(arguments))
    assert found == code, said
    assert re.search(f"^error: .*{says}", said, re.MULTILINE), said
    assert re.search("^hint: ", said, re.MULTILINE), said
    assert "Traceback" not in said


async def ended(arguments: Sequence[str]) -> tuple[int, str]:
    """How a server ends that cannot serve, and what it says on standard error."""
    with TemporaryFile() as log:
        async with asyncio.timeout(START):
            code = await (await FORKS.launch(arguments, log)).wait()
        log.seek(0)
        return code, log.read().decode()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--blocks", "5:3"], "not a span"),
        (["--kv-overcommit", "0.5"], "0.5 is not possible"),
        (["--model", "no-such-model"], "no-such-model"),
        (["--model", "./no/such/folder"], "no/such/folder"),
    ],
)
def test_wrong_options(arguments: list[str], says: str) -> None:
    refused(*arguments, code=2, says=says)


def test_blocks_that_the_model_does_not_have(checkpoint: Path) -> None:
    refused("--model", str(checkpoint), "--blocks", "4:9", code=2, says="4:9 .* 6 blocks")


def test_a_port_in_use(checkpoint: Path) -> None:
    with closing(socket.socket()) as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused("--model", str(checkpoint), "--port", str(port), code=2, says=f"{port}.*in use")


def test_an_initial_peer_that_is_not_there(checkpoint: Path) -> None:
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"/ip4/127.0.0.1/tcp/{port}/p2p/{Identity.generate().peer}"
    refused("--model", str(checkpoint), *LOCAL, "--initial-peers", address, code=1, says="cannot be reached")


@pytest.mark.parametrize("content", [b"", b"no key", bytes(range(68))], ids=["empty", "text", "bytes"])
def test_a_key_file_that_is_none(tmp_path: Path, checkpoint: Path, content: bytes) -> None:
    key = tmp_path / "key"
    key.write_bytes(content)
    key.chmod(0o600)
    refused("--model", str(checkpoint), *LOCAL, "--identity", str(key), code=2, says=str(key))


def test_a_key_file_that_is_a_folder(tmp_path: Path, checkpoint: Path) -> None:
    refused("--model", str(checkpoint), *LOCAL, "--identity", str(tmp_path), code=2, says=str(tmp_path))


def corrupted(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    match how:
        case "cut short":
            weights.write_bytes(weights.read_bytes()[:-1000])
        case "garbage":
            weights.write_bytes(os.urandom(10_000))
        case "wrong shape":
            config = folder / "config.json"
            config.write_text(
                config.read_text().replace('"intermediate_size": 48', '"intermediate_size": 40')
            )
        case "no weights":
            weights.unlink()
        case "no config":
            (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("cut short", "model.safetensors is truncated"),
        ("garbage", "model.safetensors is"),
        ("wrong shape", r"down_proj.* shape \[32, 48\]"),
        ("no weights", "no safetensors weights"),
        ("no config", "no config.json"),
    ],
)
def test_a_corrupt_checkpoint(tmp_path: Path, checkpoint: Path, how: str, says: str) -> None:
    folder = tmp_path / "corrupt"
    shutil.copytree(checkpoint, folder)
    corrupted(folder, how)
    refused("--model", str(folder), *LOCAL, code=2, says=says)


EVICTED_WITHIN = 5.0
HEAVY_BYTES = 100 * 2**20
"""More than what a process's memory goes up and down by for other reasons."""


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose blocks take `HEAVY_BYTES` at least."""
    folder = tmp_path_factory.mktemp("heavy")
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "head_dim": 64}
    config = transformers.LlamaConfig(**{**COMMON, **shape, "num_key_value_heads": 8})
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


async def test_evicted_on_request_it_gives_memory_back_and_loads_again_for_the_next_session(
    tmp_path: Path, heavy: Path
) -> None:
    model = resolve(str(heavy))
    options = ("--dtype", "float32", "--metrics-port", "0")
    async with serving(tmp_path, heavy, *options) as server, client_of(server) as (transport, store):
        calls = await opened(transport, server, model, "a")
        before = await stepped_bytes(calls, model, "a")
        held = memory_of(server)
        assert (await shard_of(server))["loaded"] == [0, model.num_blocks]
        os.kill(server.pid, signal.SIGUSR1)
        await said(server, EVICTED_WITHIN, event="joining", asleep=True)
        await until_freed(server, held - HEAVY_BYTES * 4 // 5)  # the heap keeps some
        shard = await shard_of(server)
        assert (shard["asleep"], shard["loaded"], shard["bytes"], shard["dtype"]) == (
            True,
            None,
            0,
            "float32",
        )
        with pytest.raises(Refused) as refused:
            await stepped(calls, model, "a", 1)
        assert refused.value.error.code == "unknown_session"
        (entry,) = await list_models(store)
        await until_asleep(store, entry)
        with pytest.raises(Refused) as refused:
            await opened(transport, server, model, "b")
        assert refused.value.error.code == "warming_up"
        assert refused.value.error.retry_after
        await said(server, START, times=2, event="serving")
        again = await opened(transport, server, model, "b")
        assert await stepped_bytes(again, model, "b") == before
        (listed,) = await list_peers(store, entry)
        assert (listed.state, listed.asleep) == ("serving", False)
        server.terminate()
        assert await server.wait_ended() == 0


async def test_it_is_evicted_after_idleness_and_ends_if_it_cannot_load_again(
    tmp_path: Path, checkpoint: Path, model: Model
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder)
    async with (
        serving(tmp_path, folder, "--evict-after", "1s") as server,
        client_of(server) as (transport, _),
    ):
        calls = await opened(transport, server, model, "a")
        await asyncio.sleep(2)
        assert not any("asleep" in event for event in server.events), "a session is open"
        calls.close()
        await said(server, EVICTED_WITHIN, event="joining", asleep=True)
        corrupted(folder, "cut short")
        with pytest.raises(Refused):
            await opened(transport, server, model, "b")
        async with asyncio.timeout(START):
            assert await server.wait_ended() == 2
        assert "truncated" in server.failure().message


async def stepped_bytes(calls: MessageStream, model: Model, sign: str) -> bytes:
    """What a first step of three tokens gives."""
    step = messages.Step(
        session_id=sign * 32,
        number=time.monotonic_ns(),
        seq_pos=0,
        payload_type="token_ids",
        response_type="hidden_states",
        shape=(3,),
        dtype="uint32",
    )
    size = 3 * model.hidden_size * 4
    _, data = await calls.call(step, array("I", [5, 6, 7]).tobytes(), timeout=10, max_body=size)
    return bytes(data)


async def said(server: ServerProcess, timeout: float, *, times: int = 1, **event: object) -> None:
    """Wait until the server has said `event`, as one of its fields' values, so many times."""
    async with asyncio.timeout(timeout):
        while True:
            if sum(event.items() <= one.items() for one in server.events) >= times:
                return
            await asyncio.sleep(0.05)


async def until_asleep(store: KademliaStore, entry: ModelEntry) -> None:
    """Wait until the one server of the model is announced as asleep."""
    async with asyncio.timeout(EVICTED_WITHIN):
        while True:
            (listed,) = await list_peers(store, entry)
            if listed.asleep:
                return
            await asyncio.sleep(0.05)


async def shard_of(server: ServerProcess) -> dict[str, Any]:
    """The state of the shard, as the metrics endpoint tells it."""
    url = (await server.wait_for("metrics", START))["url"].replace("/metrics", "/shard")
    answer = await asyncio.to_thread(lambda: urlopen(url, timeout=10).read())
    return dict(json.loads(answer))


async def until_freed(server: ServerProcess, size: int) -> None:
    """Wait until the server takes `size` bytes at most."""
    left_at = time.monotonic() + EVICTED_WITHIN
    while (taken := memory_of(server)) > size:
        assert time.monotonic() < left_at, f"{taken / 2**20:.0f} MiB, not {size / 2**20:.0f}, are taken"
        await asyncio.sleep(0.05)


async def test_malformed_frames_end_their_streams_and_nothing_else(
    tmp_path: Path, checkpoint: Path, model: Model
) -> None:
    async with serving(tmp_path, checkpoint) as server, client_of(server) as (transport, _):
        calls = await opened(transport, server, model, "a")
        await stepped(calls, model, "a")
        await flood(transport, server, FRAMES // 5)
        before = memory_of(server)
        await flood(transport, server, FRAMES - FRAMES // 5)
        grown = memory_of(server) - before
        assert (await stepped(calls, model, "a", 1)).seq_pos == 1
        assert isinstance(await opened(transport, server, model, "b"), MessageStream)
        assert grown < 16 * 2**20, f"{grown / 2**20:.1f} MiB more after {FRAMES} malformed frames"


async def flood(transport: Libp2pTransport, server: ServerProcess, count: int) -> None:
    """Send `count` malformed frames of all kinds, each on a stream of its own, which the server closes."""
    listening = await server.wait_for("listening", START)
    turn = iter(range(count))

    async def send_some() -> None:
        for number in turn:
            stream = await transport.open_stream(listening["peer"], listening["addresses"])
            assert isinstance(stream, Libp2pStream)
            try:
                async with asyncio.timeout(30):
                    await send_malformed(stream, number)
                    while True:
                        await stream.receive()
            except SwarmError:
                pass
            finally:
                stream.close()

    async with asyncio.TaskGroup() as tasks:
        for _ in range(AT_ONCE):
            tasks.create_task(send_some())


async def send_malformed(stream: Libp2pStream, number: int) -> None:
    match number % 5:
        case 0:
            await stream.send(os.urandom(50))
        case 1:
            await stream.send(messages.encode(messages.Ping(nonce=1)), b"with a body")
        case 2:
            await stream.send(messages.encode(messages.Pong(nonce=1)))
        case 3:
            stream._writer.write(b"\xff" * 8 + os.urandom(100))
        case 4:
            stream._writer.write(os.urandom(1000))


def memory_of(server: ServerProcess) -> int:
    """Resident bytes of the server, its daemon aside."""
    return int(psutil.Process(server.pid).memory_info().rss)
