"""A span: the half-open range of blocks `[start, end)` that a peer serves or a route needs."""

from typing import NamedTuple

from swarm.errors import InputError


class Span(NamedTuple):
    """Blocks `start` to `end - 1`. Ordered by start, then end."""

    start: int
    end: int

    @classmethod
    def parse(cls, text: str) -> "Span":
        """Read `"0:14"`.

        Raises:
            InputError: the text is not two whole numbers with the first one smaller.
        """
        start, colon, end = text.partition(":")
        if not (colon and start.isdecimal() and end.isdecimal() and int(start) < int(end)):
            raise InputError(
                f"'{text}' is not a span of blocks.",
                "Write START:END, for example 0:14 for blocks 0 to 13.",
            )
        return cls(int(start), int(end))

    def __str__(self) -> str:
        return f"{self.start}:{self.end}"

    @property
    def size(self) -> int:
        return self.end - self.start

    @property
    def blocks(self) -> range:
        return range(self.start, self.end)

    def covers(self, other: "Span") -> bool:
        return self.start <= other.start and other.end <= self.end
