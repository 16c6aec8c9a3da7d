"""How the token at a position is sampled from what a model says, as a client tells it to a hop.

The randomness of a token belongs to its position: whoever samples it, however often, draws the same number.
"""

from hashlib import blake2b
from typing import Annotated

import msgspec

LEAST_TEMPERATURE = 1e-5
"""Below it the likeliest token is taken: float32 could not hold logits divided by so little."""

KEY_BYTES = 16

MAX_TOP_K = 2**31

Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """How tokens are chosen by their logits alone. The numbers of an answer are drawn from its `key`."""

    temperature: Annotated[float, msgspec.Meta(ge=0)]
    top_k: Annotated[int, msgspec.Meta(ge=1, le=MAX_TOP_K)] | None
    top_p: Fraction | None
    min_p: Fraction | None
    key: Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]

    @property
    def is_greedy(self) -> bool:
        return self.temperature < LEAST_TEMPERATURE

    def number(self, position: int) -> float:
        """Where in [0, 1) of the distribution the token at `position` of the sequence lies."""
        digest = blake2b(position.to_bytes(8, "little"), digest_size=8, key=self.key).digest()
        return (int.from_bytes(digest, "little") >> 11) / 2**53
