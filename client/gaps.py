"""By how much tokens miss the likeliest one."""

from collections.abc import Sequence

from torch import Tensor


def gaps(logits: Tensor, tokens: Sequence[int]) -> list[float]:
    """By how many standard deviations of each row of [rows, vocabulary] its token is below the likeliest."""
    told = logits[range(len(tokens)), list(tokens)]
    return list(((logits.max(-1).values - told) / logits.std(-1).clamp_min(1e-6)).tolist())
