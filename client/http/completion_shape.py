"""The shape of completions: chunks of a stream, and the whole answer made of the same chunks. Pure."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from swarm.client.generation import AnswerToken, Generation
from swarm.client.http.choices import Begin, End, Event, Piece
from swarm.client.http.usage import usage
from swarm.client.scores import TokenScore

BytesOf = Callable[[int], bytes]


@dataclass(frozen=True)
class Prompt:
    """A prompt's tokens and, where that is to be told, its text, with the offset in it of each."""

    tokens: tuple[int, ...]
    text: str = ""
    offsets: tuple[int, ...] = ()


class CompletionShape:
    """The answers to one request: `n` for each of its `prompts`."""

    def __init__(
        self,
        request_id: str,
        created: int,
        model: str,
        prompts: Sequence["Prompt"],
        n: int,
        *,
        echoes: bool,
        tells_answer: bool,
        bytes_of: BytesOf | None,
        tells_usage: bool,
    ):
        """With `echoes` answers begin with their prompt; without `tells_answer` that is all of them.

        `bytes_of` is None where no log-probabilities are told; `tells_usage` is about a stream.
        """
        self.named = {"id": request_id, "object": "text_completion", "created": created, "model": model}
        self._prompts = prompts
        self._n = n
        self._echoes = echoes
        self._tells_answer = tells_answer
        self._bytes_of = bytes_of
        self._tells_usage = tells_usage
        self._answers: dict[int, Generation] = {}

    def chunks(self, event: Event) -> list[dict[str, Any]]:
        """The chunks that tell what has come."""
        choices = self._choices(event)
        chunks = [{**self.named, "choices": [choice]} for choice in choices]
        return [{**chunk, "usage": None} for chunk in chunks] if self._tells_usage else chunks

    def end(self) -> list[dict[str, Any]]:
        return [{**self.named, "choices": [], "usage": self._usage()}] if self._tells_usage else []

    def whole(self, events: Iterable[Event]) -> dict[str, Any]:
        """The answer of which these are all events."""
        merged = [_choice(index) for index in range(len(self._prompts) * self._n)]
        for event in events:
            for part in self._choices(event):
                _merge(merged[event.index], part)
        return {**self.named, "choices": merged, "usage": self._usage()}

    def _choices(self, event: Event) -> list[dict[str, Any]]:
        """What is told of a choice: nothing, or something."""
        prompt = self._prompts[event.index // self._n]
        match event:
            case Begin():
                return [self._echo(event, prompt)] if self._echoes else []
            case End():
                self._answers[event.index] = event.answer
                return [self._answer(event, prompt, "", _reason(event, self._tells_answer))]
        return [self._answer(event, prompt, event.text)] if self._tells_answer else []

    def _echo(self, event: Begin, prompt: Prompt) -> dict[str, Any]:
        places = zip(prompt.tokens, prompt.offsets, (None, *event.prompt_scores), strict=False)
        tokens = [AnswerToken(token, offset, score) for token, offset, score in places]
        return _choice(event.index, prompt.text, self._logprobs(tokens, 0))

    def _answer(
        self, event: Piece | End, prompt: Prompt, text: str, finish_reason: str | None = None
    ) -> dict[str, Any]:
        begins = len(prompt.text) if self._echoes else 0
        tokens = event.tokens if self._tells_answer else ()
        return _choice(event.index, text, self._logprobs(tokens, begins), finish_reason)

    def _logprobs(self, tokens: Sequence[AnswerToken], begins: int) -> dict[str, Any] | None:
        """Of tokens of a text that begins with character `begins` of the whole."""
        if self._bytes_of is None:
            return None
        return {
            "tokens": [self._name(one.token) for one in tokens],
            "token_logprobs": [one.score and one.score.logprob for one in tokens],
            "top_logprobs": [one.score and self._top(one.score) for one in tokens],
            "text_offset": [begins + one.offset for one in tokens],
        }

    def _top(self, score: TokenScore) -> dict[str, float]:
        """By text; the likeliest of those with the same, and always the token that was chosen."""
        named: dict[str, float] = {}
        for token, logprob in (*score.top, (score.token, score.logprob)):
            named.setdefault(self._name(token), logprob)
        return named

    def _name(self, token: int) -> str:
        """Its text, or where it is no text of its own its bytes: else many tokens had the same name."""
        assert self._bytes_of is not None
        stands_for = self._bytes_of(token)
        try:
            return stands_for.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in stands_for)

    def _usage(self) -> dict[str, Any]:
        return usage(self._answers, self._n, counts_answers=self._tells_answer)


def _reason(event: End, tells_answer: bool) -> str:
    return event.answer.finish_reason if tells_answer else "length"


def _choice(
    index: int, text: str = "", logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def _merge(whole: dict[str, Any], part: dict[str, Any]) -> None:
    whole["text"] += part["text"]
    whole["finish_reason"] = part["finish_reason"]
    if part["logprobs"] is not None:
        kept = whole["logprobs"] = whole["logprobs"] or {name: [] for name in part["logprobs"]}
        for name, values in part["logprobs"].items():
            kept[name] += values
