"""A finding: how bad it is, what was found in one sentence, and in another what to do about it."""

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

Level: TypeAlias = Literal["ok", "warning", "problem"]
Check: TypeAlias = Literal[
    "network", "initial peer", "records", "model", "server", "nat", "reachable", "clock", "version", "time"
]
"""What was looked at; `time` is whether all of it could be."""


@dataclass(frozen=True)
class Finding:
    """`cause` and `advice` are sentences for people, `facts` the figures in them for programs."""

    check: Check
    level: Level
    cause: str
    advice: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The contract of `--json`."""
        return {
            "check": self.check,
            "level": self.level,
            "cause": self.cause,
            "advice": self.advice,
            **self.facts,
        }


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"
