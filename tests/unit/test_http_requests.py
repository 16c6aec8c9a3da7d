"""What may be asked, held to OpenAI's own client and to the table in the documentation."""

import inspect
import json
import re
from pathlib import Path
from typing import Any

import openai
import pytest

from swarm.client.http.refusals import Refusal
from swarm.client.http.requests import Asked, ChatRequest, CompletionRequest, read

DOCS = Path(__file__).parents[2] / "docs" / "api.md"
VALUE = re.compile(r"`(.+?)`")
TRANSPORT = {"extra_headers", "extra_query", "extra_body", "timeout"}
"""What the openai client takes beside the parameters of a request."""

KINDS = [ChatRequest, CompletionRequest]


def chat(**asked: Any) -> ChatRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], **asked}
    return read(json.dumps(body).encode(), ChatRequest)


def documented(kind: type[Asked]) -> dict[str, str]:
    """The parameters that the table has for a kind of request, with what it says in that column."""
    table = DOCS.read_text().partition("## Parameters")[2].partition("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.split("|")[1:]] for line in table.splitlines() if line[:3] == "| `"
    ]
    cells = {name: row[1 + KINDS.index(kind)] for row in rows for name in VALUE.findall(row[0])}
    return {name: cell for name, cell in cells.items() if cell}


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_in_the_docs_is_what_may_be_asked(kind: type[Asked]) -> None:
    said = documented(kind)
    assert {name for name, cell in said.items() if cell == "yes"} == {*kind.__struct_fields__}
    others = {name: cell for name, cell in said.items() if cell != "yes"}
    values = {
        name: () if cell == "no" else tuple(map(json.loads, VALUE.findall(cell)))
        for name, cell in others.items()
    }
    assert values == kind.neutral


def test_every_parameter_of_the_openai_client_is_known() -> None:
    client = openai.OpenAI(api_key="none")
    for create, kind in (
        (client.chat.completions.create, ChatRequest),
        (client.completions.create, CompletionRequest),
    ):
        known = {*kind.__struct_fields__, *kind.neutral}
        assert set(inspect.signature(create).parameters) - TRANSPORT <= known


@pytest.mark.parametrize("kind", KINDS)
def test_values_that_ask_for_nothing_are_taken(kind: type[Asked]) -> None:
    asked: dict[str, Any] = (
        {"model": "m", "prompt": "x"}
        if kind is CompletionRequest
        else {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    )
    plain = read(json.dumps(asked).encode(), kind)
    for name, values in kind.neutral.items():
        for value in (*values, None):
            assert read(json.dumps({**asked, name: value}).encode(), kind) == plain
        for value in ("anything else", 0):
            with pytest.raises(Refusal, match="not supported") as caught:
                read(json.dumps({**asked, name: value}).encode(), kind)
            assert (caught.value.status, caught.value.param) == (400, name)
    with pytest.raises(Refusal, match="no parameter"):
        read(json.dumps({**asked, "wish": None}).encode(), kind)


def test_null_counts_as_left_out_within_parameters_too() -> None:
    function = {"name": "f", "description": None, "strict": None, "parameters": {"const": None}}
    asked = chat(
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "x"}], "name": None},
            {"role": "assistant", "content": None, "tool_calls": None, "annotations": []},
        ],
        tools=[{"type": "function", "function": function}],
        stream=True,
        stream_options={"include_usage": None, "include_obfuscation": False},
        tool_choice=None,
    )
    assert asked.tools[0].function.parameters == {"const": None}
    schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"enum": [None]}, "strict": None}}
    assert chat(response_format=schema).response_format.json_schema.definition == {"enum": [None]}  # type: ignore[union-attr]


def test_whole_numbers_may_be_written_with_a_point() -> None:
    asked = chat(n=2.0, seed=-3.0, temperature=1.0, max_tokens=5.0)
    assert (asked.n, asked.seed, asked.temperature, asked.max_tokens) == (2, -3, 1.0, 5)
    with pytest.raises(Refusal, match="Expected `int`"):
        chat(n=1.5)


DEEP: Any = []
for _ in range(70):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"messages": DEEP}, "messages"),
        ({"chat_template_kwargs": {"x": DEEP}}, "chat_template_kwargs"),
        ({"wish": DEEP}, "wish"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
        ),
        ({"tools": [{"function": {"name": "f"}}]}, "tools[0]"),
        ({"tools": [{"type": "custom", "function": {"name": "f"}}]}, "tools[0].type"),
        ({"tool_choice": {"function": {"name": "f"}}}, "tool_choice"),
        (
            {"messages": [{"role": "assistant", "content": "x", "annotations": [1]}]},
            "messages[0].annotations",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refused_by_name(asked: dict[str, Any], param: str) -> None:
    with pytest.raises(Refusal) as caught:
        chat(**asked)
    assert (caught.value.status, caught.value.param) == (400, param)
