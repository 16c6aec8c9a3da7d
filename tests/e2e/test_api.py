"""`serve` over real processes with the small chat model, asked by the openai client and held to the model."""

import asyncio
import json
import re
import shutil
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx2
import openai
import pytest
import pytest_asyncio
import torch
from pydantic import BaseModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from swarm.blocks.models import resolve
from swarm.processes import ServerProcess, stop_all
from tests.forks import FORKS
from tests.tiny import greedy

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300), pytest.mark.asyncio(loop_scope="module")]

START = 90.0
KEY = "a key for tests"
NAME = "smollm2-tools"
FREED_WITHIN = 1.0
AT_ONCE = 32

HELD = re.compile(r'^(?:swarm_sessions(?:\{.*\})?|swarm_kv_pages\{state="used"\}) (\S+)$', re.MULTILINE)

ASKED: Any = [{"role": "user", "content": "What is the capital of France?"}]

TOOLS = """\
{%- if tools %}<|im_start|>system
Call a function as <tool_call>{"name": ..., "arguments": {...}}</tool_call>: {{ tools | tojson }}<|im_end|>
{% endif %}"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small chat model, whose chat template knows tools as well."""
    original, folder = resolve().path, tmp_path_factory.mktemp("model") / NAME
    folder.mkdir()
    for file in Path(original).iterdir():
        if "tokenizer_config" in file.name or file.name == "chat_template.jinja":
            shutil.copy(file, folder)
        else:
            (folder / file.name).symlink_to(file)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TOOLS + tokenizer.chat_template
    (folder / "tokenizer.json").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass
class Local:
    """The same model in this process."""

    model: Any
    tokenizer: Any

    def chat(self, messages: Any) -> list[int]:
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def greedy(self, messages: Any, count: int) -> str:
        return self._text(greedy(self.model, self.chat(messages), count))

    def all_greedy(self, asked: Sequence[Any], count: int) -> list[str]:
        """Of several conversations, in one batch."""
        prompts = [{"input_ids": self.chat(messages)} for messages in asked]
        batch = self.tokenizer.pad(prompts, padding_side="left", return_tensors="pt")
        with torch.inference_mode():
            out = self.model.generate(**batch, max_new_tokens=count, do_sample=False, pad_token_id=0)
        return [self._text(row) for row in out[:, batch.input_ids.shape[1] :].tolist()]

    def _text(self, tokens: list[int]) -> str:
        if self.tokenizer.eos_token_id in tokens:
            tokens = tokens[: tokens.index(self.tokenizer.eos_token_id)]
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def logprobs(self, tokens: list[int]) -> torch.Tensor:
        """Of every token after each of `tokens`, [tokens, vocabulary]."""
        with torch.inference_mode():
            logits: torch.Tensor = self.model(torch.tensor([tokens])).logits[0]
        return logits.log_softmax(-1)


@pytest.fixture(scope="module")
def local(checkpoint: Path) -> Local:
    whole = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    return Local(whole, AutoTokenizer.from_pretrained(checkpoint))


@dataclass
class Running:
    """A swarm of two servers, the API over it, and a client of that."""

    url: str
    client: openai.AsyncOpenAI
    metrics: list[str]

    async def chat(self, **asked: Any) -> Any:
        given = {"model": NAME, "messages": ASKED, "temperature": 0, "max_tokens": 24, **asked}
        return await self.client.chat.completions.create(**given)

    async def said(self, **asked: Any) -> str:
        return str((await self.chat(**asked)).choices[0].message.content)

    async def complete(self, **asked: Any) -> Any:
        given = {"model": NAME, "prompt": "The capital of France is", "temperature": 0, **asked}
        return await self.client.completions.create(**given)

    async def held(self) -> int:
        """How many sessions, and pages for them, the servers hold."""
        async with httpx2.AsyncClient() as http:
            texts = [(await http.get(url)).text for url in self.metrics]
        found = [HELD.findall(text) for text in texts]
        assert all(len(counts) == 2 for counts in found)
        return sum(int(float(count)) for counts in found for count in counts)

    async def until_free(self) -> float:
        """Seconds until the servers hold nothing."""
        started = time.monotonic()
        await self.until(lambda held: held == 0)
        return time.monotonic() - started

    async def until(self, holds: Callable[[int], bool]) -> None:
        """Wait until that `holds` of what the servers hold."""
        while not holds(await self.held()):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def api(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> AsyncIterator[Running]:
    folder = tmp_path_factory.mktemp("api")
    common = ["--model", str(checkpoint), "--dtype", "float32", "--threads", "1", "--exit-with-stdin"]
    common += ["--host-maddrs", "/ip4/127.0.0.1/tcp/0", "--metrics-port", "0"]
    processes = [
        ServerProcess([*common, "--blocks", span], name=span, log=folder / f"{at}.log", launcher=FORKS)
        for at, span in enumerate(("0:15", "15:30"))
    ]
    keys = folder / "keys"
    keys.write_text(f"{KEY}\n")
    asked = ["serve", "--model", str(checkpoint), "--port", "0", "--api-key-file", str(keys)]
    api = ServerProcess(asked, name="api", log=folder / "api.log", module="swarm.client")
    try:
        await processes[0].start()
        peers = (await processes[0].wait_for("listening", START))["addresses"]
        await processes[1].start(["--initial-peers", *peers])
        for server in processes:
            await server.wait_for("serving", START)
        await api.start(["--initial-peers", *peers])
        url = (await api.wait_for("listening", START))["url"]
        client = openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=120)
        metrics = [(await server.wait_for("metrics", START))["url"] for server in processes]
        async with client:
            yield Running(url, client, metrics)
    finally:
        await stop_all([api, *processes])
    assert "Traceback" not in api.log.read_text()


