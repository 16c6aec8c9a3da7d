"""Clients as processes of their own, and both ends of what is said between them and who measures.

`python -m benchmarks.clients ADDRESS... --model M --dtype D` is such a client. It joins, says `joined`,
and answers each question it is sent: the first token, then, when told to go on, the rest, so that many
clients can begin to decode at the same moment. All are JSON lines. Moments are in seconds of the
machine's monotonic clock, which its processes share.
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import torch
import uvloop

import swarm
from swarm.client.facade import Swarm
from swarm.client.options import GenerationOptions

PATIENCE = 300.0
"""Seconds that a client's next word is waited for: joining imports torch, sixteen times on two cores."""

MAX_LINE_BYTES = 2**20
GO = "go"


@dataclass(frozen=True)
class Answer:
    """`moments` are when pieces of text came, the first of them before all clients went on together."""

    token_ids: tuple[int, ...]
    ttft_ms: float
    moments: tuple[float, ...]

    @property
    def gaps(self) -> list[float]:
        """Seconds between successive pieces after the first two: the second one waited for the others."""
        return [later - earlier for earlier, later in zip(self.moments[1:], self.moments[2:], strict=False)]


class ClientProcess:
    """The measuring end of one client."""

    def __init__(self, process: asyncio.subprocess.Process):
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    async def joined(self) -> None:
        await self._hear()

    async def prefill(self, prompt: Sequence[int], tokens: int) -> None:
        """Ask for `tokens` tokens, and return when the first one is there."""
        self._say({"prompt": list(prompt), "tokens": tokens})
        await self._hear()

    async def decode(self) -> Answer:
        """Let the client go on, and return its whole answer."""
        self._say(GO)
        said = await self._hear()
        return Answer(tuple(said["token_ids"]), said["ttft_ms"], tuple(said["moments"]))

    def _say(self, word: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(word).encode() + b"\n")

    async def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        async with asyncio.timeout(PATIENCE):
            line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError("A client ended before it had answered; its last words are above.")
        said: dict[str, Any] = json.loads(line)
        return said


@asynccontextmanager
async def joined_clients(
    addresses: Sequence[str], model: str, dtype: str, count: int
) -> AsyncIterator[list[ClientProcess]]:
    """`count` clients that have joined the swarm of `addresses`."""
    command = [sys.executable, "-m", "benchmarks.clients", *addresses, "--model", model, "--dtype", dtype]
    pipe = asyncio.subprocess.PIPE
    processes: list[asyncio.subprocess.Process] = []
    try:
        for _ in range(count):
            processes.append(
                await asyncio.create_subprocess_exec(
                    *command, stdin=pipe, stdout=pipe, limit=MAX_LINE_BYTES, start_new_session=True
                )
            )
        clients = [ClientProcess(process) for process in processes]
        await asyncio.gather(*(client.joined() for client in clients))
        yield clients
    finally:
        for process in processes:
            assert process.stdin is not None
            process.stdin.close()
        await asyncio.gather(*(process.wait() for process in processes))


async def _be_client(args: argparse.Namespace) -> None:
    lines = await _standard_input()
    async with swarm.connect(args.addresses, args.model, dtype=args.dtype, timeout=PATIENCE) as client:
        _tell({"event": "joined"})
        while line := await lines.readline():
            asked = json.loads(line)
            await _answer(client, lines, asked["prompt"], asked["tokens"])


async def _answer(client: Swarm, lines: asyncio.StreamReader, prompt: list[int], tokens: int) -> None:
    stream = client.stream_tokens(prompt, GenerationOptions(max_new_tokens=tokens, ignore_eos=True))
    moments: list[float] = []
    async for _ in stream:
        moments.append(time.monotonic())
        if len(moments) == 1:
            _tell({"event": "first"})
            await lines.readline()
    done = stream.generation
    assert done is not None
    _tell({"event": "answer", "token_ids": done.token_ids, "ttft_ms": done.ttft_ms, "moments": moments})


async def _standard_input() -> asyncio.StreamReader:
    reader = asyncio.StreamReader(MAX_LINE_BYTES)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    return reader


def _tell(event: dict[str, Any]) -> None:
    print(json.dumps(event), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("addresses", nargs="+")
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", required=True)
    torch.set_num_threads(1)
    uvloop.run(_be_client(parser.parse_args()))


if __name__ == "__main__":
    main()
