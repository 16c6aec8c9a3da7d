"""An answer as it grows: its tokens, its text, and why it ended.

Knows a tokenizer and the options of an answer; nothing of sessions, nor where tokens come from.
"""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any, Literal, Protocol, TypeAlias

from swarm.client.conversation import Ends
from swarm.client.options import GenerationOptions
from swarm.client.text import Detokenizer, StopScanner

FinishReason: TypeAlias = Literal["stop", "length", "cancelled"]


class TextEnds(Ends, Protocol):
    """The ends of a model with its tokenizer, as `swarm.blocks.head.Head` has them."""

    tokenizer: Any
    generation_config: Any


class Answer:
    """The answer to `prompt` so far. `tokens` begin with the prompt's, and are `context` at most.

    It ends with a token of `ends_at`, if not before.
    """

    def __init__(self, ends: TextEnds, prompt: Sequence[int], options: GenerationOptions, context: int):
        self.prompt = tuple(prompt)
        self.tokens = list(prompt)
        self.options = options
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self._most = min(len(prompt) + options.max_new_tokens, context)
        self.ends_at = frozenset() if options.ignore_eos else end_tokens(ends)
        self._detokenizer = Detokenizer(ends.tokenizer)
        self._scanner = StopScanner(options.stop)
        self._written = 0
        """Characters of the text, with those that are held back or cut off."""
        self._offsets: list[int] = []
        """For each new token, how many characters of the text come before what it adds."""

    @property
    def new_tokens(self) -> tuple[int, ...]:
        """The tokens of the answer alone, an end-of-text token included."""
        return tuple(self.tokens[len(self.prompt) :])

    @property
    def room(self) -> int:
        """How many more tokens it may have."""
        return self._most - len(self.tokens)

    def tokens_after(self, count: int, *, hidden: bool = False) -> list[tuple[int, int]]:
        """The new tokens from number `count` on of which the text shows something, with where each begins.

        Those that end the answer, are part of a stop string or of half a character are `hidden`.
        """
        pairs = zip(self.tokens[len(self.prompt) + count :], self._offsets[count:], strict=True)
        return list(pairs) if hidden else list(takewhile(self._is_shown, pairs))

    def _is_shown(self, token: tuple[int, int]) -> bool:
        return token[1] < len(self.text)

    def finish(self, reason: FinishReason) -> None:
        if self.finish_reason is None:
            self.finish_reason = reason

    def push(self, token: int) -> str:
        """Take the next token; what of the text may be shown now."""
        self.tokens.append(token)
        self._offsets.append(self._written)
        if token in self.ends_at:
            self.finish("stop")
            return ""
        added = self._detokenizer.push(token)
        self._written += len(added)
        shown = self._scanner.push(added)
        if self._scanner.has_stopped:
            self.finish("stop")
        elif self.room <= 0:
            self.finish("length")
        self.text += shown
        return shown

    def flush(self) -> str:
        """What is left of the text at the end."""
        if self._scanner.has_stopped:
            return ""
        shown = self._scanner.push(self._detokenizer.flush()) + self._scanner.flush()
        self.text += shown
        return shown


def end_tokens(ends: TextEnds) -> frozenset[int]:
    """The tokens that end an answer, by the model's generation config and its tokenizer."""
    configured = ends.generation_config.eos_token_id
    listed = configured if isinstance(configured, list | tuple) else [configured]
    return frozenset(token for token in (*listed, ends.tokenizer.eos_token_id) if token is not None)