async def test_an_answer_is_the_models_own(api: Running, local: Local) -> None:
    expected = local.greedy(ASKED, 24)
    answer = await api.chat()
    assert answer.choices[0].message.content == expected
    assert answer.usage.prompt_tokens == len(local.chat(ASKED))
    stream = await api.chat(stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == expected
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
    assert [model.id async for model in api.client.models.list()] == [NAME]


async def test_many_ask_at_once(api: Running, local: Local) -> None:
    asked: list[Any] = [[{"role": "user", "content": f"Say the number {at}."}] for at in range(AT_ONCE)]
    answers = await asyncio.gather(
        *(api.said(messages=messages, max_tokens=8) for messages in asked), return_exceptions=True
    )
    assert answers == local.all_greedy(asked, 8)
    assert await api.until_free() < FREED_WITHIN


async def test_what_is_sampled_comes_again_with_its_seed(api: Running) -> None:
    asked: dict[str, Any] = {"temperature": 1.2, "n": 2, "top_p": 0.95, "max_tokens": 12}
    more = {"extra_body": {"top_k": 50, "min_p": 0.01, "repetition_penalty": 1.1}}
    first, second, other = [
        [one.message.content for one in (await api.chat(seed=seed, **asked, **more)).choices]
        for seed in (1, 1, 2)
    ]
    assert first == second != other
    assert first[0] != first[1]


async def test_streams_tell_what_whole_answers_do(api: Running) -> None:
    asked: dict[str, Any] = {"n": 2, "temperature": 1.0, "seed": 7, "max_tokens": 12, "stop": ["ing", "."]}
    answer = await api.chat(**asked, logprobs=True, top_logprobs=2)
    texts, scores = ["", ""], [[], []]  # type: tuple[list[str], list[list[Any]]]
    async for chunk in await api.chat(**asked, logprobs=True, top_logprobs=2, stream=True):
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        scores[choice.index] += choice.logprobs.content if choice.logprobs else []
    assert texts == [choice.message.content for choice in answer.choices]
    assert scores == [choice.logprobs.content for choice in answer.choices]
    whole = await api.complete(**asked, logprobs=2, echo=True)
    tokens: list[list[str]] = [[], []]
    async for chunk in await api.complete(**asked, logprobs=2, echo=True, stream=True):
        [choice] = chunk.choices
        tokens[choice.index] += choice.logprobs.tokens
    assert tokens == [choice.logprobs.tokens for choice in whole.choices]


async def test_penalties_and_biases(api: Running, local: Local) -> None:
    plain = await api.said(messages=[{"role": "user", "content": "Write 'ha' many times."}], max_tokens=40)
    less = await api.said(
        messages=[{"role": "user", "content": "Write 'ha' many times."}],
        max_tokens=40,
        frequency_penalty=2.0,
        presence_penalty=2.0,
    )
    assert plain != less
    [token] = local.tokenizer(" river").input_ids
    assert await api.said(logit_bias={str(token): 100}, max_tokens=3) == " river river river"


async def test_stops_and_lengths(api: Running, local: Local) -> None:
    whole = local.greedy(ASKED, 24)
    stop = whole[8:11]
    answer = (await api.chat(stop=[stop, "unlikely"])).choices[0]
    assert (answer.message.content, answer.finish_reason) == (whole[: whole.index(stop)], "stop")
    short = (await api.chat(max_completion_tokens=3, max_tokens=openai.omit)).choices[0]
    assert short.finish_reason == "length"


async def test_log_probabilities_are_the_models(api: Running, local: Local) -> None:
    answer = await api.chat(logprobs=True, top_logprobs=3, max_tokens=6)
    told = answer.choices[0].logprobs.content
    assert "".join(one.token for one in told) == answer.choices[0].message.content
    tokens = local.chat(ASKED)
    for one in told:
        row = local.logprobs(tokens)[-1]
        best = row.topk(3)
        assert one.logprob == pytest.approx(float(best.values[0]), abs=1e-3)
        assert [top.logprob for top in one.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-3)
        tokens.append(int(best.indices[0]))


async def test_a_prompt_is_scored_as_the_model_does(api: Running, local: Local) -> None:
    texts = ["The capital of France is Paris.", "Roses are red, violets are"]
    tokens: list[list[int]] = [local.tokenizer(text).input_ids for text in texts]
    for prompt in (texts, tokens):
        answer = await api.complete(prompt=prompt, echo=True, logprobs=1, max_tokens=1)
        for choice, ids, text in zip(answer.choices, tokens, texts, strict=True):
            rows = local.logprobs(ids)
            expected = [float(rows[at, token]) for at, token in enumerate(ids[1:])]
            told = choice.logprobs
            assert choice.text.startswith(text)
            assert told.token_logprobs[0] is None
            assert told.token_logprobs[1:-1] == pytest.approx(expected, abs=1e-3)
            assert len(told.tokens) == len(ids) + 1
            assert [max(top.values()) for top in told.top_logprobs[1:]] == pytest.approx(
                rows.max(-1).values.tolist(), abs=1e-3
            )


async def test_completions_go_on_with_their_prompt(api: Running, local: Local) -> None:
    tokens = local.tokenizer("The capital of France is").input_ids
    expected = local.tokenizer.decode(greedy(local.model, tokens, 8))
    assert (await api.complete(max_tokens=8)).choices[0].text == expected
    stream = await api.complete(max_tokens=8, stream=True, echo=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "The capital of France is" + expected


SCHEMA: Any = {
    "type": "object",
    "properties": {"town": {"type": "string", "maxLength": 20}, "people": {"type": "integer"}},
    "required": ["town", "people"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0, 1.5])
async def test_answers_have_the_form_that_was_asked_for(api: Running, temperature: float) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "town", "schema": SCHEMA, "strict": True}}
    asked: dict[str, Any] = {"temperature": temperature, "seed": 5, "max_tokens": 200}
    found = json.loads(await api.said(response_format=wanted, **asked))
    assert set(found) == {"town", "people"}
    assert isinstance(found["people"], int)
    answer = (await api.chat(response_format={"type": "json_object"}, **asked)).choices[0]
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(answer.message.content), dict)
    assert answer.message.content.startswith("{")


