"""Calls of tools within an answer's text: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`.

Reads them from text as it streams. Arguments are passed on as the model writes them, as soon as it is clear
what they belong to. Pure; knows no requests.
"""

import json
import re
import secrets
from dataclasses import dataclass, field

BEGIN = "<tool_call>"
END = "</tool_call>"

_OPENING = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')


@dataclass(frozen=True)
class CallDelta:
    """Of call number `index`: its beginning, with `id` and `name`, or more of its arguments (JSON)."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


Delta = str | CallDelta


@dataclass
class ToolCallReader:
    """Parts an answer's text into what is said and what is called. `count` calls have begun."""

    count: int = 0
    _held: str = ""
    """The end of what is said, which may be the beginning of a call."""
    _blanks: str = ""
    _call: "_Call | None" = None

    def push(self, text: str) -> list[Delta]:
        """What more of the text says."""
        deltas: list[Delta] = []
        while text:
            text = self._called(text, deltas) if self._call is not None else self._said(text, deltas)
        return deltas

    def flush(self) -> list[Delta]:
        """What is left where the text ends, a call that is not closed included."""
        deltas: list[Delta] = []
        if self._call is not None:
            self._ended(deltas)
        else:
            self._say(self._held, deltas)
            self._held = ""
        return deltas

    def _said(self, text: str, deltas: list[Delta]) -> str:
        """Take text outside of calls; what comes after the beginning of one."""
        text, self._held = self._held + text, ""
        said, begin, rest = text.partition(BEGIN)
        if not begin:
            held = next((size for size in range(len(BEGIN) - 1, 0, -1) if said.endswith(BEGIN[:size])), 0)
            said, self._held = said[: len(said) - held], said[len(said) - held :]
        self._say(said, deltas)
        if begin:
            self._call, self._blanks = _Call(self.count), ""
        return rest

    def _say(self, text: str, deltas: list[Delta]) -> None:
        """Say `text`; of blanks behind a call only those that lead to something."""
        text, self._blanks = self._blanks + text, ""
        if self.count and not text.strip():
            self._blanks = text
        elif text:
            deltas.append(text)

    def _called(self, text: str, deltas: list[Delta]) -> str:
        """Take text inside a call; what comes after its end."""
        assert self._call is not None
        call = self._call
        call.text += text
        end = call.text.find(END)
        if end < 0:
            self._note(call.news(), deltas)
            return ""
        rest, call.text = call.text[end + len(END) :], call.text[:end]
        self._ended(deltas)
        return rest

    def _ended(self, deltas: list[Delta]) -> None:
        assert self._call is not None
        call, self._call = self._call, None
        self._note(call.news(), deltas)
        if not call.is_told:
            self._note(call.whole(), deltas)

    def _note(self, news: list[Delta], deltas: list[Delta]) -> None:
        deltas += news
        self.count += sum(isinstance(one, CallDelta) and bool(one.id) for one in news)


@dataclass
class _Call:
    """One call as its text grows; `is_told` once its name has been passed on."""

    index: int
    text: str = ""
    is_told: bool = False
    _at: int = 0
    """How much of `text` has been read."""
    _value: "_JsonValue" = field(default_factory=lambda: _JsonValue())

    def news(self) -> list[Delta]:
        """The call's beginning, and what more there is of its arguments, if it is written as usual."""
        deltas: list[Delta] = []
        if not self.is_told:
            opening = _OPENING.match(self.text)
            if opening is None:
                return []
            self.is_told, self._at = True, opening.end()
            deltas.append(CallDelta(self.index, _new_id(), json.loads(opening[1])))
        fresh = self._value.take(self.text[self._at :])
        self._at = len(self.text)
        return [*deltas, CallDelta(self.index, arguments=fresh)] if fresh else deltas

    def whole(self) -> list[Delta]:
        """All of a call that is written otherwise; its text, if it is no call."""
        try:
            call = json.loads(self.text)
            name, arguments = call["name"], call.get("arguments", {})
        except (ValueError, TypeError, KeyError, AttributeError):
            return [f"{BEGIN}{self.text}{END}"]
        if not isinstance(name, str):
            return [f"{BEGIN}{self.text}{END}"]
        written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return [CallDelta(self.index, _new_id(), name), CallDelta(self.index, arguments=written)]


@dataclass
class _JsonValue:
    """Finds where a JSON object ends whose text comes in pieces."""

    depth: int = 0
    in_string: bool = False
    escaped: bool = False
    is_complete: bool = False

    def take(self, text: str) -> str:
        """The part of `text` that belongs to the value."""
        for at, char in enumerate(text):
            if self.is_complete:
                return text[:at]
            self._step(char)
        return text

    def _step(self, char: str) -> None:
        if self.in_string:
            self.in_string = self.escaped or char != '"'
            self.escaped = char == "\\" and not self.escaped
        elif char == '"':
            self.in_string = True
        elif char in "{[":
            self.depth += 1
        elif char in "}]":
            self.depth -= 1
            self.is_complete = self.depth == 0


def _new_id() -> str:
    return f"call_{secrets.token_hex(12)}"
