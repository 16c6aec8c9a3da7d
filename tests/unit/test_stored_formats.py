"""Checkpoints stored quantised: their spans equal those of a plain one with the values they stand for."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from swarm.blocks.models import Model, resolve
from swarm.blocks.precision import Precision
from swarm.blocks.shard import load_span, stored_dtype
from swarm.blocks.stored_formats import make_plain, stored_format
from swarm.errors import InputError
from swarm.kernels.quantised import bitsandbytes, has_bitsandbytes
from swarm.spans import Span
from tests.tiny import COMMON, SPECIAL, tiny_checkpoint

CPU = torch.device("cpu")
SPAN = Span(1, 4)
TILE = (20, 16)  # does not divide the tiny weights' rows: tiles at the edge are cut
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(TILE)}


def rewritten(
    folder: Path, target: Path, change: Callable[[dict[str, Tensor]], None], **config: Any
) -> Model:
    """The checkpoint in `folder` with its tensors changed and entries added to its config."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    path = target / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return resolve(str(target))


def state(model: Model) -> dict[str, Tensor]:
    """The tensors of a span in float32, each as transformers names it."""
    module = load_span(model, SPAN, Precision("float32", torch.float32, None, "float32", "raw"), CPU)
    return {name: value for name, value in module.state_dict().items() if "inv_freq" not in name}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def in_tiles(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, columns] as 8-bit floats, and the scale of each tile."""
    height, width = TILE
    grid = -(-weight.shape[0] // height), -(-weight.shape[1] // width)
    scales = torch.rand(grid) + 0.5
    wide = scales.repeat_interleave(height, 0)[: weight.shape[0]].repeat_interleave(width, 1)
    return (weight / wide[:, : weight.shape[1]]).to(torch.float8_e4m3fn), scales


def spread(scales: Tensor, shape: torch.Size) -> Tensor:
    return torch.tensor(
        [[scales[i // TILE[0], j // TILE[1]] for j in range(shape[1])] for i in range(shape[0])]
    )


def is_linear(name: str, value: Tensor) -> bool:
    return "layers" in name and value.dim() == 2 and "gate.weight" not in name


@pytest.mark.parametrize("family", ["Llama", "DeepseekV3", "Qwen3Moe"])
def test_8_bit_floats_in_tiles_stand_for_their_product_with_the_tiles_scale(
    family: str, tmp_path: Path
) -> None:
    tiny_checkpoint(tmp_path / "one", family)
    plain: dict[str, Tensor] = {}

    def to_fp8(tensors: dict[str, Tensor]) -> None:
        for name, value in list(tensors.items()):
            if is_linear(name, value):
                tensors[name], scales = in_tiles(value)
                tensors[f"{name}_scale_inv"] = scales
                plain[name] = tensors[name].float() * spread(scales, value.shape)

    stored = rewritten(tmp_path / "one", tmp_path / "fp8", to_fp8, quantization_config=FP8)
    expected = rewritten(tmp_path / "one", tmp_path / "plain", lambda tensors: tensors.update(plain))
    assert plain
    assert stored_dtype(stored.checkpoint, SPAN) == torch.bfloat16
    assert_same(state(stored), state(expected))


def test_one_scale_may_serve_a_whole_tensor() -> None:
    weight = torch.randn(6, 5).to(torch.float8_e4m3fn)
    tensors = {"a.weight": weight, "a.weight_scale_inv": torch.tensor(0.25), "norm": torch.ones(5)}
    plain = make_plain(tensors, "fp8", {"quantization_config": {"quant_method": "fp8"}}, torch.float32)
    assert torch.equal(plain["a.weight"], weight.float() * 0.25)
    assert plain.keys() == {"a.weight", "norm"}


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")  # theirs
def test_experts_of_4_bit_floats_come_out_as_transformers_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SPECIAL, "GptOss", {**SPECIAL["GptOss"], "intermediate_size": 64})
    tiny_checkpoint(tmp_path / "one", "GptOss")
    plain: dict[str, Tensor] = {}

    def to_mxfp4(tensors: dict[str, Tensor]) -> None:
        for name, value in list(tensors.items()):
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                experts, columns, rows = tensors.pop(name).shape
                blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
                scales = torch.randint(118, 130, (experts, rows, columns // 32), dtype=torch.uint8)
                tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
                plain[name] = convert_moe_packed_tensors(blocks, scales).float().contiguous()
                assert plain[name].shape == value.shape

    config = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}
    stored = rewritten(tmp_path / "one", tmp_path / "mxfp4", to_mxfp4, **config)
    expected = rewritten(tmp_path / "one", tmp_path / "plain", lambda tensors: tensors.update(plain))
    assert plain
    assert_same(state(stored), state(expected))


@pytest.mark.parametrize(
    "options",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
        {"load_in_8bit": True},
    ],
)
def test_what_bitsandbytes_saved_comes_out_as_it_reads_it_itself(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_bitsandbytes():
        pytest.skip("bitsandbytes is not installed")
    functional = bitsandbytes().functional
    monkeypatch.setitem(COMMON, "hidden_size", 64)  # on CPU it goes wrong where 64 values span two rows
    monkeypatch.setitem(COMMON, "intermediate_size", 128)
    tiny_checkpoint(tmp_path / "one")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "one",
        quantization_config=BitsAndBytesConfig(**options),
        dtype=torch.float32,
        device_map={"": "cpu"},
    )
    theirs.save_pretrained(tmp_path / "saved")
    found = state(resolve(str(tmp_path / "saved")))
    for index, block in enumerate(SPAN.blocks):
        for part in ("self_attn.q_proj", "mlp.down_proj"):
            weight = theirs.get_submodule(f"model.layers.{block}.{part}").weight
            if "load_in_8bit" in options:
                expected = weight.data.float() * (weight.SCB[:, None] / 127)
            else:
                expected = functional.dequantize_4bit(weight.data, weight.quant_state)
            assert torch.allclose(found[f"layers.{index}.{part}.weight"], expected, rtol=1e-6)
        assert torch.equal(
            found[f"layers.{index}.input_layernorm.weight"],
            theirs.get_submodule(f"model.layers.{block}.input_layernorm").weight,
        )


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "made-up", None])
def test_other_formats_are_refused_by_name_before_anything_is_loaded(
    method: str | None, tmp_path: Path
) -> None:
    tiny_checkpoint(tmp_path / "one")
    config = {"quantization_config": {"quant_method": method, "bits": 4}}
    with pytest.raises(InputError, match=f"'{method}'") as refusal:
        rewritten(tmp_path / "one", tmp_path / "two", lambda tensors: None, **config)
    assert "\n" not in str(refusal.value)


def test_a_plain_checkpoint_has_no_format() -> None:
    assert stored_format({"model_type": "llama"}) is None


def test_a_tensor_without_its_scale_is_refused_in_one_sentence(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "one")

    def without_scale(tensors: dict[str, Tensor]) -> None:
        name = "model.layers.2.mlp.up_proj.weight"
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    model = rewritten(tmp_path / "one", tmp_path / "two", without_scale, quantization_config=FP8)
    with pytest.raises(InputError, match="up_proj") as refusal:
        state(model)
    assert "\n" not in str(refusal.value)
