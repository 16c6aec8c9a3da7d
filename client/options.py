"""How an answer is made and when it ends, validated once. Light: the command line checks its values here."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, TypedDict

from swarm.errors import InputError


class Options(TypedDict, total=False):
    """How to answer; see `GenerationOptions` and `SamplingOptions` for what the values mean."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    seed: int | None
    stop: str | Sequence[str]
    ignore_eos: bool


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen. Temperature 0 always takes the likeliest; the same seed samples the same text.

    Raises:
        InputError: a value is out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _require(
            isfinite(self.temperature) and self.temperature >= 0, "temperature", self.temperature, "0 or more"
        )
        _require(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "of 1 or more")
        _require(self.top_p is None or 0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _require(self.min_p is None or 0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 and 1")
        penalty = self.repetition_penalty
        _require(isfinite(penalty) and penalty > 0, "repetition_penalty", penalty, "above 0")
        _require(self.seed is None or 0 <= self.seed < 2**63, "seed", self.seed, "a whole number from 0 on")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True)
class GenerationOptions:
    """When an answer ends, and how its tokens are chosen.

    Raises:
        InputError: a value is out of its range.
    """

    max_new_tokens: int = 256
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}.", "Choose a value of 1 or more.")
        if not all(self.stop):
            raise InputError("A stop string is empty.", "Leave it out, or write at least one character.")


def generation_options(options: Options) -> GenerationOptions:
    """Sort keyword options into what they configure.

    Raises:
        InputError: a value is out of its range.
        TypeError: there is no such option.
    """
    given: dict[str, Any] = dict(options)
    ending = {name: given.pop(name) for name in ("max_new_tokens", "ignore_eos") if name in given}
    stop = given.pop("stop", ())
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    return GenerationOptions(sampling=SamplingOptions(**given), stop=stops, **ending)


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise InputError(f"{name} is {value}.", f"Choose a value {allowed}.")
