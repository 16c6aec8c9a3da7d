"""Whether two computations of the same are the same, as far as honest peers' are, and who is wrong if not.

Owns how far apart honest results may be, by how they are computed; `benchmarks/audit.py` has measured it.
Pure functions of numbers: knows nothing of peers or streams.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from swarm.kernels.imprint import Difference


@dataclass(frozen=True)
class Allowance:
    """How far honest results may be from exact ones: on average over rows, and in any row; see `Difference`.

    A told token may lie `gap` standard deviations of all logits below the likeliest.
    """

    mean: float
    row: float
    gap: float

    def __add__(self, other: "Allowance") -> "Allowance":
        return Allowance(self.mean + other.mean, self.row + other.row, self.gap + other.gap)

    def grown(self, times: float) -> "Allowance":
        return Allowance(self.mean * times, self.row * times, self.gap * times)


@dataclass(frozen=True)
class Distance:
    """How far apart results are: the `mean` and the greatest `row` difference, and the greatest `gap`."""

    mean: float = 0.0
    row: float = 0.0
    gap: float = 0.0

    @classmethod
    def of(cls, rows: Sequence[Difference], gaps: Sequence[float] = ()) -> "Distance":
        worst = [max(one) for one in rows]
        mean = float(np.sqrt(np.mean(np.square(worst)))) if worst else 0.0
        return cls(mean, max(worst, default=0.0), max(gaps, default=0.0))

    def exceeds(self, allowed: Allowance) -> bool:
        return self.mean > allowed.mean or self.row > allowed.row or self.gap > allowed.gap

    def joined(self, other: "Distance") -> "Distance":
        """The greater ones of both."""
        return Distance(max(self.mean, other.mean), max(self.row, other.row), max(self.gap, other.gap))


Form: TypeAlias = tuple[str, str]
"""dtype and quantization, as they are announced."""

DTYPES: dict[str, Allowance] = {
    "float32": Allowance(mean=1e-4, row=5e-4, gap=1e-3),
    "float16": Allowance(mean=1e-3, row=5e-3, gap=1e-2),
    "bfloat16": Allowance(mean=4.5e-3, row=1.5e-2, gap=0.1),
}
TRUE: Form = ("float32", "none")
"""How results are computed that others are measured by."""

QUANTIZATIONS: dict[str, Allowance] = {
    "none": Allowance(mean=0.0, row=0.0, gap=0.0),
    "int8": Allowance(mean=1.2e-2, row=4e-2, gap=0.3),
}
"""What computing so adds for one block. It grows with the root of their number, being independent."""

UNKNOWN = Allowance(mean=0.15, row=0.5, gap=2.0)

CODECS: dict[str, Allowance] = {
    "raw": Allowance(mean=0.0, row=0.0, gap=0.0),
    "scaled": Allowance(mean=1e-3, row=5e-3, gap=1e-2),
    "blocks": Allowance(mean=1.5e-2, row=5e-2, gap=0.1),
}
"""What the way of travelling adds."""


def allowance(forms: Sequence[Form], codec: str, blocks: int) -> Allowance:
    """How far results of honest peers that compute so many blocks in these forms may be from each other."""
    computed = sum(map(exactness, forms), Allowance(0.0, 0.0, 0.0))
    return CODECS[codec] + computed.grown(blocks**0.5)


def exactness(form: Form) -> Allowance:
    """What one block adds in that form."""
    dtype, quantization = form
    return DTYPES.get(dtype, UNKNOWN) + QUANTIZATIONS.get(quantization, UNKNOWN)


Wrong: TypeAlias = Literal["audited", "witness", "unknown"]


def judge(audited_agrees: bool, witness_agrees: bool) -> Wrong:
    """Who is wrong where two disagree, by with which of them a third one agrees.

    Without a third one, and where it agrees with both or neither, nobody can tell.
    """
    if witness_agrees and not audited_agrees:
        return "audited"
    if audited_agrees and not witness_agrees:
        return "witness"
    return "unknown"
