"""How likely tokens were: the logarithms of their probabilities, as the model itself gives them.

They are those of the model's own logits, before penalties, biases, temperature or a grammar change what is
chosen from them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TokenScore:
    """The log-probability of a token in its place, and `top`: the likeliest ones there, the best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def score(logits: Tensor, token: int, top: int) -> TokenScore:
    """The score of `token` where the model gave `logits` [vocabulary]."""
    return scores(logits[None], [token], top)[0]


def scores(logits: Tensor, tokens: Sequence[int], top: int) -> list[TokenScore]:
    """The score of each of `tokens`, for `logits` [tokens, vocabulary]."""
    logprobs = logits.log_softmax(-1)
    best, ids = logprobs.topk(min(top, logprobs.shape[-1]), dim=-1)
    return [
        TokenScore(token, float(row[token]), tuple(zip(names, values, strict=True)))
        for token, row, names, values in zip(tokens, logprobs, ids.tolist(), best.tolist(), strict=True)
    ]
