"""Answers held to a grammar: what may come next, forwards and back, and beside drafted tokens."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from swarm.client.decoding import agreed, own_tokens
from swarm.client.grammar import Vocabulary
from swarm.client.options import GenerationOptions, SamplingOptions
from swarm.client.sampling import Sampler
from swarm.errors import InputError
from tests.byte_tokenizer import byte_tokenizer

END = 256
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(byte_tokenizer(), 257, {END})


def allowed(constraint: Any, tokens: Sequence[int]) -> str:
    ids = constraint.allowed(tokens)[:257].nonzero().flatten().tolist()
    return "".join("$" if token == END else chr(token) for token in ids)


def test_only_what_fits_may_come(vocabulary: Vocabulary) -> None:
    constraint = vocabulary.json({"enum": ["on", "off"]}).constraint()
    assert allowed(constraint, b"") == '"'
    assert allowed(constraint, b'"o') == "fn"
    assert allowed(constraint, b'"off"') == "$"
    assert allowed(constraint, [*b'"off"', END]) == "$"
    assert allowed(constraint, b'"on') == '"'  # back again
    assert allowed(constraint, b"") == '"'


def test_blanks_come_to_an_end(vocabulary: Vocabulary) -> None:
    constraint = vocabulary.json({**SCHEMA, "x-guidance": {"whitespace_pattern": r"\s*"}}).constraint()
    assert " " in allowed(constraint, b"{")
    assert "\n" in allowed(constraint, b"{")
    assert " " not in allowed(constraint, b"{ ")
    assert allowed(constraint, b"{\n" + b" " * 32) == '"}'[:1]


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "objec"},
        {"not": {}},
        {"type": "string", "pattern": "(?=x)"},
        {"$ref": "http://x/y"},
        {"type": "integer", "maximum": 2**91},
        {"type": "string", "description": "\ud800"},
    ],
)
def test_what_cannot_be_enforced_is_refused(vocabulary: Vocabulary, schema: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="cannot be enforced"):
        vocabulary.json(schema)


def test_a_tokenizer_without_bytes_is_refused() -> None:
    with pytest.raises(InputError, match="cannot be held to a grammar"):
        Vocabulary(object(), 10, {1})


def test_tokens_as_bytes(vocabulary: Vocabulary) -> None:
    assert [vocabulary.bytes_of(token) for token in (97, 0xC3, 10)] == [b"a", b"\xc3", b"\n"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_change_nothing(vocabulary: Vocabulary, temperature: float) -> None:
    """Verified several at a time, right or wrong, the tokens are those of one at a time."""
    options = SamplingOptions(temperature=temperature, seed=3, frequency_penalty=1.0, logit_bias={53: 3.0})
    random = torch.Generator().manual_seed(1)
    table = torch.randn(257, 257, generator=random)
    prompt = [1, 2, 3]
    grammar = vocabulary.json(SCHEMA)

    def answered(draft: Any) -> list[int]:
        sampler = Sampler(options, first=len(prompt), constraint=grammar.constraint())
        tokens = list(prompt)
        while tokens[-1] != END and len(tokens) < 60:
            drafted = draft(tokens)
            rows = (table[token] for token in [tokens[-1], *drafted])
            tokens += agreed(drafted, own_tokens(sampler, tokens, drafted, rows))
        return tokens[len(prompt) : tokens.index(END) + 1 if END in tokens else 60]

    plain = answered(lambda tokens: [])
    if END in plain:
        assert isinstance(json.loads(bytes(plain[:-1]))["n"], int)

    def mixed(tokens: list[int]) -> list[int]:
        done = len(tokens) - len(prompt)
        right = plain[done : done + len(tokens) % 4]
        return [*right, 7, *plain[done + len(right) + 1 : done + len(right) + 3]]

    assert answered(mixed) == plain
    assert answered(lambda tokens: plain[len(tokens) - len(prompt) :][:5]) == plain


def test_a_grammar_ends_its_answer(vocabulary: Vocabulary) -> None:
    with pytest.raises(InputError, match="ignore_eos"):
        GenerationOptions(grammar=vocabulary.json(SCHEMA), ignore_eos=True)
