"""int8 and nf4 weights: what they stand for, what they take, and spans loaded with them."""

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from transformers.cache_utils import Cache

from swarm.blocks.models import resolve
from swarm.blocks.precision import QUANTIZE_CHOICES, Precision, choose_precision
from swarm.blocks.recurrent import KeyValueLayer
from swarm.blocks.shard import load_span
from swarm.errors import InputError
from swarm.kernels import quantised
from swarm.kernels.quantised import (
    Int8Weight,
    Nf4Weight,
    QuantisedLinear,
    QuantisedStack,
    bitsandbytes,
    has_bitsandbytes,
    quantise,
    quantised_bytes,
)
from swarm.spans import Span

CPU = torch.device("cpu")
KINDS = [
    "int8",
    pytest.param(
        "nf4", marks=pytest.mark.skipif(not has_bitsandbytes(), reason="bitsandbytes is not installed")
    ),
]
LARGEST_ERROR = {"int8": 0.5 / 127, "nf4": 0.16}
"""Of a value, relative to the largest that shares its scale."""


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(6, 128), (5, 7), (33, 96), (3, 40, 66)])
def test_every_value_is_close_to_what_it_was(kind, shape):
    weight = torch.randn(shape)
    stack = QuantisedStack(weight if len(shape) == 3 else weight[None], kind)
    for index, matrix in enumerate(weight if len(shape) == 3 else [weight]):
        error = (stack[torch.tensor(index)] - matrix).abs().max()
        assert 0 < error <= LARGEST_ERROR[kind] * matrix.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [128, 66])
def test_a_product_is_that_with_the_values_it_stands_for(kind, dtype, columns):
    layer = nn.Linear(columns, 24, dtype=dtype).requires_grad_(False)
    layer.weight *= 500  # sums beyond float16, but for the scales
    small = QuantisedLinear(layer, kind)
    x = torch.randn(1, 5, columns)
    expected = linear(x, values(small.weight), layer.bias.float())
    for rows in (slice(None), slice(0, 1)):
        out = small(x[:, rows].to(dtype))
        assert out.dtype == dtype
        scale = expected.abs().max()
        assert (out.float() - expected[:, rows]).abs().max() < scale * (
            1e-5 if dtype == torch.float32 else 0.03
        )


@pytest.mark.skipif(not has_bitsandbytes(), reason="bitsandbytes is not installed")
def test_int8_values_are_those_of_bitsandbytes():
    weight = torch.randn(20, 50).half()
    values, largest, _ = bitsandbytes().functional.int8_vectorwise_quant(weight)
    ours = Int8Weight(weight)
    assert (ours.values - values).abs().max() <= 1
    assert (ours.values != values).float().mean() < 0.01
    assert torch.allclose(ours.scales[:, 0] * 127, largest)


def test_a_row_of_zeros_stays_zero():
    assert not Int8Weight(torch.zeros(2, 3)).product(torch.ones(1, 3), None).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(24, 128), (5, 7), (4, 32, 66)])
def test_the_bytes_that_were_promised_are_taken(kind, shape):
    weight = Int8Weight(torch.randn(shape)) if kind == "int8" else Nf4Weight(torch.randn(shape))
    tensors = {name: value for name, value in weight.named_buffers() if name != "code"}
    taken = sum(tensor.nbytes for tensor in tensors.values())
    assert taken == quantised_bytes(torch.Size(shape), kind)


def run(module, span, hidden):
    with torch.inference_mode():
        return module(
            inputs_embeds=hidden[None],
            position_ids=torch.arange(len(hidden))[None],
            past_key_values=Cache(layers=[KeyValueLayer(len(hidden)) for _ in span.blocks]),
            use_cache=True,
        ).last_hidden_state[0]


def values(weight):
    """The matrix, or the stack of them, that a quantised weight stands for."""
    if isinstance(weight, QuantisedStack):
        return torch.stack([weight[index] for index in range(weight.weight.scales.shape[0])])
    return weight[0] if isinstance(weight, Nf4Weight) else weight[...]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["Llama", "Qwen3Moe", "GptOss", "Llama4", "DeepseekV3"])
def test_a_span_computes_with_the_values_its_weights_stand_for_experts_and_all(kind, family, checkpoint_of):
    model, span = resolve(str(checkpoint_of(family)[0])), Span(1, 4)
    small = load_span(model, span, choose_precision("auto", CPU, torch.float32, kind), CPU)
    plain = load_span(model, span, Precision("float32", torch.float32, None, "float32", "raw"), CPU)
    assert not [name for name, module in small.layers.named_modules() if type(module) is nn.Linear]
    assert not [name for name, value in small.layers.named_parameters() if value.dim() == 3]
    for name, module in small.layers.named_modules():
        if isinstance(module, QuantisedLinear):
            plain.layers.get_submodule(name).weight.data = values(module.weight)
        if isinstance(module, QuantisedStack):
            plain.layers.get_parameter(name).data = values(module)
    hidden = torch.randn(9, model.hidden_size)
    expected = run(plain, span, hidden)
    assert torch.allclose(run(small, span, hidden), expected, atol=1e-4 * expected.abs().max())


def test_convolutions_and_routers_stay_as_they_are():
    class Router(nn.Linear): ...

    parts = {"conv": nn.Conv1d(4, 4, 3, groups=4), "router": Router(4, 2), "up": nn.Linear(4, 4)}
    module = nn.ModuleDict(parts)
    quantise(module, "int8")
    assert [type(child).__name__ for child in module.values()] == ["Conv1d", "Router", "QuantisedLinear"]
    assert isinstance(module["conv"].weight, nn.Parameter)


def test_quantised_weights_go_with_wide_activations_on_a_cpu(caplog):
    precision = choose_precision("auto", CPU, torch.bfloat16, "int8")
    assert (precision.name, precision.quantization) == ("float32", "int8")
    assert precision.linear_dtype is None
    assert "faster" in caplog.text
    assert choose_precision("bfloat16", CPU, torch.float32, "int8").dtype == torch.bfloat16
    on_gpu = choose_precision("auto", torch.device("cuda"), torch.bfloat16, "int8")
    assert (on_gpu.name, on_gpu.quantization) == ("bfloat16", "int8")


@pytest.mark.parametrize(("dtype", "quantize"), [("float16", "int8"), ("auto", "int4"), ("int3", "int8")])
def test_what_cannot_be_is_refused_in_one_sentence(dtype, quantize):
    with pytest.raises(InputError) as refusal:
        choose_precision(dtype, CPU, torch.float32, quantize)
    assert "\n" not in str(refusal.value)
    assert "int4" not in QUANTIZE_CHOICES


def test_nf4_without_its_package_says_what_to_install(monkeypatch):
    def missing():
        raise ImportError("no bitsandbytes")

    monkeypatch.setattr(quantised, "bitsandbytes", missing)
    with pytest.raises(InputError, match="bitsandbytes"):
        choose_precision("auto", CPU, torch.float32, "nf4")
