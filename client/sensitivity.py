"""How far results move when what went in moves a little: how much of a difference rounding alone explains.

Most blocks hand on a difference about as they got it. Some inputs let it grow, and so do blocks that route
tokens to experts, where two of those are nearly as good: who rounds otherwise then gives something else, and
is honest. Pure functions of hidden states: knows nothing of peers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from swarm.client.verdict import Allowance, Distance
from swarm.kernels.imprint import differences, projected

JITTER = 1 / 128
"""By which part of itself each value is moved: what any dtype that activations travel in can still tell."""


@dataclass(frozen=True)
class Sensitivity:
    """Differences grow `growth` times on the way through some blocks; no row was moved by more than `row`."""

    growth: float = 1.0
    row: float = 0.0

    def joined(self, other: "Sensitivity") -> "Sensitivity":
        """The greater one of both."""
        return Sensitivity(max(self.growth, other.growth), max(self.row, other.row))

    def of(self, allowed: Allowance) -> Allowance:
        """What may be between honest results, where that much is allowed otherwise."""
        grown = allowed.grown(max(1.0, self.growth))
        return Allowance(grown.mean, max(grown.row, self.row), grown.gap)


CALM = Sensitivity()
"""What is taken for granted of blocks before anybody has looked."""


def jittered(hidden: Tensor) -> Tensor:
    """Hidden states with each value a little greater or smaller, the same way each time."""
    signs = torch.randint(0, 2, hidden.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return hidden * (1 + JITTER * signs)


def sensitivity(inputs: Tensor, results: Tensor, moved: Tensor) -> Sensitivity:
    """That of blocks which make `results` of `inputs`, and `moved` of these when they are `jittered`.

    All are hidden states [positions, hidden].
    """
    came, went = _distance(inputs, jittered(inputs)), _distance(results, moved)
    return Sensitivity(went.mean / came.mean if came.mean else 1.0, went.row)


def _distance(one: Tensor, other: Tensor) -> Distance:
    return Distance.of(differences(projected(one.float().numpy()), projected(other.float().numpy())))
