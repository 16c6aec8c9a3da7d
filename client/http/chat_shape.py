"""The shape of a chat's answers: chunks of a stream, and the whole answer made of the same deltas. Pure."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from swarm.client.generation import AnswerToken, Generation
from swarm.client.http.choices import Begin, End, Event, Piece
from swarm.client.http.tool_calls import Delta, ToolCallReader
from swarm.client.http.usage import usage

BytesOf = Callable[[int], bytes]
"""What a token stands for."""


class ChatShape:
    """The answer to one request: `n` choices, each with its own reader of calls where tools may be called."""

    def __init__(
        self,
        request_id: str,
        created: int,
        model: str,
        n: int,
        *,
        reads_calls: bool,
        bytes_of: BytesOf | None,
        tells_usage: bool,
    ):
        """`bytes_of` is None where no log-probabilities are told; `tells_usage` is about a stream."""
        self.named = {
            "id": request_id,
            "object": "chat.completion.chunk",
            "created": created,
            "model": model,
        }
        self._readers = [ToolCallReader() if reads_calls else None for _ in range(n)]
        self._bytes_of = bytes_of
        self._tells_usage = tells_usage
        self._answers: dict[int, Generation] = {}
        self._n = n

    def chunks(self, event: Event) -> list[dict[str, Any]]:
        """The chunks that tell what has come."""
        if isinstance(event, Begin):
            return [self._chunk(event.index, {"role": "assistant", "content": ""})]
        deltas = self._deltas(event)
        logprobs = self._logprobs(event)
        if logprobs is not None and not deltas:
            deltas = [{}]
        found = [
            self._chunk(event.index, delta, logprobs=logprobs if at == 0 else None)
            for at, delta in enumerate(deltas)
        ]
        if isinstance(event, End):
            self._answers[event.index] = event.answer
            found.append(self._chunk(event.index, {}, finish_reason=self._finish_reason(event)))
        return found

    def end(self) -> list[dict[str, Any]]:
        """The chunk with which a stream ends, if the usage is wanted."""
        if not self._tells_usage:
            return []
        return [{**self.named, "choices": [], "usage": self._usage()}]

    def whole(self, events: Iterable[Event]) -> dict[str, Any]:
        """The answer of which these are all events."""
        choices = [_Whole(index) for index in range(self._n)]
        for event in events:
            choice = choices[event.index]
            for delta in self._deltas(event):
                choice.add(delta)
            choice.logprobs += (self._logprobs(event) or {"content": []})["content"]
            if isinstance(event, End):
                self._answers[event.index] = event.answer
                choice.finish_reason = self._finish_reason(event)
        tells = self._bytes_of is not None
        return {
            **self.named,
            "object": "chat.completion",
            "choices": [choice.shape(tells) for choice in choices],
            "usage": self._usage(),
        }

    def _deltas(self, event: Event) -> list[dict[str, Any]]:
        if isinstance(event, Begin):
            return []
        reader = self._readers[event.index]
        if reader is None:
            return [{"content": event.text}] if isinstance(event, Piece) else []
        news = reader.push(event.text) if isinstance(event, Piece) else reader.flush()
        return [_delta(one) for one in news]

    def _finish_reason(self, event: End) -> str:
        reader = self._readers[event.index]
        reason = event.answer.finish_reason
        return "tool_calls" if reader is not None and reader.count and reason == "stop" else reason

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        chunk = {**self.named, "choices": [choice]}
        return {**chunk, "usage": None} if self._tells_usage else chunk

    def _logprobs(self, event: Event) -> dict[str, Any] | None:
        """Of the tokens that are part of the text."""
        if self._bytes_of is None or isinstance(event, Begin):
            return None
        tokens: Sequence[AnswerToken] = event.tokens
        if isinstance(event, End):
            tokens = [one for one in tokens if one.offset < len(event.answer.text)]
        content = [_logprob(one, self._bytes_of) for one in tokens]
        return {"content": content, "refusal": None} if content else None

    def _usage(self) -> dict[str, Any]:
        return usage(self._answers, self._n)


class _Whole:
    """One choice as its deltas come together."""

    def __init__(self, index: int) -> None:
        self.logprobs: list[dict[str, Any]] = []
        self.finish_reason = ""
        self._index = index
        self._content: list[str] = []
        self._calls: list[dict[str, Any]] = []

    def add(self, delta: dict[str, Any]) -> None:
        self._content.append(delta.get("content", ""))
        for call in delta.get("tool_calls", []):
            if "id" in call:
                self._calls.append({key: call[key] for key in ("id", "type", "function")})
            else:
                self._calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]

    def shape(self, tells_logprobs: bool) -> dict[str, Any]:
        content = "".join(self._content)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self._calls:
            message |= {"content": content or None, "tool_calls": self._calls}
        return {
            "index": self._index,
            "message": message,
            "logprobs": {"content": self.logprobs, "refusal": None} if tells_logprobs else None,
            "finish_reason": self.finish_reason,
        }


def _delta(news: Delta) -> dict[str, Any]:
    if isinstance(news, str):
        return {"content": news}
    function = {"arguments": news.arguments}
    if not news.id:
        return {"tool_calls": [{"index": news.index, "function": function}]}
    begun = {"id": news.id, "type": "function", "function": {"name": news.name, **function}}
    return {"tool_calls": [{"index": news.index, **begun}]}


def _logprob(shown: AnswerToken, bytes_of: BytesOf) -> dict[str, Any]:
    assert shown.score is not None
    top = [_named(token, logprob, bytes_of) for token, logprob in shown.score.top]
    return {**_named(shown.token, shown.score.logprob, bytes_of), "top_logprobs": top}


def _named(token: int, logprob: float, bytes_of: BytesOf) -> dict[str, Any]:
    stands_for = bytes_of(token)
    return {"token": stands_for.decode(errors="replace"), "logprob": logprob, "bytes": list(stands_for)}
