"""Files of ranks, written the way tensor-parallel engines do it, make the very tensors they were cut from."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from swarm.blocks.checkpoint import Checkpoint
from swarm.blocks.models import Model, resolve
from swarm.blocks.ranks import rank_files
from swarm.errors import InputError
from swarm.spans import Span
from tests.tiny import COMMON, tiny_checkpoint

HEADS, KV_HEADS, DIM, VOCAB = (
    COMMON[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
)
BY_OUTPUTS = ("q_proj", "gate_proj", "up_proj")
BY_INPUTS = ("o_proj.weight", "down_proj.weight")


def slice_of(name: str, tensor: Tensor, rank: int, ranks: int) -> Tensor:
    """What one rank keeps of a tensor that transformers has whole."""
    module = name.split(".")[-2]
    if module in ("embed_tokens", "lm_head"):
        padded = torch.cat([tensor, torch.zeros(-len(tensor) % (64 * ranks), *tensor.shape[1:])])
        return padded.chunk(ranks)[rank]
    if module in ("k_proj", "v_proj"):
        return tensor.chunk(min(ranks, KV_HEADS))[rank * min(ranks, KV_HEADS) // ranks]
    if module == "qkv_proj":
        parts = zip("qkv", tensor.split([HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM]), strict=True)
        return torch.cat([slice_of(f"{which}_proj.weight", part, rank, ranks) for which, part in parts])
    if module == "gate_up_proj":
        return torch.cat([part.chunk(ranks)[rank] for part in tensor.chunk(2)])
    if name.endswith(BY_INPUTS):
        return tensor.chunk(ranks, dim=1)[rank]
    return tensor.chunk(ranks)[rank] if module in BY_OUTPUTS else tensor


def fused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values as one tensor of a rank, and gate and up as another."""
    found = dict(tensors)
    for name in tensors:
        for first, others, whole in (
            ("q_proj", ("k_proj", "v_proj"), "qkv_proj"),
            ("gate_proj", ("up_proj",), "gate_up_proj"),
        ):
            if f".{first}." in name:
                parts = [found.pop(name.replace(first, one)) for one in (first, *others)]
                found[name.replace(first, whole)] = torch.cat(parts)
    return found


def save_by_rank(folder: Path, tensors: dict[str, Tensor], ranks: int, *, fuse: bool, parts: int = 2) -> None:
    for rank in range(ranks):
        held = {name: slice_of(name, tensor, rank, ranks).contiguous() for name, tensor in tensors.items()}
        if fuse:
            held = fused(held) | {"model.layers.0.self_attn.attn._k_scale": torch.ones(1)}
        names = sorted(held)
        for part in range(parts):
            some = {name: held[name] for name in names[part::parts]}
            save_file(some, folder / f"model-rank-{rank}-part-{part}.safetensors")


def by_rank(
    tmp_path: Path, family: str, ranks: int, *, fuse: bool = True, parts: int = 2
) -> tuple[Model, dict[str, Tensor]]:
    tiny_checkpoint(tmp_path / "m", family)
    weights = tmp_path / "m" / "model.safetensors"
    tensors = load_file(weights)
    weights.unlink()
    kept = dict(tensors)
    if "lm_head.weight" not in kept:  # of a tied pair, engines keep the first name
        kept["lm_head.weight"] = kept.pop("model.embed_tokens.weight")
    save_by_rank(tmp_path / "m", kept, ranks, fuse=fuse, parts=parts)
    return resolve(str(tmp_path / "m"), cache_dir=tmp_path / "cache"), tensors


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Phi3", "Glm4", "Gemma2", "SmolLM3"])
def test_the_slices_of_ranks_make_whole_tensors(tmp_path, family, ranks, fuse):
    model, tensors = by_rank(tmp_path, family, ranks, fuse=fuse)
    checkpoint = model.checkpoint

    names = [n for names in checkpoint.block_tensors(Span(0, 6)).values() for n in names]
    names += checkpoint.head_tensors()
    assert set(names) == set(tensors)
    for name, tensor in checkpoint.read(names):
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor, tensors[name]), name


def test_tied_tensors_are_read_once(tmp_path):
    checkpoint = by_rank(tmp_path, "Llama", 2)[0].checkpoint

    assert checkpoint.is_tied
    assert checkpoint.head_tensors() == ["model.embed_tokens.weight", "model.norm.weight"]
    [(_, head), (_, embeddings)] = checkpoint.read(["lm_head.weight", "model.embed_tokens.weight"])
    assert head.data_ptr() == embeddings.data_ptr()


def test_row_slices_larger_than_a_read_are_put_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setattr("swarm.blocks.reading.READ_CHUNK_BYTES", 100)
    model, tensors = by_rank(tmp_path, "Llama", 2)

    for name, tensor in model.checkpoint.read(["model.layers.3.mlp.down_proj.weight", "lm_head.weight"]):
        assert torch.equal(tensor, tensors.get(name, tensors["model.embed_tokens.weight"]))


def test_an_index_that_was_copied_along_is_not_believed(tmp_path):
    model, tensors = by_rank(tmp_path, "Qwen3", 2)
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))

    again = resolve(str(tmp_path / "m"), cache_dir=tmp_path / "cache")
    assert again.model_id == model.model_id
    assert set(again.checkpoint.names) == set(model.checkpoint.names)


def test_a_file_of_the_whole_model_is_preferred(tmp_path):
    _, tensors = by_rank(tmp_path, "Qwen3", 2)
    save_file(tensors, tmp_path / "m" / "model.safetensors")

    assert resolve(str(tmp_path / "m"), cache_dir=tmp_path / "cache").checkpoint.files == (
        "model.safetensors",
    )


