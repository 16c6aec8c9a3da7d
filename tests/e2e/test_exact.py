"""The real chat model over real processes and sockets: 64 greedy tokens for 8 prompts, to the token."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import swarm
from swarm.blocks.models import Model, resolve
from swarm.client.facade import Swarm
from swarm.processes import ServerProcess, stop_all
from tests.forks import FORKS
from tests.tiny import greedy_choices

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300), pytest.mark.asyncio(loop_scope="module")]

SPANS = ("0:10", "10:20", "20:30")
PROMPTS = (
    "What is the capital of France?",
    "Write a haiku about rivers.",
    "Count from one to twenty in words.",
    "Explain, to a child, why the sky is blue.",
    "def fibonacci(n):",
    "Übersetze ins Englische: Guten Morgen, schöne Welt! 你好",
    "List three uses of a paper clip, then three of a brick. " * 12,
    "?",
)
TOKENS = 64
START = 90.0

Servers = tuple[list[ServerProcess], list[str]]


@pytest.fixture(scope="module")
def model() -> Model:
    return resolve()


@dataclass
class Unsplit:
    """The same model in this process, as transformers runs it."""

    whole: Any
    tokenizer: Any

    def check(self, answers: Sequence[list[int]]) -> None:
        """Fail unless these are what it answers to the first of `PROMPTS`, greedily."""
        for prompt, answer in zip(PROMPTS, answers, strict=False):
            assert len(answer) == TOKENS
            assert answer == greedy_choices(self.whole, chat_tokens(self.tokenizer, prompt), answer), prompt


@pytest.fixture(scope="module")
def unsplit(model: Model) -> Unsplit:
    whole = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32).eval()
    return Unsplit(whole, AutoTokenizer.from_pretrained(model.path))


def chat_tokens(tokenizer: Any, prompt: str) -> list[int]:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    return list(tokenizer(text, add_special_tokens=False).input_ids)


@asynccontextmanager
async def three_servers(folder: Path, dtype: str) -> AsyncIterator[Servers]:
    """Servers of a third of the model each, all serving, and the addresses to join them by."""
    local = ["--dtype", dtype, "--threads", "1", "--host-maddrs", "/ip4/127.0.0.1/tcp/0", "--exit-with-stdin"]
    servers = [
        ServerProcess(
            [*local, "--blocks", span], name=f"blocks-{span}", log=folder / f"{span}.log", launcher=FORKS
        )
        for span in SPANS
    ]
    try:
        await servers[0].start()
        addresses = (await servers[0].wait_for("listening", START))["addresses"]
        for server in servers[1:]:
            await server.start(["--initial-peers", *addresses])
        for server in servers:
            await server.wait_for("serving", START)
        yield servers, addresses
    finally:
        await stop_all(servers)


async def answers(client: Swarm, prompts: Sequence[str] = PROMPTS) -> list[list[int]]:
    """All prompts at once: sessions share the servers."""
    streams = [client.stream(prompt, max_new_tokens=TOKENS, ignore_eos=True) for prompt in prompts]
    return [list(answer.token_ids) for answer in await asyncio.gather(*(one.result() for one in streams))]


async def test_greedy_tokens_equal_those_of_transformers(unsplit: Unsplit, tmp_path: Path) -> None:
    async with (
        three_servers(tmp_path, "float32") as (_, addresses),
        swarm.connect(addresses, dtype="float32") as client,
    ):
        found = await answers(client)
        assert [str(hop.span) for hop in client.route().hops] == list(SPANS)
    await asyncio.to_thread(unsplit.check, found)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def halves(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Servers]:
    """Three servers in half precision. The last test here kills one of them."""
    async with three_servers(tmp_path_factory.mktemp("halves"), "float16") as servers:
        yield servers


async def test_half_precision_weights_choose_the_same_tokens_here(unsplit: Unsplit, halves: Servers) -> None:
    """The checkpoint's 16-bit weights lose next to nothing as float16."""
    _, addresses = halves
    async with swarm.connect(addresses, dtype="float16") as client:
        found = await answers(client, PROMPTS[:3])
    await asyncio.to_thread(unsplit.check, found)


async def test_a_server_killed_during_an_answer_is_named_in_one_sentence(halves: Servers) -> None:
    servers, addresses = halves
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "swarm.client", "generate", "Tell me a very long story.", "--ignore-eos"),
        *("--max-new-tokens", "2000", "--timeout", "10", "--json", "--initial-peers", *addresses),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    await asyncio.sleep(0)
    async with asyncio.timeout(START):
        while not await is_busy(servers[1]):
            assert process.returncode is None, "the answer is over, and no server was killed yet"
        servers[1].kill()
        out, err = await process.communicate()
    assert process.returncode == 1
    assert b"Traceback" not in err
    error = json.loads(out.splitlines()[-1])
    assert error["event"] == "error"
    assert "blocks 10 to 19" in error["message"]


async def is_busy(server: ServerProcess) -> bool:
    """Whether the server computes: its processor time grows."""

    process = psutil.Process(server.pid)
    before = sum(process.cpu_times()[:2])
    await asyncio.sleep(1.0)
    return sum(process.cpu_times()[:2]) - before > 0.15
