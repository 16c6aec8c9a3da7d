"""Kernels against their plain references, with the tolerance stated."""

import pytest
import torch
from torch import nn

from swarm.kernels.attention import attend, attend_plainly
from swarm.kernels.codecs import from_wire, to_wire
from swarm.kernels.linear import LeanLinear, PackedLinear, has_native, make_linears_lean

HEADS, KV_HEADS, DIM = 6, 2, 16


def tensors(tokens: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(tokens * 1000 + length)
    return (
        torch.randn(HEADS, tokens, DIM, generator=rng),
        torch.randn(KV_HEADS, length, DIM, generator=rng),
        torch.randn(KV_HEADS, length, DIM, generator=rng),
    )


@pytest.mark.parametrize(("tokens", "length"), [(1, 1), (1, 9), (5, 5), (5, 12), (7, 40), (40, 40)])
@pytest.mark.parametrize("window", [None, 1, 3, 8, 100])
def test_attention_is_the_plain_formula(tokens, length, window):
    query, key, value = tensors(tokens, length)
    fast = attend(query, key, value, scale=0.3, window=window)
    assert torch.allclose(fast, attend_plainly(query, key, value, scale=0.3, window=window), atol=1e-6)


def test_the_plain_formula_is_softmax_over_what_a_query_sees():
    query, key, value = tensors(3, 7)
    out = attend_plainly(query, key, value, scale=0.5, window=4)
    for head in range(HEADS):
        k, v = key[head // 3], value[head // 3]
        for token in range(3):
            seen = slice(4 + token - 3, 4 + token + 1)
            weights = (0.5 * k[seen] @ query[head, token]).softmax(0)
            assert torch.allclose(out[head, token], weights @ v[seen], atol=1e-6)


def test_plain_attention_in_slices_is_the_whole(monkeypatch):
    query, key, value = tensors(40, 50)
    options = {"scale": 0.3, "softcap": 5.0, "sinks": torch.randn(HEADS)}
    whole = attend_plainly(query, key, value, **options)
    monkeypatch.setattr("swarm.kernels.attention.SCORE_BYTES", 4 * HEADS * 50 * 7)
    assert torch.allclose(attend_plainly(query, key, value, **options), whole, atol=1e-6)


def test_sinks_take_weight_and_softcap_bounds_scores():
    query, key, value = tensors(1, 5)
    swallowed = attend(query, key, value, scale=0.3, sinks=torch.full((HEADS,), 50.0))
    assert swallowed.abs().max() < 1e-6
    flat = attend(query, key, value, scale=0.3, softcap=1e-6)
    assert torch.allclose(flat, value.mean(1).repeat_interleave(HEADS // KV_HEADS, 0)[:, None], atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_raw_wire_bytes_come_back_exactly(dtype):
    values = torch.randn(3, 8).to(getattr(torch, dtype))
    data = to_wire(values, dtype)
    assert data.nbytes == values.nbytes
    assert torch.equal(from_wire(bytes(data), (3, 8), dtype), values)


def test_scaled_half_precision_survives_what_overflows_float16():
    values = torch.tensor([[103_821.0, -3.0, 0.5], [0.0, 0.0, 0.0]])
    back = from_wire(to_wire(values, "float16", "scaled"), (2, 3), "float16", "scaled")
    assert torch.isfinite(back).all()
    assert ((back - values).abs() <= values.abs() * 2**-10).all()


def test_wire_bytes_of_a_slice_are_its_own():
    values = torch.arange(12.0).view(3, 4)
    assert torch.equal(from_wire(to_wire(values[1:2, ::2], "float32"), (1, 2), "float32"), values[1:2, ::2])


def two_linears() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(43, 25), nn.Sequential(nn.Linear(25, 6, bias=False))).requires_grad_(False)


@pytest.mark.skipif(not has_native(), reason="the native loops were not built, or not for this CPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 64, 130])
def test_lean_linears_compute_in_float32_with_the_rounded_weights(rows, dtype):
    lean, rounded = two_linears(), two_linears()
    for layer in (rounded[0], rounded[1][0]):
        layer.weight.data = layer.weight.to(dtype).float()
    make_linears_lean(lean, dtype)
    assert [type(layer) for layer in (lean[0], lean[1][0])] == [LeanLinear, LeanLinear]
    x = torch.randn(rows, 1, 43)
    assert torch.allclose(lean(x), rounded(x), atol=1e-6)
    assert lean[0](x[:0]).shape == (0, 1, 25)


@pytest.mark.skipif(not has_native(), reason="the native loops were not built, or not for this CPU")
@pytest.mark.parametrize("out", [601, 2048])
def test_native_rows_shared_by_threads_are_all_computed(out):
    layer = nn.Linear(520, out).requires_grad_(False)
    lean, x, before = (
        LeanLinear(layer.weight, layer.bias, torch.float32),
        torch.randn(2, 520),
        torch.get_num_threads(),
    )
    try:
        for threads in (1, 2, 5, 3) * 5:
            torch.set_num_threads(threads)
            assert torch.allclose(lean(x), layer(x), atol=1e-5)
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines, reason="torch has no packed kernel"
)
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_packed_linears_are_linears_with_half_precision_weights(rows):
    layer = nn.Linear(40, 24).requires_grad_(False)
    packed, x = PackedLinear(layer.weight, layer.bias), torch.randn(rows, 40)
    layer.weight.data = layer.weight.half().float()
    assert torch.allclose(packed(x), layer(x), atol=1e-5)
