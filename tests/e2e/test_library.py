"""The library as its pages show it: their code is run, over real servers, and says what they say it does."""

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from swarm import AutoDistributedModelForCausalLM, InputError
from swarm.blocks.models import resolve
from swarm.option_values import PEERS_VARIABLE
from swarm.processes import ServerProcess, stop_all
from tests.forks import FORKS
from tests.notebook import code_cells

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300), pytest.mark.asyncio(loop_scope="module")]

DOCS = Path(__file__).parents[2] / "docs"
START = 90.0
RUN = 200.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def addresses(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[list[str]]:
    """Two servers of half of the small chat model each, and how to join them."""
    folder = tmp_path_factory.mktemp("servers")
    local = ["--dtype", "float32", "--threads", "1", "--host-maddrs", "/ip4/127.0.0.1/tcp/0"]
    servers = [
        ServerProcess(
            [*local, "--exit-with-stdin", "--blocks", blocks],
            name=blocks,
            log=folder / f"{number}.log",
            launcher=FORKS,
        )
        for number, blocks in enumerate(("0:15", "15:30"))
    ]
    try:
        await servers[0].start()
        found = list((await servers[0].wait_for("listening", START))["addresses"])
        await servers[1].start(["--initial-peers", *found])
        for server in servers:
            await server.wait_for("serving", START)
        yield found
    finally:
        await stop_all(servers)


async def said_by(*command: str, **environment: str) -> str:
    """What a Python process prints that ends well."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **environment},
        cwd=DOCS.parent,
    )
    try:
        async with asyncio.timeout(RUN):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, err.decode()
    assert b"Traceback" not in err, err.decode()
    return out.decode()


async def test_the_page_does_what_it_says(
    addresses: list[str], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / "library.md").read_text(), re.DOTALL | re.MULTILINE)
    page = tmp_path / "page.py"
    page.write_text("\n".join(blocks))
    temporary = tmp_path_factory.mktemp("t")  # a socket lies in it, whose path must be short
    said = await said_by(str(page), **{PEERS_VARIABLE: " ".join(addresses), "TMPDIR": str(temporary)})
    assert "Once upon a time" in said
    assert said.count("Paris") >= 3, "asked in a session, by hand, and of connect_sync"
    assert "blocks 5:6" in said
    assert not list(temporary.iterdir()), "a client that was not closed leaves when the program ends"


async def test_the_notebook_says_what_is_written_in_it() -> None:
    notebook = DOCS / "notebook.ipynb"
    outputs = json.loads(await said_by("-m", "tests.notebook", str(notebook)))
    assert outputs == [cell["outputs"] for cell in code_cells(notebook)]


@pytest.fixture(scope="module")
def whole() -> Any:
    return AutoModelForCausalLM.from_pretrained(resolve().path, dtype=torch.float32).eval()


async def test_batches_and_sampling_equal_transformers(addresses: list[str], whole: Any) -> None:
    def compare() -> None:
        tokenizer = AutoTokenizer.from_pretrained(resolve().path, padding_side="left")
        prompts = ["The capital of France is", "Two plus two", "A swarm of bees, on a warm day in May,"]
        batch = tokenizer(prompts, padding=True, return_tensors="pt")
        with AutoDistributedModelForCausalLM.from_pretrained(
            initial_peers=addresses, torch_dtype=torch.float32
        ) as model:
            for settings in (
                {"do_sample": False, "max_new_tokens": 32},
                {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "max_new_tokens": 16},
            ):
                answers = []
                for one in (model, whole):
                    torch.manual_seed(3)
                    answers.append(one.generate(**batch, **settings))
                assert answers[0].equal(answers[1]), settings
            with torch.no_grad():
                states = whole(**batch, output_hidden_states=True).hidden_states
            found = model.transformer.h[7:22](states[7][2:])
            assert torch.allclose(found, states[22][2:], rtol=1e-3, atol=1e-2)

    await asyncio.to_thread(compare)


async def test_what_cannot_be_joined_is_said(addresses: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PEERS_VARIABLE, raising=False)
    load = AutoDistributedModelForCausalLM.from_pretrained
    with pytest.raises(InputError, match="no peer to join by"):
        load("smollm2-135m")
    with pytest.raises(InputError, match="float12"):
        load("smollm2-135m", initial_peers=addresses, dtype="float12")
    with pytest.raises(TypeError, match="tuning_mode"):
        load("smollm2-135m", initial_peers=addresses, tuning_mode="ptune")  # type: ignore[call-arg]
