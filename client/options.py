"""How an answer is made and when it ends, validated once. Light: the command line checks its values here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, get_args

from swarm.client.peer_ids import check_peers
from swarm.errors import InputError
from swarm.net.forms import Wire

if TYPE_CHECKING:
    from swarm.client.grammar import Grammar

MAX_PENALTY = 2.0
"""Presence and frequency penalties lie between this and its negative, as those who defined them have it."""

MAX_BIAS = 100.0
"""What is added to a token's logit at most: enough to force or to ban it."""

MAX_LOGPROBS = 20
"""So many of the likeliest tokens are told at each position at most."""


PUBLIC_AUDIT_RATE = 0.03
"""The part of all sessions that is audited among strangers, unless a client wants another."""


class Options(TypedDict, total=False):
    """How to answer; see `GenerationOptions` and `SamplingOptions` for what the values mean."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int | None
    stop: str | Sequence[str]
    ignore_eos: bool
    speculate: bool
    logprobs: int | None
    score_prompt: bool
    grammar: "Grammar | None"


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen. Temperature 0 always takes the likeliest; the same seed samples the same text.

    The repetition penalty counts the prompt's tokens too. From the logit of a token that is in the answer
    already `presence_penalty` is taken once, `frequency_penalty` for each time that it is there; `logit_bias`
    is added to those of the tokens it names.

    Raises:
        InputError: a value is out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

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
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(abs(value) <= MAX_PENALTY, name, value, f"between {-MAX_PENALTY:g} and {MAX_PENALTY:g}")
        for token, bias in self.logit_bias.items():
            _require(token >= 0, "A token of logit_bias", token, "of 0 or more")
            _require(
                abs(bias) <= MAX_BIAS,
                f"The logit_bias of token {token}",
                bias,
                f"between {-MAX_BIAS:g} and {MAX_BIAS:g}",
            )


@dataclass(frozen=True)
class GenerationOptions:
    """When an answer ends, and how its tokens are chosen.

    With `speculate`, steps may verify several drafted tokens where that is faster; the tokens stay the same.
    With `logprobs` it is told how likely each token was, and so many of the likeliest in its place; with
    `score_prompt` the same of the prompt's tokens, none of which is then taken from what hops have kept.
    `grammar` says what the answer must be like.

    Raises:
        InputError: a value is out of its range.
    """

    max_new_tokens: int = 256
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    speculate: bool = True
    logprobs: int | None = None
    score_prompt: bool = False
    grammar: "Grammar | None" = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}.", "Choose a value of 1 or more.")
        if not all(self.stop):
            raise InputError("A stop string is empty.", "Leave it out, or write at least one character.")
        asked = self.logprobs
        _require(
            asked is None or 0 <= asked <= MAX_LOGPROBS, "logprobs", asked, f"between 0 and {MAX_LOGPROBS}"
        )
        if self.score_prompt and asked is None:
            raise InputError("score_prompt is set without logprobs.", "Say how many are to be told.")
        if self.grammar is not None and self.ignore_eos:
            raise InputError(
                "An answer by a grammar ends where that does.", "Leave out ignore_eos, or the grammar."
            )


def generation_options(options: Options) -> GenerationOptions:
    """Sort keyword options into what they configure.

    Raises:
        InputError: a value is out of its range.
        TypeError: there is no such option.
    """
    given: dict[str, Any] = dict(options)
    names = {one.name for one in fields(GenerationOptions)} - {"sampling", "stop"}
    others = {name: given.pop(name) for name in names & given.keys()}
    stop = given.pop("stop", ())
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    return GenerationOptions(sampling=SamplingOptions(**given), stop=stops, **others)


class SessionKeywords(TypedDict, total=False):
    """How sessions travel; see `SessionOptions`."""

    push: bool
    wire: Wire
    standby: bool
    journal_memory: int
    journal_disk: int
    trust_first_last: Sequence[str] | None
    trust_depth: int
    max_share: float
    audit_rate: float | None
    evidence_folder: Path | str | None


@dataclass(frozen=True)
class SessionOptions:
    """How a client's sessions travel, and what it keeps for the loss of a server.

    With `push` servers pass steps on to each other where they can. Activations travel as `wire` says. With
    `standby` each server copies what it holds of a session to another one, which goes on should it be lost.
    What went between servers is kept in `journal_memory` bytes, and `journal_disk` more in a temporary file,
    for all sessions together; what does not fit is computed again where it is needed.

    Where `trust_first_last` names peers, they alone run the first `trust_depth` blocks and as many last ones:
    near the ends activations tell the text most easily. No peer runs more than `max_share` of all blocks.

    Of the part `audit_rate` of all sessions other servers compute once more what each gave; None stands for
    `PUBLIC_AUDIT_RATE`, and for no session in private swarms. Evidence of wrong results is written to
    `evidence_folder`, if there is one: the text can be told from it.

    Raises:
        InputError: a value is out of its range.
    """

    push: bool = True
    wire: Wire = "exact"
    standby: bool = False
    journal_memory: int = 256 * 2**20
    journal_disk: int = 4 * 2**30
    trust_first_last: Sequence[str] | None = None
    trust_depth: int = 1
    max_share: float = 1.0
    audit_rate: float | None = None
    evidence_folder: Path | str | None = None

    def __post_init__(self) -> None:
        _require(self.wire in get_args(Wire), "wire", self.wire, "exact, half or int8")
        _require(self.journal_memory >= 0, "journal_memory", self.journal_memory, "0 or more")
        _require(self.journal_disk >= 0, "journal_disk", self.journal_disk, "0 or more")
        if self.trust_first_last is not None:
            _require(bool(self.trust_first_last), "trust_first_last", "empty", "with at least one peer")
            check_peers(self.trust_first_last)
        _require(self.trust_depth >= 1, "trust_depth", self.trust_depth, "of 1 or more")
        _require(0 < self.max_share <= 1, "max_share", self.max_share, "above 0 and at most 1")
        rate = self.audit_rate
        _require(rate is None or 0 <= rate <= 1, "audit_rate", rate, "between 0 and 1")

    def audited(self, *, is_private: bool) -> float:
        """The part of all sessions that is audited, in a private swarm or a public one."""
        if self.audit_rate is None:
            return 0.0 if is_private else PUBLIC_AUDIT_RATE
        return self.audit_rate


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise InputError(f"{name} is {value}.", f"Choose a value {allowed}.")
