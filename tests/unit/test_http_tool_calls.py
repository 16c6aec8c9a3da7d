"""Reading calls of tools from an answer's text, in whatever pieces it comes."""

import json
import random
from dataclasses import dataclass, field

import pytest

from swarm.client.http.tool_calls import CallDelta, ToolCallReader


@dataclass
class Heard:
    """What the deltas amount to."""

    said: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)


def heard(text: str, sizes: list[int]) -> Heard:
    reader, heard, at = ToolCallReader(), Heard(), 0
    pieces = []
    while at < len(text):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(text[at : at + size])
        at += size
    for delta in [*(one for piece in pieces for one in reader.push(piece)), *reader.flush()]:
        match delta:
            case str():
                heard.said += delta
            case CallDelta(id="", name=""):
                name, arguments = heard.calls[delta.index]
                heard.calls[delta.index] = name, arguments + delta.arguments
            case CallDelta():
                assert delta.index == len(heard.calls)
                heard.calls.append((delta.name, delta.arguments))
                heard.ids.append(delta.id)
    assert reader.count == len(heard.calls)
    return heard


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


TRICKY = '{"a": "} \\" ] \\\\", "b": {"c": [1, {"d": 2}]}}'

CASES = [
    ("Hello < world <tool", "Hello < world <tool", []),
    (call("f", "{}"), "", [("f", "{}")]),
    (
        "So: " + call("f", TRICKY) + "\n" + call("g", '{"x": 1}') + "\n",
        "So: ",
        [("f", TRICKY), ("g", '{"x": 1}')],
    ),
    (call("f", "{}") + " and more", " and more", [("f", "{}")]),
    ('<tool_call>{"arguments": {"x": 1}, "name": "f"}</tool_call>', "", [("f", '{"x": 1}')]),
    ('<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    ('<tool_call>{"name": "f", "arguments": "{}"}</tool_call>', "", [("f", "{}")]),
    ("<tool_call>nonsense</tool_call>", "<tool_call>nonsense</tool_call>", []),
    ("<tool_call>[1]</tool_call>!", "<tool_call>[1]</tool_call>!", []),
    ('<tool_call>{"name": "f", "arguments": {"x": 1}}', "", [("f", '{"x": 1}')]),
    ('<tool_call>{"name": "f", "arguments": {"x": ', "", [("f", '{"x": ')]),
    ('<tool_call>{"name": "\\u0066", "arguments": {}}</tool_call>', "", [("f", "{}")]),
]


@pytest.mark.parametrize(("text", "said", "calls"), CASES, ids=lambda value: str(value)[:30])
def test_calls_are_read_however_the_text_comes(text: str, said: str, calls: list[tuple[str, str]]) -> None:
    rng = random.Random(text)
    ways = [[1], [2], [3], [7], [len(text)], *([rng.randint(1, 9) for _ in range(20)] for _ in range(20))]
    for sizes in ways:
        found = heard(text, sizes)
        assert (found.said.rstrip("\n") if calls else found.said, found.calls) == (said, calls)
        assert len(set(found.ids)) == len(calls)


def test_arguments_come_as_they_are_written() -> None:
    reader = ToolCallReader()
    assert reader.push('<tool_call>{"name": "f", "argu') == []
    [begun, first] = reader.push('ments": {"x"')
    assert isinstance(begun, CallDelta)
    assert (begun.name, begun.id[:5]) == ("f", "call_")
    assert first == CallDelta(0, arguments='{"x"')
    [more] = reader.push(": 1}}")
    assert more == CallDelta(0, arguments=": 1}")
    assert json.loads('{"x"' + ": 1}") == {"x": 1}
