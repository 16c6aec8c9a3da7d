"""README.md and the pages of docs/, taken apart: what they link to, name and tell to type.

A fence is run in the walk through the pages if `<!-- run -->` stands before it, which nobody sees. A fence of
`text` right after it is what that prints, where … stands for anything. ADDRESS stands for a server's address.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

from swarm.net.identity import Identity

ROOT = Path(__file__).parents[1]
RUN = "<!-- run -->"
ADDRESS = f"/ip4/192.0.2.1/tcp/31330/p2p/{Identity.from_seed('example').peer}"

_PLACEHOLDER = re.compile(r"\bADDRESS\b")
_PUNCTUATION = re.compile(r"[^\w\- ]")
_MODULE = re.compile(r"swarm\.\w+")


@dataclass(frozen=True)
class Fence:
    """A fenced block of a page, its first line's number, and what it prints if the page shows that."""

    page: "Page"
    line: int
    language: str
    text: str
    is_run: bool
    output: str | None

    def at(self, address: str) -> str:
        """The text with that address in it."""
        return _PLACEHOLDER.sub(address, self.text)


@dataclass(frozen=True)
class Command:
    """`python -m MODULE ARGUMENTS`, as a page has it."""

    page: "Page"
    line: int
    module: str
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}:{self.line} {self.module} {' '.join(self.arguments)}"


@dataclass(frozen=True)
class Page:
    path: Path

    def __str__(self) -> str:
        return str(self.path.relative_to(ROOT))

    @cached_property
    def text(self) -> str:
        return self.path.read_text()

    @cached_property
    def tokens(self) -> list[Token]:
        return MarkdownIt("commonmark").enable("table").parse(self.text)

    @cached_property
    def fences(self) -> list[Fence]:
        found = []
        for at, token in enumerate(self.tokens):
            if token.type != "fence":
                continue
            before = self.tokens[at - 1] if at else None
            after = self.tokens[at + 1] if at + 1 < len(self.tokens) else None
            found.append(
                Fence(
                    self,
                    line=_line(token) + 1,
                    language=token.info.strip(),
                    text=token.content,
                    is_run=before is not None and before.content.strip() == RUN,
                    output=after.content
                    if after and after.type == "fence" and after.info == "text"
                    else None,
                )
            )
        return found

    @cached_property
    def code(self) -> list[tuple[int, str]]:
        """What stands between backticks in the text, and on which line its paragraph begins."""
        return [(line, child.content) for line, child in self._inline() if child.type == "code_inline"]

    @cached_property
    def links(self) -> list[tuple[int, str]]:
        found = ((line, child.attrGet("href")) for line, child in self._inline() if child.type == "link_open")
        return [(line, str(target)) for line, target in found]

    @cached_property
    def anchors(self) -> set[str]:
        """The headings, as links to them are written."""
        headings = pairwise(self.tokens)
        texts = [inline.content for opening, inline in headings if opening.type == "heading_open"]
        return {_PUNCTUATION.sub("", text.lower()).replace(" ", "-") for text in texts}

    @cached_property
    def commands(self) -> list[Command]:
        """The commands of this package that it tells to type; the text may name one without arguments."""
        shells = [(fence.line, fence.text) for fence in self.fences if fence.language == "sh"]
        spans = [(line, code) for line, code in self.code if re.match(r"python -m swarm\.\w+ ", code)]
        return [
            Command(self, line + offset, module, arguments)
            for line, text in shells + spans
            for offset, module, arguments in commands_in(text)
        ]

    def _inline(self) -> Iterator[tuple[int, Token]]:
        for token in self.tokens:
            for child in token.children or ():
                yield _line(token), child


@cache
def pages() -> tuple[Page, ...]:
    return tuple(Page(path) for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))


def commands_in(shell: str) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    """The commands of this package in a shell's script: line, module and arguments of each."""
    for offset, line in logical_lines(_PLACEHOLDER.sub(ADDRESS, shell)):
        words: list[str] = []
        for word in [*_words(line), ";"]:
            if set(word) <= set(";&|<>()"):
                yield from ((offset, module, rest) for module, rest in _command(words))
                words = []
            else:
                words.append(word)


def logical_lines(shell: str) -> Iterator[tuple[int, str]]:
    """Lines with those that they go on with, each with its number, from 0 on."""
    held, start = "", 0
    for number, line in enumerate(shell.splitlines()):
        start = start if held else number
        held += line.removesuffix("\\")
        if not line.endswith("\\"):
            yield start, held
            held = ""


def _words(line: str) -> list[str]:
    reader = shlex.shlex(line, posix=True, punctuation_chars=True)
    reader.whitespace_split = True
    return list(reader)


def _command(words: list[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    for at, (flag, module) in enumerate(pairwise(words)):
        if flag == "-m" and _MODULE.fullmatch(module):
            yield module, tuple(words[at + 2 :])
            return


def _line(token: Token) -> int:
    return token.map[0] + 1 if token.map else 0