TOOL: Any = {"type": "function", "function": {"name": "count", "parameters": SCHEMA}}


async def test_tools(api: Running) -> None:
    asked: dict[str, Any] = {"tools": [TOOL], "tool_choice": "required", "max_tokens": 200}
    answer = (await api.chat(**asked, parallel_tool_calls=False)).choices[0]
    [call] = answer.message.tool_calls
    assert (call.function.name, answer.finish_reason) == ("count", "tool_calls")
    assert set(json.loads(call.function.arguments)) == {"town", "people"}
    stream = await api.chat(**asked, parallel_tool_calls=False, stream=True)
    parts = [part async for chunk in stream async for part in _calls(chunk)]
    assert "".join(part.function.arguments for part in parts) == call.function.arguments
    after: Any = [
        *ASKED,
        answer.message.model_dump(),
        {"role": "tool", "tool_call_id": call.id, "content": "Paris"},
    ]
    assert (await api.chat(messages=after, tools=[TOOL])).choices[0].finish_reason


class Town(BaseModel):
    town: Literal["Paris", "Rome"]
    people: int


async def test_what_the_openai_client_makes_of_answers(api: Running) -> None:
    """Its own readers of streams and of schemas, which hold every chunk to its shape."""
    asked: dict[str, Any] = {"model": NAME, "messages": ASKED, "temperature": 0, "max_tokens": 60}
    parsed = await api.client.chat.completions.parse(**asked, response_format=Town)
    assert isinstance(parsed.choices[0].message.parsed, Town)
    async with api.client.chat.completions.stream(**asked, response_format=Town) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.parsed == parsed.choices[0].message.parsed
    tool = openai.pydantic_function_tool(Town, name="visit")
    called = await api.client.chat.completions.parse(
        **asked, tools=[tool], tool_choice="required", parallel_tool_calls=False
    )
    assert isinstance(called.choices[0].message.tool_calls[0].function.parsed_arguments, Town)  # type: ignore[index]


async def _calls(chunk: Any) -> AsyncIterator[Any]:
    for call in chunk.choices[0].delta.tool_calls or []:
        yield call


async def test_refusals(api: Running) -> None:
    with pytest.raises(openai.BadRequestError) as unknown:
        await api.chat(extra_body={"wish": 1})
    assert unknown.value.param == "wish"
    with pytest.raises(openai.AuthenticationError):
        await api.client.with_options(api_key="another").models.list()
    with pytest.raises(openai.NotFoundError):
        await api.chat(model="gpt-4o")
    with pytest.raises(openai.NotFoundError):
        await api.client.embeddings.create(model=NAME, input="x")
    with pytest.raises(openai.BadRequestError) as long:
        await api.said(messages=[{"role": "user", "content": "word " * 10_000}])
    assert long.value.code == "context_length_exceeded"


@pytest.mark.parametrize("stream", [True, False])
async def test_who_disconnects_frees_the_session(api: Running, stream: bool) -> None:
    asking = asyncio.create_task(
        api.chat(stream=stream, max_tokens=2000, extra_body={"ignore_eos": True}), name="ask"
    )
    await api.until(lambda held: held > 0)
    if stream:
        answer = await asking
        await anext(aiter(answer))
        await answer.close()
    else:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    assert await api.until_free() < FREED_WITHIN
