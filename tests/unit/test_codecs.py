"""Hidden states as bytes and back, and whether the bytes hold numbers, in every form they travel in."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swarm.kernels import codecs
from swarm.kernels.codecs import BLOCK_PEAK, SCALED_PEAK, SHARED_BYTES, from_wire, is_finite, to_wire
from swarm.net.forms import BLOCK_VALUES, Codec, Dtype, tensor_bytes

PLAIN: list[tuple[Dtype, Codec]] = [
    ("float32", "raw"),
    ("bfloat16", "raw"),
    ("float16", "raw"),
    ("float16", "scaled"),
]
FORMS: list[tuple[Dtype, Codec]] = [*PLAIN, ("int8", "blocks")]
BLOCKS: tuple[Dtype, Codec] = ("int8", "blocks")


def random_hidden(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("dtype", "codec"), FORMS)
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_what_is_not_a_number_is_seen(dtype: Dtype, codec: Codec, value: float) -> None:
    hidden = random_hidden(3, 8)
    assert is_finite(to_wire(hidden, dtype, codec), (3, 8), dtype, codec)
    hidden[1, 5] = value
    assert not is_finite(to_wire(hidden, dtype, codec), (3, 8), dtype, codec)


@pytest.mark.parametrize(("dtype", "codec"), PLAIN)
def test_the_largest_and_smallest_numbers_are_numbers(dtype: Dtype, codec: Codec) -> None:
    kind = torch.finfo(getattr(torch, dtype))
    hidden = torch.tensor([[kind.max, kind.min, kind.smallest_normal, 0.0, -0.0]])
    assert is_finite(to_wire(hidden, dtype, codec), (1, 5), dtype, codec)


@pytest.mark.parametrize("scale", [1e34, -1e34, float("nan"), float("inf")])
def test_a_scale_that_makes_a_value_infinite_is_seen(scale: float) -> None:
    data = bytes(to_wire(torch.tensor([[scale]]), "float32"))
    data += bytes(to_wire(torch.tensor([[SCALED_PEAK]]), "float16"))
    assert not is_finite(data, (1, 1), "float16", "scaled")


@pytest.mark.parametrize(("dtype", "codec"), FORMS)
@pytest.mark.parametrize("shape", [(1, 576), (5, 70), (7, 8), (3, 1), (40, 2048)])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
def test_the_bytes_are_as_many_as_announced_and_mean_the_same(
    dtype: Dtype, codec: Codec, shape: tuple[int, int], source: torch.dtype
) -> None:
    hidden = random_hidden(*shape).to(source)
    data = to_wire(hidden, dtype, codec)
    assert len(data) == tensor_bytes(shape, dtype, codec)
    loss = {"float32": 0.0, "float16": 1e-3, "bfloat16": 2**-8, "int8": 0.005}[dtype]
    for received in (bytes(data), bytearray(data)):
        found = from_wire(memoryview(received), shape, dtype, codec).float()
        assert (found - hidden.float()).abs().max() <= loss * hidden.float().abs().max()


def test_int8_is_a_float16_scale_for_each_block_of_a_token_then_the_values() -> None:
    hidden = torch.zeros(2, 40)
    hidden[0, :3] = torch.tensor([127.0, -63.6, 1.4])
    hidden[1, 32:] = -254.0
    data = bytes(to_wire(hidden, *BLOCKS))
    assert np.frombuffer(data, np.float16, 4).tolist() == [1.0, 0.0, 0.0, 2.0]
    values = np.frombuffer(data, np.int8, offset=8).reshape(2, 40)
    assert values[0].tolist() == [127, -64, 1, *[0] * 37]
    assert values[1].tolist() == [0] * 32 + [-127] * 8


@given(
    st.lists(st.floats(-8e6, 8e6, width=32), min_size=1, max_size=70),
    st.sampled_from([1.0, 1e-3, 1e-6, 1e-9, 1e-13]),
)
def test_no_value_is_off_by_more_than_half_a_step_of_its_block(values: list[float], factor: float) -> None:
    hidden = torch.tensor([values]) * factor
    data = to_wire(hidden, *BLOCKS)
    assert is_finite(data, tuple(hidden.shape), *BLOCKS)
    found = from_wire(data, tuple(hidden.shape), *BLOCKS)
    for block, original in zip(found[0].split(32), hidden[0].split(32), strict=True):
        step = original.abs().max() / BLOCK_PEAK * (1 + 2**-11) + 2**-24
        assert (block - original).abs().max() <= step * 0.501


def test_int8_carries_what_overflows_float16() -> None:
    hidden = torch.tensor([[103_821.0, -103_821.0, 1_000.0, 0.0]])
    found = from_wire(to_wire(hidden, *BLOCKS), (1, 4), *BLOCKS)
    assert torch.equal(found.sign(), hidden.sign())
    assert (found - hidden).abs().max() < 103_821 / 250


def test_a_large_value_costs_precision_in_its_own_block_alone() -> None:
    hidden = random_hidden(2, 96)
    calm = from_wire(to_wire(hidden, *BLOCKS), (2, 96), *BLOCKS)
    hidden[0, 40] = 1e6
    found = from_wire(to_wire(hidden, *BLOCKS), (2, 96), *BLOCKS)
    assert torch.equal(found[0, :32], calm[0, :32])
    assert torch.equal(found[0, 64:], calm[0, 64:])
    assert torch.equal(found[1], calm[1])


@pytest.mark.parametrize("value", [9e6, 3e38, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 31, 32, 69])
def test_what_int8_cannot_carry_does_not_become_a_number(value: float, at: int) -> None:
    hidden = random_hidden(3, 70)
    hidden[1, at] = value
    data = to_wire(hidden, *BLOCKS)
    assert not is_finite(data, (3, 70), *BLOCKS)
    found = from_wire(data, (3, 70), *BLOCKS)
    block = slice(at // 32 * 32, at // 32 * 32 + 32)
    assert not found[1, block].isfinite().any()
    found[1, block] = 0
    assert found.isfinite().all()


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf")])
def test_a_scale_of_a_block_that_is_no_number_is_seen(scale: float) -> None:
    data = np.array([1.0, scale], np.float16).tobytes() + bytes([128] * 40)
    assert not is_finite(data, (1, 40), *BLOCKS)
    assert is_finite(np.array([1.0, -65_504.0], np.float16).tobytes() + bytes([128] * 40), (1, 40), *BLOCKS)


@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_many_raw_bytes_are_not_copied(kind: type) -> None:
    shape = (SHARED_BYTES // 1024, 256)
    data = kind(to_wire(random_hidden(*shape), "float32"))
    assert from_wire(data, shape, "float32").data_ptr() == np.frombuffer(data, np.uint8).ctypes.data


def test_a_tensor_over_bytes_keeps_them() -> None:
    shape = (SHARED_BYTES // 1024, 256)
    hidden = random_hidden(*shape)
    found = [from_wire(bytes(to_wire(hidden, "float32")), shape, "float32") for _ in range(3)]
    assert all(torch.equal(one, hidden) for one in found)


def test_float32_in_memory_is_not_copied() -> None:
    hidden = random_hidden(4, 8)
    data = to_wire(hidden, "float32")
    hidden[0, 0] = 7.0
    assert from_wire(data, (4, 8), "float32")[0, 0] == 7.0


def test_both_sides_have_blocks_of_the_same_size() -> None:
    assert codecs.BLOCK_VALUES == BLOCK_VALUES
