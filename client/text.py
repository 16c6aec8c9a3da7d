"""Text as it streams: from token ids to characters, up to a stop string, safe to print.

Knows of a tokenizer only that it can decode token ids; nothing of models or peers.
"""

import unicodedata
from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"

MAX_PENDING_TOKENS = 8
"""A character has at most four bytes, so a longer run of undecodable tokens is no character at all."""

KEPT_CONTROLS = frozenset("\n\t")

BIDI_AND_BREAKS = frozenset("\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class Decodes(Protocol):
    """The part of a tokenizer used here."""

    def decode(self, token_ids: list[int], **options: bool) -> str: ...


class Detokenizer:
    """Turns token ids into text piece by piece, never showing half a character.

    Tokens are decoded together with those of the piece before, since some tokenizers write a token
    differently at the start of a text. Special tokens say nothing unless it `tells_special` ones.
    """

    def __init__(self, tokenizer: Decodes, *, tells_special: bool = False):
        self._tokenizer = tokenizer
        self._tells_special = tells_special
        self._tokens: list[int] = []
        self._shown = 0
        """How many of `_tokens` have been turned into text."""

    def push(self, token: int) -> str:
        """The text that `token` completes, empty while a character is incomplete."""
        self._tokens.append(token)
        text = self._pending()
        if text.endswith(REPLACEMENT) and len(self._tokens) - self._shown < MAX_PENDING_TOKENS:
            return ""
        if text:
            self._tokens = self._tokens[self._shown :]
        self._shown = len(self._tokens)
        return text

    def flush(self) -> str:
        """What is left at the end, an incomplete character included."""
        text = self._pending()
        self._shown = len(self._tokens)
        return text

    def _pending(self) -> str:
        return self._decode(self._tokens)[len(self._decode(self._tokens[: self._shown])) :]

    def _decode(self, tokens: list[int]) -> str:
        if not tokens:
            return ""
        return self._tokenizer.decode(
            tokens, skip_special_tokens=not self._tells_special, clean_up_tokenization_spaces=False
        )


class StopScanner:
    """Passes text on until a stop string ends in it, and never passes on a part of one.

    The stop string that ends first decides, whatever the pieces in which the text comes.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""
        self.has_stopped = False

    def push(self, text: str) -> str:
        """The text that is safe to show now."""
        if self.has_stopped:
            return ""
        self._held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.has_stopped = True
            _, at = min(found)
            shown, self._held = self._held[:at], ""
            return shown
        safe = len(self._held) - self._longest_start()
        shown, self._held = self._held[:safe], self._held[safe:]
        return shown

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        shown, self._held = self._held, ""
        return shown

    def _longest_start(self) -> int:
        """Length of the longest end of the held text that may begin a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stops):
                return size
        return 0


def printable(text: str) -> str:
    """`text` without what could command a terminal: control and format characters but newline and tab.

    Names, error messages and model output come from strangers; an escape sequence in them could move
    the cursor, rename the window or write the clipboard.
    """
    return "".join(char for char in text if char in KEPT_CONTROLS or not _is_control(char))


def _is_control(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cs") or char in BIDI_AND_BREAKS
