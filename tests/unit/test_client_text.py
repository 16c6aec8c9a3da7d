"""Streaming text: whole characters, stop strings, and nothing that commands a terminal."""

from hypothesis import given
from hypothesis import strategies as st

from swarm.client.text import MAX_PENDING_TOKENS, REPLACEMENT, Detokenizer, StopScanner, printable
from tests.tiny import tiny_tokenizer
from tests.toy_swarm import EOS, ToyTokenizer


def streamed(tokens: list[int]) -> list[str]:
    detokenizer = Detokenizer(ToyTokenizer())
    return [*map(detokenizer.push, tokens), detokenizer.flush()]


@given(st.text(max_size=30))
def test_bytes_come_out_as_whole_characters(text: str) -> None:
    pieces = streamed(list(text.encode()))
    assert "".join(pieces) == text
    assert not any(REPLACEMENT in piece for piece in pieces) or REPLACEMENT in text


@given(st.lists(st.integers(0, 256), max_size=40))
def test_any_bytes_come_out_in_the_end(tokens: list[int]) -> None:
    text = "".join(streamed(tokens))
    assert text.replace(REPLACEMENT, "") == ToyTokenizer().decode(tokens).replace(REPLACEMENT, "")


def test_undecodable_bytes_do_not_hold_up_the_text_for_ever() -> None:
    pieces = streamed([0x80] * 20)
    assert all(pieces[at] for at in (MAX_PENDING_TOKENS - 1, 2 * MAX_PENDING_TOKENS - 1))


def test_special_tokens_are_not_shown() -> None:
    assert streamed([104, EOS, 105]) == ["h", "", "i", ""]


def test_with_a_tokenizer_of_transformers() -> None:
    tokenizer = tiny_tokenizer()
    tokens = tokenizer("It is so.").input_ids
    detokenizer = Detokenizer(tokenizer)
    assert "".join(map(detokenizer.push, tokens)) + detokenizer.flush() == tokenizer.decode(tokens)


def cut(text: str, stops: list[str]) -> str:
    """Before the stop string that ends first; the longest of those that end there."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


@given(
    st.lists(st.text("ab", max_size=4), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_cut_the_same_however_the_text_comes(pieces: list[str], stops: list[str]) -> None:
    scanner = StopScanner(stops)
    shown = ""
    for piece in pieces:
        shown += scanner.push(piece)
        if not scanner.has_stopped:
            assert cut("".join(pieces), stops).startswith(shown)
    shown += scanner.flush()
    assert shown == cut("".join(pieces), stops)
    assert scanner.has_stopped == (cut("".join(pieces), stops) != "".join(pieces))


def test_text_that_cannot_begin_a_stop_string_is_shown_at_once() -> None:
    scanner = StopScanner(["STOP"])
    assert [scanner.push("go S"), scanner.push("T"), scanner.push("AY"), scanner.push(" STOP!")] == [
        "go ",
        "",
        "STAY",
        " ",
    ]
    assert scanner.push("more") == ""


def test_nothing_that_commands_a_terminal_is_printable() -> None:
    hostile = "a\x1b]0;title\x07b\x1b[2Jc\x9bd\re\u202ef\ud800"
    assert printable(hostile) == "a]0;titleb[2Jcdef"
    assert printable("tab\tline\nfamily 👨‍👩‍👧 naïve") == "tab\tline\nfamily 👨‍👩‍👧 naïve"