def test_ranks_that_hold_other_weights_make_another_model(tmp_path):
    model, tensors = by_rank(tmp_path, "Qwen3", 2)
    tensors["model.layers.5.mlp.up_proj.weight"][-1] += 1
    save_by_rank(tmp_path / "m", tensors, 2, fuse=True)

    assert resolve(str(tmp_path / "m"), cache_dir=tmp_path / "cache").model_id != model.model_id


@pytest.mark.parametrize("lacking", ["model-rank-0-part-0", "model-rank-1-part-0"])
def test_a_file_that_is_missing_is_named(tmp_path, lacking):
    by_rank(tmp_path, "Llama", 3 if lacking.startswith("model-rank-3") else 2)
    (tmp_path / "m" / f"{lacking}.safetensors").unlink()

    with pytest.raises(InputError, match=rf"{lacking}\.safetensors is missing"):
        resolve(str(tmp_path / "m"), cache_dir=tmp_path / "cache")


def test_a_last_part_that_is_missing_is_noticed_by_its_tensors(tmp_path):
    by_rank(tmp_path, "Llama", 2)
    (tmp_path / "m" / "model-rank-1-part-1.safetensors").unlink()
    model = resolve(str(tmp_path / "m"), cache_dir=tmp_path / "cache")

    with pytest.raises(InputError, match="the ranks do not all hold a slice of it"):
        _ = model.checkpoint.names


@pytest.mark.parametrize(
    ("names", "ranks"),
    [
        (["config.json", "model.safetensors"], []),
        (["model-rank-0-part-0.safetensors"], [["model-rank-0-part-0.safetensors"]]),
        (["model-rank-0-part-x.safetensors", "xmodel-rank-0-part-0.safetensors"], []),
        (
            [f"model-rank-0-part-{part}.safetensors" for part in (10, *range(10))],
            [[f"model-rank-0-part-{part}.safetensors" for part in range(11)]],
        ),
    ],
)
def test_files_of_ranks_are_known_by_their_names(names, ranks):
    assert rank_files(names) == ranks


@pytest.mark.parametrize(
    ("name", "shapes", "reason"),
    [
        ("model.layers.1.self_attn.q_proj.weight", [(9, 32), (9, 32)], "18 rows on 2 ranks are not 32"),
        ("model.layers.1.self_attn.q_proj.weight", [(8, 32), (24, 32)], "32 rows on 2 ranks are not 32"),
        ("model.layers.1.self_attn.qkv_proj.weight", [(31, 32), (32, 32)], "do not have 32 rows"),
        ("model.layers.1.self_attn.qkv_proj.qweight", [(32, 32), (32, 32)], "quantised"),
        ("model.layers.1.mlp.gate_up_proj.weight", [(50, 32), (50, 32)], "do not have 48 rows"),
        ("model.layers.1.self_attn.o_proj.weight", [(32, 15), (32, 15)], "15 columns on 2 ranks are not 32"),
        ("model.layers.1.self_attn.o_proj.weight", [(32, 16), (31, 16)], "do not fit each other"),
        ("model.layers.1.input_layernorm.weight", [(32,), (31,)], "in different shapes"),
        ("model.layers.1.self_attn.rotate.weight", [(32, 32), (32, 32)], "not known how the ranks share it"),
        ("model.layers.1.self_attn.o_proj.scales", [(32, 16), (32, 16)], "not known how the ranks share it"),
        ("model.layers.1.mlp.experts.w13_weight", [(4, 48, 32), (4, 48, 32)], "experts"),
        ("model.embed_tokens.weight", [(32, 32), (32, 32)], "64 rows on 2 ranks are not those of 128"),
        ("model.embed_tokens.weight", [(200, 32), (200, 32)], "400 rows on 2 ranks are not those of 128"),
    ],
)
def test_what_cannot_be_put_together_for_certain_is_named(tmp_path, checkpoint_of, name, shapes, reason):
    config = json.loads((checkpoint_of("Llama")[0] / "config.json").read_text())
    for rank, shape in enumerate(shapes):
        save_file({name: torch.zeros(shape)}, tmp_path / f"model-rank-{rank}-part-0.safetensors")

    with pytest.raises(InputError, match=reason) as refused:
        _ = Checkpoint(tmp_path, 6, config=config).names
    assert f"'{name}'" in refused.value.message


def test_two_parts_with_the_same_tensor(tmp_path, checkpoint_of):
    config = json.loads((checkpoint_of("Llama")[0] / "config.json").read_text())
    save_file({"model.norm.weight": torch.zeros(32)}, tmp_path / "model-rank-0-part-0.safetensors")
    shutil.copy(tmp_path / "model-rank-0-part-0.safetensors", tmp_path / "model-rank-0-part-1.safetensors")

    with pytest.raises(InputError, match=r"'model\.norm\.weight' .* two parts of a rank hold it"):
        _ = Checkpoint(tmp_path, 6, config=config).names


@pytest.mark.parametrize("lacking", ["num_attention_heads", "vocab_size", "intermediate_size"])
def test_a_config_that_does_not_tell_the_sizes(tmp_path, checkpoint_of, lacking):
    config = json.loads((checkpoint_of("Llama")[0] / "config.json").read_text())
    save_file({"model.norm.weight": torch.zeros(32)}, tmp_path / "model-rank-0-part-0.safetensors")

    with pytest.raises(InputError, match=f"no usable {lacking}"):
        _ = Checkpoint(tmp_path, 6, config=config | {lacking: None}).names
