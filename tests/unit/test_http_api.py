"""The API over a toy swarm, asked by the openai client: answers, streams, refusals, who may ask."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import openai
import pytest

from swarm.client.http.requests import ChatRequest, CompletionRequest
from swarm.client.http.site import ApiSite, SiteOptions
from swarm.net.messages import Error
from swarm.net.virtual_time import in_virtual_time
from swarm.spans import Span
from tests.byte_tokenizer import byte_tokenizer
from tests.toy_swarm import Toy, scripted, toy_swarm

SPANS = {"one": Span(0, 3), "two": Span(3, 6)}
HELLO: Any = [{"role": "user", "content": "hi"}]
PROMPT = "u:hi\na:"
STREAMED: dict[str, Any] = {"model": "toy", "messages": HELLO, "stream": True, "temperature": 0}


class Asking:
    """A request whose client may leave; what it was sent stands in `sent`."""

    def __init__(self, body: dict[str, Any]):
        self.sent: list[Any] = []
        self.news = asyncio.Event()
        self._left = asyncio.Event()
        self._body: bytes | None = json.dumps(body).encode()
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "path": "/v1/chat/completions",
            "raw_path": b"/v1/chat/completions",
            "query_string": b"",
            "root_path": "",
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        }

    @property
    def text(self) -> str:
        """What of the body was sent by now."""
        return b"".join(message.get("body", b"") for message in self.sent).decode()

    @property
    def events(self) -> list[Any]:
        lines = self.text.strip().split("\n\n")
        return [json.loads(line.removeprefix("data: ")) for line in lines if line not in ("", "data: [DONE]")]

    @property
    def said(self) -> str:
        return "".join(
            choice["delta"].get("content", "") for event in self.events for choice in event.get("choices", [])
        )

    def leave(self) -> None:
        self._left.set()

    async def receive(self) -> Any:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)
        self.news.set()


@dataclass
class Api:
    """A site over a toy swarm, and the openai client that asks it."""

    toy: Toy
    site: ApiSite
    http: httpx2.AsyncClient
    client: openai.AsyncOpenAI

    async def chat(self, **asked: Any) -> Any:
        return await self.client.chat.completions.create(**{"model": "toy", "messages": HELLO, **asked})

    async def complete(self, **asked: Any) -> Any:
        return await self.client.completions.create(**{"model": "toy", "prompt": "abc", **asked})

    async def chunks(self, **asked: Any) -> list[Any]:
        stream = await self.chat(stream=True, **asked)
        return [chunk async for chunk in stream]

    def post(self, path: str, body: Any, **headers: str) -> Any:
        return self.http.post(path, json=body, headers=headers)

    @property
    def sessions(self) -> int:
        return sum(map(len, self.toy.sessions.values()))


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


@asynccontextmanager
async def api(
    text: bytes | None = None, prompt: str = PROMPT, *, seconds: float = 0.0, **more: Any
) -> AsyncIterator[Api]:
    """A model that answers `prompt` with `text`, on servers whose steps take `seconds`."""
    options = SiteOptions(**more.pop("site", {}))
    if text is not None:
        more["next_token"] = scripted(len(prompt), text)
    async with toy_swarm(more.pop("spans", SPANS), **more) as toy:
        toy.ends.tokenizer = byte_tokenizer()  # type: ignore[assignment]
        for server in toy.servers.values():
            server.seconds = seconds
        site = ApiSite(toy.swarm, options)
        transport = httpx2.ASGITransport(site.app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as http:
            client = openai.AsyncOpenAI(
                api_key=options.keys[0] if options.keys else "none",
                base_url="http://localhost/v1",
                http_client=http,
                max_retries=0,
            )
            yield Api(toy, site, http, client)
        assert site.answers == 0


@in_virtual_time
async def test_a_chat_is_answered() -> None:
    async with api(b"Hello there") as it:
        answer = await it.chat(temperature=0)
        assert answer.object == "chat.completion"
        assert answer.id.startswith("chatcmpl-")
        assert answer.model == "toy"
        choice = answer.choices[0]
        assert (choice.message.role, choice.message.content) == ("assistant", "Hello there")
        assert (choice.finish_reason, choice.logprobs) == ("stop", None)
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(PROMPT), 12)
        assert answer.usage.total_tokens == len(PROMPT) + 12
        assert answer.usage.prompt_tokens_details.cached_tokens == 0
        assert it.sessions == 0


@in_virtual_time
async def test_a_chat_streams() -> None:
    async with api("Grüße!".encode()) as it:
        chunks = await it.chunks(temperature=0, stream_options={"include_usage": True})
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "Grüße!"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 9
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


@in_virtual_time
async def test_a_stream_ends_as_the_protocol_says() -> None:
    async with api(b"ok") as it:
        body = {"model": "toy", "messages": HELLO, "stream": True, "temperature": 0}
        answer = await it.post("/v1/chat/completions", body)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])
    assert "usage" not in answer.text


ROUTE: Any = {"include_route": True}
PAIRS = {**SPANS, "third": Span(3, 6)}


@in_virtual_time
async def test_who_asks_is_told_the_route() -> None:
    async with api(b"How quick a brown fox jumps", seconds=0.1) as it:
        told = await it.chunks(temperature=0, stream_options=ROUTE)
        routes = [chunk.route for chunk in told if not chunk.choices]
        plain = await it.chunks(temperature=0, stream_options={"include_usage": True})
    assert not any(hasattr(chunk, "route") for chunk in plain)
    assert not told[0].choices
    assert len({chunk.id for chunk in told}) == 1
    first, last = routes[0], routes[-1]
    assert [(hop["name"], hop["blocks"]) for hop in first["hops"]] == [("one", [0, 3]), ("two", [3, 6])]
    assert (first["completion_tokens"], first["hops"][0]["steps"]) == (0, 0)
    assert (last["completion_tokens"], last["prompt_tokens"], last["cached_tokens"]) == (28, len(PROMPT), 0)
    assert last["hops"][0] | {"rtt_ms": 0, "peer": ""} == {
        "peer": "",
        "name": "one",
        "blocks": [0, 3],
        "steps": last["speculation"]["steps"],
        "rtt_ms": 0,
        "queue_ms": 1.0,
        "compute_ms": 2.0,
    }
    assert last["speculation"]["steps"] > 0
    assert last["tokens_per_s"] > 0 < last["ttft_ms"]
    assert (last["index"], last["changes"], last["recoveries"]) == (0, [], 0)
    assert 4 <= len(routes) <= 8, "it is told anew each second"


@in_virtual_time
async def test_a_recovery_is_told_as_it_happens() -> None:
    async with api(b"Hello there", seconds=0.1, spans=PAIRS) as it:
        asking = Asking({**STREAMED, "stream_options": ROUTE})
        running = asyncio.create_task(it.site.app(asking.scope, asking.receive, asking.send))
        await until(lambda: asking.said.startswith("He"))
        name = asking.events[0]["route"]["hops"][1]["name"]
        [other] = {"two", "third"} - {name}
        it.toy[name].kill()
        await running
        changes = [event["route"]["changes"] for event in asking.events if "route" in event]
        met = [(one["reason"], [hop["name"] for hop in one["to"]]) for [one] in filter(None, changes)]
        assert [to for _, to in met][:2] == [[], [other]]
        assert {reason for reason, _ in met} == {"closed the connection"}
        assert changes[-1][0]["blocks"] == [3, 6]
        assert [hop["name"] for hop in changes[-1][0]["from"]] == [name]
        last = [event["route"] for event in asking.events if "route" in event][-1]
        assert (last["hops"][1]["name"], last["recoveries"]) == (other, 1)
        assert last["replayed_tokens"] > 0
        assert asking.said == "Hello there"


@in_virtual_time
async def test_a_server_that_leaves_is_told_too() -> None:
    async with api(b"Hello there", seconds=0.1, spans=PAIRS) as it:
        asking = Asking({**STREAMED, "stream_options": ROUTE})
        running = asyncio.create_task(it.site.app(asking.scope, asking.receive, asking.send))
        await until(lambda: asking.said.startswith("He"))
        name = asking.events[0]["route"]["hops"][1]["name"]
        it.toy[name].leave_meanwhile()
        await running
        [change] = [event["route"] for event in asking.events if "route" in event][-1]["changes"]
        assert change["reason"] == "is about to leave"
        assert [[hop["name"] for hop in change[end]] for end in ("from", "to")] == [
            [name],
            [*({"two", "third"} - {name})],
        ]


@in_virtual_time
async def test_what_nobody_takes_over_is_told_before_the_end() -> None:
    async with api(timeout=2.0, seconds=0.1) as it:
        asking = Asking({**STREAMED, "stream_options": ROUTE, "ignore_eos": True})
        running = asyncio.create_task(it.site.app(asking.scope, asking.receive, asking.send))
        await until(lambda: len(asking.events) > 3)
        it.toy["two"].kill()
        await running
        *_, before, last = asking.events
        assert before["route"]["changes"][0]["to"] == []
        assert last["error"]["type"] == "server_error"


@pytest.mark.parametrize("n", [1, 3])
@in_virtual_time
async def test_completions_tell_the_route_of_each_choice(n: int) -> None:
    async with api(b"de", prompt="abc") as it:
        stream = await it.complete(temperature=0, stream=True, n=n, stream_options=ROUTE)
        chunks = [chunk async for chunk in stream]
    assert {chunk.route["index"] for chunk in chunks if not chunk.choices} == set(range(n))
    said = [choice for chunk in chunks for choice in chunk.choices]
    assert ["".join(one.text for one in said if one.index == at) for at in range(n)] == ["de"] * n


@in_virtual_time
async def test_choices_are_written_beside_each_other() -> None:
    async with api() as it:
        answer = await it.chat(n=3, max_tokens=5, temperature=2, seed=1)
        texts = [choice.message.content for choice in answer.choices]
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert answer.usage.prompt_tokens == len(PROMPT)
        assert answer.usage.completion_tokens == 15
        again = await it.chat(n=3, max_tokens=5, temperature=2, seed=1)
        assert [choice.message.content for choice in again.choices] == texts
        parts = ["", "", ""]
        for chunk in await it.chunks(n=3, max_tokens=5, temperature=2, seed=1):
            parts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        assert parts == texts


@in_virtual_time
async def test_stops_and_lengths() -> None:
    async with api(b"one, two, three") as it:
        assert (await it.chat(temperature=0, stop=", t")).choices[0].message.content == "one"
        several = await it.chat(temperature=0, stop=["x", "three", "two"])
        assert (several.choices[0].message.content, several.choices[0].finish_reason) == ("one, ", "stop")
        for name in ("max_tokens", "max_completion_tokens"):
            short = await it.chat(temperature=0, **{name: 4})
            assert (short.choices[0].message.content, short.choices[0].finish_reason) == ("one,", "length")


@in_virtual_time
async def test_penalties_and_biases_reach_the_choice() -> None:
    async with api(b"aaaaaa") as it:
        biased = await it.chat(temperature=0, max_tokens=3, logit_bias={str(ord("z")): 100})
        assert biased.choices[0].message.content == "zzz"
        banned = await it.chat(temperature=0, max_tokens=2, logit_bias={str(ord("a")): -100, "256": -100})
        assert "a" not in banned.choices[0].message.content
        plain = await it.chat(temperature=0, max_tokens=4, frequency_penalty=2, presence_penalty=2)
        assert plain.choices[0].message.content[:3] == "aaa"  # 10, then 6, 4, 2 and 0
        kept = {"logit_bias": {str(ord("b")): 5.0}}
        mixed = await it.chat(temperature=0, max_tokens=3, frequency_penalty=2, presence_penalty=2, **kept)
        assert mixed.choices[0].message.content == "aab"


@in_virtual_time
async def test_log_probabilities_of_a_chat() -> None:
    async with api("né".encode()) as it:
        answer = await it.chat(temperature=0, logprobs=True, top_logprobs=2)
        told = answer.choices[0].logprobs.content
        assert [bytes(one.bytes) for one in told] == [b"n", b"\xc3", b"\xa9"]
        assert [one.token for one in told] == ["n", "\ufffd", "\ufffd"]
        assert all(len(one.top_logprobs) == 2 for one in told)
        assert told[0].logprob == told[0].top_logprobs[0].logprob > told[0].top_logprobs[1].logprob
        streamed = await it.chunks(temperature=0, logprobs=True)
        parts = [
            one
            for chunk in streamed
            if chunk.choices[0].logprobs
            for one in chunk.choices[0].logprobs.content
        ]
        assert [one.logprob for one in parts] == [one.logprob for one in told]
        assert all(one.top_logprobs == [] for one in parts)


@in_virtual_time
async def test_completions() -> None:
    async with api(b"defg", prompt="abc") as it:
        answer = await it.complete(temperature=0)
        assert (answer.object, answer.choices[0].text) == ("text_completion", "defg")
        assert answer.choices[0].finish_reason == "stop"
        assert (await it.complete(prompt=[97, 98, 99], temperature=0)).choices[0].text == "defg"
        several = await it.complete(prompt=["abc", "abc"], n=2, temperature=0)
        assert [one.text for one in several.choices] == ["defg"] * 4
        assert [one.index for one in several.choices] == [0, 1, 2, 3]
        assert several.usage.prompt_tokens == 6
        streamed = await it.complete(prompt=[[97, 98, 99]], temperature=0, stream=True)
        assert "".join([chunk.choices[0].text async for chunk in streamed]) == "defg"


@pytest.mark.parametrize("stream", [False, True])
@in_virtual_time
async def test_an_echo_with_its_scores(stream: bool) -> None:
    async with api(b"de", prompt="abc") as it:
        asked = {"echo": True, "logprobs": 1, "temperature": 0, "stream": stream}
        if stream:
            parts = [chunk.choices[0] async for chunk in await it.complete(**asked)]
        else:
            parts = (await it.complete(**asked)).choices
        assert "".join(part.text for part in parts) == "abcde"
        told = [part.logprobs for part in parts if part.logprobs]
        assert [one for part in told for one in part.tokens] == ["a", "b", "c", "d", "e", "<|end|>"]
        assert [one for part in told for one in part.text_offset] == [0, 1, 2, 3, 4, 5]
        scores = [one for part in told for one in part.token_logprobs]
        tops = [one for part in told for one in part.top_logprobs]
        assert scores[0] is None
        assert tops[0] is None
        # the toy says 'd' after any three tokens, and what comes after fewer is no letter of the prompt
        assert scores[3] == max(tops[3].values()) > scores[2]
        assert set(tops[2]) >= {"c"}


@pytest.mark.parametrize("prompt", ["né<|end|>b", [*"né".encode(), 256, 98]])
@in_virtual_time
async def test_an_echo_of_what_is_no_text_by_itself(prompt: Any) -> None:
    async with api() as it:
        [choice] = (await it.complete(prompt=prompt, echo=True, logprobs=3, max_tokens=0)).choices
        assert choice.text == "né<|end|>b"
        assert choice.logprobs.tokens == ["n", r"bytes:\xc3", r"bytes:\xa9", "<|end|>", "b"]
        assert choice.logprobs.text_offset == [0, 1, 1, 2, 9]
        assert all(
            name in top
            for name, top in zip(choice.logprobs.tokens[1:], choice.logprobs.top_logprobs[1:], strict=True)
        )


@in_virtual_time
async def test_only_the_echo() -> None:
    async with api(b"de", prompt="abc") as it:
        answer = await it.complete(echo=True, max_tokens=0, logprobs=0, temperature=0)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("abc", "length")
        assert len(answer.choices[0].logprobs.tokens) == 3
        assert answer.usage.completion_tokens == 0


@in_virtual_time
async def test_models() -> None:
    async with api() as it:
        assert [model.id async for model in it.client.models.list()] == ["toy"]
        assert (await it.client.models.retrieve("toy")).owned_by == "swarm"
        with pytest.raises(openai.NotFoundError, match="no model 'gpt-9'"):
            await it.chat(model="gpt-9")


TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"town": {"enum": ["Rome", "Oslo"]}},
            "required": ["town"],
            "additionalProperties": False,
        },
    },
}
TOOL_PROMPT = "t:weather <tool_call></tool_call>\n" + PROMPT
CALL = b'<tool_call>\n{"name": "weather", "arguments": {"town": "Rome"}}\n</tool_call>'


@in_virtual_time
async def test_a_tool_is_called() -> None:
    async with api(b"Let me see. " + CALL, prompt=TOOL_PROMPT) as it:
        answer = (await it.chat(temperature=0, tools=[TOOL])).choices[0]
        assert (answer.message.content, answer.finish_reason) == ("Let me see. ", "tool_calls")
        [call] = answer.message.tool_calls
        assert (call.type, call.function.name) == ("function", "weather")
        assert json.loads(call.function.arguments) == {"town": "Rome"}
        parts = [chunk.choices[0].delta for chunk in await it.chunks(temperature=0, tools=[TOOL])]
        calls = [part.tool_calls[0] for part in parts if part.tool_calls]
        assert [one.index for one in calls] == [0] * len(calls)
        assert calls[0].function.name == "weather"
        assert len(calls) > 5
        assert json.loads("".join(one.function.arguments for one in calls)) == {"town": "Rome"}
        assert all(one.id is None for one in calls[1:])
        none = (await it.chat(temperature=0, tools=[TOOL], tool_choice="none", max_tokens=3)).choices[0]
        assert none.message.tool_calls is None


@in_virtual_time
async def test_a_tool_must_be_called() -> None:
    async with api(b"I will not", prompt=TOOL_PROMPT) as it:
        for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
            asked: Any = {"temperature": 0, "tools": [TOOL], "tool_choice": choice, "max_tokens": 300}
            answer = (await it.chat(**asked, parallel_tool_calls=False)).choices[0]
            assert answer.finish_reason == "tool_calls"
            assert json.loads(answer.message.tool_calls[0].function.arguments)["town"] in ("Rome", "Oslo")


@in_virtual_time
async def test_a_strict_tool_is_called_as_its_schema_says_where_the_model_calls_it() -> None:
    strict = {"type": "function", "function": {**TOOL["function"], "strict": True}}
    loose = {"type": "function", "function": {"name": "other", "parameters": TOOL["function"]["parameters"]}}
    prompt = "t:weather,other <tool_call></tool_call>\n" + PROMPT
    for name, town in (("weather", "Oslo"), ("other", "Bonn")):
        text = b'So. <tool_call>\n{"name": "%b", "arguments": {"town": "%b"}}\n</tool_call>' % (
            name.encode(),
            b"Bonn",
        )
        async with api(text, prompt=prompt) as it:
            answer = (
                await it.chat(temperature=0, tools=[strict, loose], logit_bias={str(ord("O")): 5.0})
            ).choices[0]
            [call] = answer.message.tool_calls
            assert (answer.message.content, call.function.name) == ("So. ", name)
            assert json.loads(call.function.arguments) == {"town": town}
    async with api(b"No call at all.", prompt=prompt) as it:
        answer = (await it.chat(temperature=0, tools=[strict, loose])).choices[0]
        assert (answer.message.content, answer.finish_reason) == ("No call at all.", "stop")


@in_virtual_time
async def test_what_tools_gave_is_told_to_the_model() -> None:
    said: Any = [
        *HELLO,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "c",
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"town": "Oslo"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "rain"}]},
    ]
    prompt = "u:hi\na:weather[('town', 'Oslo')]\nt:rain\na:"
    async with api(b"It rains.", prompt=prompt) as it:
        answer = await it.chat(messages=said, temperature=0)
        assert answer.usage.prompt_tokens == len(prompt)
        assert answer.choices[0].message.content == "It rains."
        said[1]["tool_calls"][0]["function"]["arguments"] = "{"
        with pytest.raises(openai.BadRequestError, match="no JSON"):
            await it.chat(messages=said)


SCHEMA = TOOL["function"]["parameters"]


@in_virtual_time
async def test_answers_by_a_schema() -> None:
    async with api(b"no json at all") as it:
        wanted = {"type": "json_schema", "json_schema": {"name": "w", "schema": SCHEMA, "strict": True}}
        answer = await it.chat(temperature=0, response_format=wanted, max_tokens=300)
        assert json.loads(answer.choices[0].message.content)["town"] in ("Rome", "Oslo")
        assert answer.choices[0].finish_reason == "stop"
        anything = await it.chat(
            temperature=2, seed=3, response_format={"type": "json_object"}, max_tokens=20
        )
        assert anything.choices[0].message.content.lstrip().startswith("{")
        for schema in (
            {"type": "objec"},
            {"not": {"type": "string"}},
            {"type": "string", "pattern": "(?=a)"},
        ):
            wanted["json_schema"] = {"name": "w", "schema": schema}
            with pytest.raises(openai.BadRequestError) as caught:
                await it.chat(response_format=wanted)
            assert caught.value.param == "response_format"


@in_virtual_time
async def test_a_template_is_told_what_it_asks_for() -> None:
    async with api(b"HI", prompt="!" + PROMPT) as it:
        answer = await it.chat(temperature=0, extra_body={"chat_template_kwargs": {"shout": True}})
        assert answer.choices[0].message.content == "HI"
        for name in ("whisper", "chat_template", "tokenize", "messages", "a b"):
            with pytest.raises(openai.BadRequestError, match="chat_template_kwargs"):
                await it.chat(extra_body={"chat_template_kwargs": {name: "x"}})


WRONG: list[tuple[dict[str, Any], str | None]] = [
    ({"temperatur": 1}, "temperatur"),
    ({"temperature": 3}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"n": 0}, "n"),
    ({"n": 65}, "n"),
    ({"n": 1.5}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": "a" * 1025}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": [1]}, "stop[0]"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias[...]"),
    ({"logit_bias": {"-5": 1}}, "logit_bias"),
    ({"logit_bias": {"257": 1}}, "logit_bias"),
    ({"presence_penalty": -2.1}, "presence_penalty"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"seed": 2**63}, "seed"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    ({"messages": "hi"}, "messages"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"store": True}, "store"),
    ({"functions": [{}]}, "functions"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [TOOL, TOOL]}, "tools"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
    ({"tools": [TOOL], "response_format": {"type": "json_object"}}, "response_format"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"messages": [{"role": "user", "content": "x" * 5000}]}, "messages"),
]


@pytest.mark.parametrize(("asked", "param"), WRONG, ids=lambda value: str(value)[:40])
@in_virtual_time
async def test_what_cannot_be_had_is_refused_by_name(asked: dict[str, Any], param: str | None) -> None:
    async with api(b"ok") as it:
        answer = await it.post("/v1/chat/completions", {"model": "toy", "messages": HELLO, **asked})
        error = answer.json()["error"]
        assert answer.status_code == 400, error
        assert error["param"] == param, error
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert it.sessions == 0


@in_virtual_time
async def test_what_asks_for_nothing_is_no_parameter() -> None:
    asked = {"store": False, "functions": None, "modalities": ["text"], "temperature": 0, "tools": None}
    said = [{"role": "user", "content": "hi", "name": None}]
    async with api(b"ok") as it:
        body = {"model": "toy", "messages": said, **asked}
        answer = await it.post("/v1/chat/completions", body)
        assert answer.json()["choices"][0]["message"]["content"] == "ok"


@pytest.mark.parametrize(
    "asked",
    [
        {"prompt": []},
        {"prompt": ""},
        {"prompt": [[]]},
        {"prompt": ["a", 5]},
        {"prompt": [257]},
        {"prompt": [-1]},
        {"prompt": "x" * 5000},
        {"prompt": "x", "max_tokens": 0},
        {"prompt": "x", "logprobs": 21},
        {"prompt": "x", "logprobs": True},
        {"prompt": "x", "best_of": 3},
        {"prompt": "x", "suffix": "y"},
        {"prompt": "x", "tools": []},
        {},
    ],
    ids=lambda value: str(value)[:40],
)
@in_virtual_time
async def test_completions_refuse_too(asked: dict[str, Any]) -> None:
    async with api() as it:
        answer = await it.post("/v1/completions", {"model": "toy", **asked})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"].partition("[")[0] in {*asked, "prompt"}


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'"x"', b"\xff", b"{" * 5000, b'{"a":' * 5000, b"NaN"])
@in_virtual_time
async def test_a_body_that_is_no_request(body: bytes) -> None:
    async with api() as it:
        for path in ("/v1/chat/completions", "/v1/completions"):
            answer = await it.http.post(path, content=body, headers={"content-type": "application/json"})
            assert answer.status_code == 400
            assert answer.json()["error"]["message"]


@in_virtual_time
async def test_too_much_and_of_another_kind() -> None:
    async with api() as it:
        long = {"model": "toy", "prompt": "x" * (8 * 2**20)}
        assert (await it.post("/v1/completions", long)).status_code == 413
        plain = await it.http.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"})
        assert plain.status_code == 415


@pytest.mark.parametrize("keys", [(), ("one",)])
@in_virtual_time
async def test_the_document_names_every_parameter(keys: tuple[str, ...]) -> None:
    async with api(site={"keys": keys}) as it:
        document = (await it.http.get("/openapi.json", headers={"Authorization": "Bearer one"})).json()
    schemas = document["components"]["schemas"]
    for kind in (ChatRequest, CompletionRequest):
        known = {*kind.__struct_fields__, *kind.neutral}
        assert set(schemas[kind.__name__]["properties"]) == known
        assert schemas[kind.__name__]["additionalProperties"] is False
    assert schemas["ChatRequest"]["properties"]["store"] == {"enum": [False, None]}
    assert set(document["paths"]["/v1/chat/completions"]) == {"post"}
    assert document["security"] == ([{"key": []}] if keys else [])


@in_virtual_time
async def test_a_prompt_that_begins_like_an_earlier_one_is_found_again() -> None:
    async with api() as it:
        said = [{"role": "user", "content": "a long story " * 60}]
        first = await it.chat(messages=said, max_tokens=2)
        second = await it.chat(messages=said, max_tokens=2)
        cached = [answer.usage.prompt_tokens_details.cached_tokens for answer in (first, second)]
        assert cached[0] == 0
        assert first.usage.prompt_tokens > cached[1] > 600


@in_virtual_time
async def test_choices_share_what_was_computed_of_their_prompt() -> None:
    async with api() as it:
        said = [{"role": "user", "content": "x" * 400}]
        answer = await it.chat(messages=said, max_tokens=2, n=4)
        assert len(answer.choices) == 4
        for server in it.toy.servers.values():
            assert answer.usage.prompt_tokens < server.tokens_stepped < 2 * answer.usage.prompt_tokens


@in_virtual_time
async def test_other_paths() -> None:
    async with api() as it:
        with pytest.raises(openai.NotFoundError, match="no embeddings"):
            await it.client.embeddings.create(model="toy", input="x")
        gone = await it.http.get("/v1/nothing")
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, None)
        assert (await it.http.get("/v1/chat/completions")).status_code == 405
        assert (await it.http.get("/healthz")).text == "ok\n"


@in_virtual_time
async def test_keys() -> None:
    async with api(b"ok", site={"keys": ("one", "two")}) as it:
        assert (await it.chat(temperature=0)).choices[0].message.content == "ok"
        for headers in ({}, {"Authorization": "Bearer three"}, {"Authorization": "Basic one"}):
            answer = await it.post("/v1/chat/completions", {}, **headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
            assert (await it.http.get("/v1/models", headers=headers)).status_code == 401
        assert (await it.http.get("/v1/models", headers={"Authorization": "Bearer two"})).status_code == 200


@in_virtual_time
async def test_a_local_server_answers_to_its_own_name_alone() -> None:
    async with api() as it:
        hosts = {
            "127.0.0.1:8000": 200,
            "[::1]:8000": 200,
            "evil.example": 403,
            "[": 403,
            "[::1": 403,
            "": 403,
        }
        for host, status in hosts.items():
            assert (await it.http.get("/v1/models", headers={"host": host})).status_code == status
    async with api(site={"is_local": False}) as it:
        assert (await it.http.get("/v1/models", headers={"host": "swarm.example"})).status_code == 200


@in_virtual_time
async def test_other_sites_may_ask_only_where_that_was_said() -> None:
    asked = {"origin": "https://chat.example", "access-control-request-method": "POST"}
    async with api() as it:
        answer = await it.http.options("/v1/chat/completions", headers=asked)
        assert "access-control-allow-origin" not in answer.headers
    async with api(site={"cors_origins": ("https://chat.example",)}) as it:
        answer = await it.http.options("/v1/chat/completions", headers=asked)
        assert answer.headers["access-control-allow-origin"] == "https://chat.example"
        full = await it.http.get("/v1/models", headers={"origin": "https://chat.example"})
        assert full.headers["access-control-expose-headers"] == "Retry-After"
        other = await it.http.options("/v1/models", headers={**asked, "origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


@in_virtual_time
async def test_full_servers_and_missing_ones() -> None:
    async with api(site={"patience": 3.0}) as it:
        await it.toy.announce("one", kv_tokens_left=3)
        await it.toy.swarm.directory.refresh()
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError) as full:
                await it.chat(stream=stream)
            assert int(full.value.response.headers["retry-after"]) >= 1
            assert full.value.code == "no_capacity"
        it.toy["two"].kill()
        await it.toy.announce("one", state="joining", progress=0.5)
        await it.toy.swarm.directory.refresh()
        with pytest.raises(openai.InternalServerError) as gone:
            await it.chat()
        assert gone.value.status_code == 503


@in_virtual_time
async def test_servers_that_are_fuller_than_they_say_cost_no_more_patience() -> None:
    async with api(site={"patience": 3.0}) as it:
        no_room = Error(code="no_capacity", message="full", retry_after=0.5)
        it.toy["one"].refuse = [no_room] * 100
        started = asyncio.get_running_loop().time()
        with pytest.raises(openai.RateLimitError) as full:
            await it.chat()
        assert full.value.code == "no_capacity"
        assert asyncio.get_running_loop().time() - started < 4.0


@in_virtual_time
async def test_no_more_answers_at_a_time_than_allowed() -> None:
    async with api(site={"max_answers": 2}, seconds=0.1) as it:
        running = asyncio.create_task(it.chat(n=2, max_tokens=50, seed=1))
        await until(lambda: it.site.answers > 0)
        assert it.site.answers == 2
        with pytest.raises(openai.RateLimitError) as full:
            await it.chat()
        assert full.value.response.headers["retry-after"]
        for much in (it.chat(n=3), it.complete(prompt=["a"] * 3), it.complete(prompt=["a", "b"], n=2)):
            with pytest.raises(openai.BadRequestError) as refused:
                await much
            assert refused.value.param in ("n", "prompt")
        await running


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
@in_virtual_time
async def test_who_disconnects_frees_sessions_and_seats(stream: bool, n: int) -> None:
    async with api(seconds=0.1) as it:
        body = {"model": "toy", "messages": HELLO, "stream": stream, "n": n, "max_tokens": 3000}
        asking = Asking({**body, "ignore_eos": True})
        running = asyncio.create_task(it.site.app(asking.scope, asking.receive, asking.send))
        await until(lambda: it.sessions == 2 * n)
        if stream:
            await asking.news.wait()
        assert it.site.answers == n
        asking.leave()
        await asyncio.wait_for(running, 1.0)
        assert it.site.answers == 0
        await asyncio.sleep(0.5)
        assert it.sessions == 0
        if not stream:
            assert [message.get("status") for message in asking.sent] == [499, None]


@in_virtual_time
async def test_who_leaves_before_the_first_token_frees_the_session() -> None:
    async with api(seconds=0.1) as it:
        asking = Asking({"model": "toy", "messages": HELLO, "stream": True})
        running = asyncio.create_task(it.site.app(asking.scope, asking.receive, asking.send))
        await until(lambda: it.site.answers > 0)
        asking.leave()
        await asyncio.wait_for(running, 1.0)
        await asyncio.sleep(0.5)
        assert (it.sessions, it.site.answers) == (0, 0)


@pytest.mark.parametrize("stream", [True, False])
@in_virtual_time
async def test_a_server_that_ends_says_so_to_who_waits(stream: bool) -> None:
    async with api(seconds=0.1) as it:
        body = {"model": "toy", "messages": HELLO, "stream": stream, "max_tokens": 3000, "ignore_eos": True}
        asking = Asking(body)
        running = asyncio.create_task(it.site.app(asking.scope, asking.receive, asking.send))
        await until(lambda: it.sessions > 0)
        it.site.close()
        await asyncio.wait_for(running, 3.0)
        assert asking.sent[0]["status"] == (200 if stream else 503)
        told = b"".join(message["body"] for message in asking.sent[1:]).decode().strip().split("\n\n")
        assert json.loads(told[-1].removeprefix("data: "))["error"]["code"] == "ending"
        assert not asking.sent[-1].get("more_body")
        await asyncio.sleep(0.5)
        assert (it.sessions, it.site.answers) == (0, 0)


@in_virtual_time
async def test_a_swarm_that_fails_ends_the_stream_with_an_error() -> None:
    async with api(timeout=2.0, seconds=0.1) as it:
        asking = Asking(
            {"model": "toy", "messages": HELLO, "stream": True, "max_tokens": 3000, "ignore_eos": True}
        )
        running = asyncio.create_task(it.site.app(asking.scope, asking.receive, asking.send))
        await asking.news.wait()
        it.toy["two"].kill()
        await running
        assert asking.sent[0]["status"] == 200
        told = b"".join(message["body"] for message in asking.sent[1:]).decode().strip().split("\n\n")
        assert json.loads(told[-1].removeprefix("data: "))["error"]["type"] == "server_error"
