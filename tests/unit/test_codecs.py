"""Whether bytes of hidden states hold numbers, in every form they travel in."""

import pytest
import torch

from swarm.kernels.codecs import SCALED_PEAK, is_finite, to_wire

FORMS = [("float32", "raw"), ("bfloat16", "raw"), ("float16", "raw"), ("float16", "scaled")]


@pytest.mark.parametrize(("dtype", "codec"), FORMS)
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_what_is_not_a_number_is_seen(dtype: str, codec: str, value: float) -> None:
    hidden = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    assert is_finite(to_wire(hidden, dtype, codec), (3, 8), dtype, codec)
    hidden[1, 5] = value
    assert not is_finite(to_wire(hidden, dtype, codec), (3, 8), dtype, codec)


@pytest.mark.parametrize(("dtype", "codec"), FORMS)
def test_the_largest_and_smallest_numbers_are_numbers(dtype: str, codec: str) -> None:
    kind = torch.finfo(getattr(torch, dtype))
    hidden = torch.tensor([[kind.max, kind.min, kind.smallest_normal, 0.0, -0.0]])
    assert is_finite(to_wire(hidden, dtype, codec), (1, 5), dtype, codec)


@pytest.mark.parametrize("scale", [1e34, -1e34, float("nan"), float("inf")])
def test_a_scale_that_makes_a_value_infinite_is_seen(scale: float) -> None:
    data = bytes(to_wire(torch.tensor([[scale]]), "float32"))
    data += bytes(to_wire(torch.tensor([[SCALED_PEAK]]), "float16"))
    assert not is_finite(data, (1, 1), "float16", "scaled")
