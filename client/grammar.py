"""Grammars that an answer must follow: JSON schemas and calls of tools, as masks over the vocabulary.

llguidance does the parsing; it works on the vocabulary of a fast tokenizer. Nothing here knows of sessions,
nor who asked for the grammar.
"""

import json
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor

from swarm.errors import InputError

JSON_STYLE: Any = {"whitespace_flexible": True, "whitespace_pattern": r"( |\n[ \t]{0,32})?"}
"""What may stand between the parts of JSON: enough to indent it, and never an endless run of blanks."""


class Vocabulary:
    """The tokens of a model as bytes. Making it takes about a second: off the loop, and once."""

    def __init__(self, tokenizer: Any, vocab_size: int, ends: Collection[int]):
        """`ends` are the tokens that end an answer.

        Raises:
            InputError: it is not a tokenizer whose tokens are known as bytes.
        """
        try:
            self._tokens: LLTokenizer = from_tokenizer(
                tokenizer, n_vocab=max(vocab_size, len(tokenizer)), eos_token=sorted(ends)
            )
        except (ValueError, TypeError) as error:
            raise InputError(
                "The tokenizer of this model cannot be held to a grammar.", "Ask for plain text."
            ) from error

    def bytes_of(self, token: int) -> bytes:
        return self._tokens.decode_bytes([token])

    def json(self, schema: dict[str, Any]) -> "Grammar":
        """JSON by `schema`.

        Raises:
            InputError: the schema is none, or says what cannot be enforced.
        """
        try:
            text = LLMatcher.grammar_from_json_schema(styled(schema))
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise InputError(
                "This cannot be enforced: the schema holds a value that cannot be read.",
                "Whole numbers must fit into 64 bits, and texts be Unicode.",
            ) from error
        return Grammar(self._tokens, text)

    def lark(self, text: str) -> "Grammar":
        """What a grammar in llguidance's dialect of Lark allows.

        Raises:
            InputError: it cannot be enforced.
        """
        return Grammar(self._tokens, LLMatcher.grammar_from_lark(text))


class Grammar:
    """A grammar that was found sound, for any number of answers."""

    def __init__(self, tokens: LLTokenizer, text: str):
        self._tokens = tokens
        self._text = text
        if fault := LLMatcher.validate_grammar(text, tokens):
            raise InputError(
                f"This cannot be enforced: {fault.splitlines()[0].rstrip('.')}.",
                "docs/api.md says what schemas may hold.",
            )

    def constraint(self) -> "AnswerConstraint":
        """For one answer."""
        return AnswerConstraint(LLMatcher(self._tokens, self._text, log_level=0))


class AnswerConstraint:
    """Follows one answer, forwards as it grows and back where drafted tokens were refused."""

    def __init__(self, matcher: LLMatcher):
        self._matcher = matcher
        self._read: list[int] = []

    def allowed(self, tokens: Sequence[int]) -> Tensor:
        """Which tokens may follow the answer's `tokens`: booleans [vocabulary].

        Raises:
            InputError: the grammar has become too complex to follow.
        """
        kept = _common(self._read, tokens)
        if kept < len(self._read):
            self._matcher.rollback(len(self._read) - kept)
            del self._read[kept:]
        for token in tokens[kept:]:
            if not self._matcher.is_stopped():
                self._matcher.consume_token(token)
                self._read.append(token)
        if self._matcher.is_error():
            raise InputError(
                f"The answer cannot be held to its grammar: {self._matcher.get_error().splitlines()[0]}",
                "Ask for something simpler.",
            )
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return torch.from_numpy(np.unpackbits(bits, bitorder="little").view(np.bool_))


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    for at, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return at
    return min(len(one), len(other))


def styled(schema: dict[str, Any]) -> dict[str, Any]:
    """`schema` with what is said of the blanks in what is written by it."""
    return {**schema, "x-guidance": JSON_STYLE}


def json_text(value: Any) -> str:
    """JSON as it stands within a Lark grammar."""
    return json.dumps(value, ensure_ascii=True)
