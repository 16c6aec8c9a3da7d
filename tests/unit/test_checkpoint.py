"""Reading safetensors by byte range: the right bytes in the right order, few of them in flight."""

import json
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from swarm.blocks import reading
from swarm.blocks.checkpoint import Checkpoint
from swarm.errors import InputError
from swarm.spans import Span

BLOCKS = 4


def llama_tensors(*, prefix: str = "model.", head: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {f"{prefix}embed_tokens.weight": rand(32, 16), f"{prefix}norm.weight": rand(16)}
    if head:
        tensors["lm_head.weight"] = rand(32, 16)
    for block in range(BLOCKS):
        inside = f"{prefix}layers.{block}."
        tensors[f"{inside}self_attn.q_proj.weight"] = rand(16, 16).to(torch.bfloat16)
        tensors[f"{inside}mlp.up_proj.weight"] = rand(24, 16)
        tensors[f"{inside}self_attn.rotary_emb.inv_freq"] = rand(4)
    return tensors


def save_single(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return folder / "model.safetensors"


def save_sharded(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Blocks 0 and 1 in the first file, 2 and 3 in the second, the two ends in the third."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for name in tensors:
        block = name.partition("layers.")[2].partition(".")[0]
        shard = 1 + int(block) // 2 if block else 3
        weight_map[name] = f"model-0000{shard}-of-00003.safetensors"
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


@pytest.mark.parametrize("save", [save_single, save_sharded])
@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("memory_budget", [1, 3000, 2**30])
def test_read_gives_every_tensor_in_the_order_asked_for(tmp_path, save, threads, memory_budget):
    tensors = llama_tensors()
    save(tmp_path, tensors)
    names = sorted(tensors, reverse=True)

    read = list(Checkpoint(tmp_path, BLOCKS).read(names, threads=threads, memory_budget=memory_budget))

    assert [name for name, _ in read] == names
    for name, tensor in read:
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor, tensors[name])


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.5),
        torch.empty(0, 4),
        torch.tensor([True, False]),
        torch.arange(5, dtype=torch.int64),
        torch.arange(5, dtype=torch.uint8),
        torch.ones(3, dtype=torch.float16),
        torch.ones(3, dtype=torch.float8_e4m3fn),
    ],
    ids=lambda tensor: str(tensor.dtype),
)
def test_read_keeps_dtype_and_shape(tmp_path, tensor):
    save_single(tmp_path, {"odd": torch.ones(1, dtype=torch.uint8), "x": tensor})

    [(_, read)] = Checkpoint(tmp_path, BLOCKS).read(["x"])

    assert read.dtype == tensor.dtype
    assert read.shape == tensor.shape
    assert bytes(read.reshape(-1).view(torch.uint8).numpy()) == bytes(
        tensor.reshape(-1).view(torch.uint8).numpy()
    )


def test_read_goes_through_large_tensors_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "READ_CHUNK_BYTES", 7)
    tensors = {"a": torch.randn(100), "b": torch.randn(33)}
    save_single(tmp_path, tensors)

    read = dict(Checkpoint(tmp_path, BLOCKS).read(["b", "a"]))

    assert torch.equal(read["a"], tensors["a"])
    assert torch.equal(read["b"], tensors["b"])


def test_read_keeps_to_its_memory_budget(tmp_path, monkeypatch):
    tensors = {f"t{i:02}": torch.zeros(250) for i in range(20)}
    save_single(tmp_path, tensors)
    started: list[str] = []
    monkeypatch.setattr(reading, "read_tensor", lambda _, entry, *rest: started.append(entry.name))

    ahead = []
    for taken, _ in enumerate(
        Checkpoint(tmp_path, BLOCKS).read(sorted(tensors), threads=1, memory_budget=3000)
    ):
        ahead.append(len(started) - taken)

    assert max(ahead) <= 3
    assert len(started) == 20


def test_closing_the_iterator_early_stops_its_threads(tmp_path):
    tensors = {f"t{i}": torch.zeros(1000) for i in range(50)}
    save_single(tmp_path, tensors)

    stream = Checkpoint(tmp_path, BLOCKS).read(sorted(tensors), threads=4, memory_budget=20_000)
    next(stream)
    stream.close()

    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-weights")]


def test_a_file_that_shrinks_after_its_header_was_read_is_truncated(tmp_path):
    path = save_single(tmp_path, {"a": torch.zeros(1000)})
    checkpoint = Checkpoint(tmp_path, BLOCKS)
    assert checkpoint.entry("a").nbytes == 4000
    with path.open("r+b") as file:
        file.truncate(500)

    with pytest.raises(InputError, match="truncated"):
        list(checkpoint.read(["a"]))


@pytest.mark.parametrize("prefix", ["model.", "language_model.model.", "model.language_model.", ""])
def test_tensors_are_found_under_any_prefix(tmp_path, prefix):
    tensors = llama_tensors(prefix=prefix)
    for layer in range(BLOCKS + 2):
        tensors[f"vision_tower.encoder.layers.{layer}.weight"] = torch.zeros(1)
    save_single(tmp_path, tensors)
    checkpoint = Checkpoint(tmp_path, BLOCKS)

    assert checkpoint.block_prefix == f"{prefix}layers."
    assert checkpoint.block_tensors(Span(1, 3)) == {
        block: [
            f"{prefix}layers.{block}.mlp.up_proj.weight",
            f"{prefix}layers.{block}.self_attn.q_proj.weight",
        ]
        for block in (1, 2)
    }
    assert set(checkpoint.head_tensors()) == {
        f"{prefix}embed_tokens.weight",
        f"{prefix}norm.weight",
        "lm_head.weight",
    }


def test_blocks_with_two_digits_are_told_apart(tmp_path):
    tensors = {f"model.layers.{block}.w": torch.zeros(1) for block in range(12)}
    save_single(tmp_path, tensors | {"model.embed_tokens.weight": torch.zeros(1)})

    assert Checkpoint(tmp_path, 12).block_tensors(Span(1, 2)) == {1: ["model.layers.1.w"]}


@pytest.mark.parametrize(("has_head", "config_ties", "is_tied"), [(1, 0, 0), (1, 1, 1), (0, 0, 1), (0, 1, 1)])
def test_a_tied_head_has_no_tensor_of_its_own(tmp_path, has_head, config_ties, is_tied):
    save_single(tmp_path, llama_tensors(head=bool(has_head)))
    checkpoint = Checkpoint(tmp_path, BLOCKS, ties_embeddings=bool(config_ties))

    assert checkpoint.is_tied == is_tied
    assert ("lm_head.weight" in checkpoint.head_tensors()) == (not is_tied)


def test_only_the_files_of_a_span_are_needed(tmp_path):
    weight_map = save_sharded(tmp_path, llama_tensors())
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    (tmp_path / "model-00003-of-00003.safetensors").unlink()
    checkpoint = Checkpoint(tmp_path, BLOCKS)
    names = [name for tensors in checkpoint.block_tensors(Span(0, 2)).values() for name in tensors]

    assert checkpoint.files == tuple(sorted(set(weight_map.values())))
    assert checkpoint.files_for(names) == ("model-00001-of-00003.safetensors",)
    assert checkpoint.files_for(checkpoint.head_tensors()) == ("model-00003-of-00003.safetensors",)
    assert [name for name, _ in checkpoint.read(names)] == names
    with pytest.raises(InputError, match=r"model-00003-of-00003\.safetensors is missing"):
        checkpoint.entry("lm_head.weight")


def test_a_tensor_that_the_index_names_and_the_file_lacks(tmp_path):
    weight_map = save_sharded(tmp_path, llama_tensors())
    write_index(tmp_path, weight_map | {"model.layers.0.extra": "model-00001-of-00003.safetensors"})

    with pytest.raises(InputError, match=r"has no tensor 'model\.layers\.0\.extra'"):
        Checkpoint(tmp_path, BLOCKS).entry("model.layers.0.extra")
    with pytest.raises(InputError, match="has no tensor 'nonsense'"):
        Checkpoint(tmp_path, BLOCKS).entry("nonsense")


def test_fewer_blocks_than_the_config_says(tmp_path):
    save_single(tmp_path, llama_tensors())

    with pytest.raises(InputError, match="does not hold 5 blocks"):
        Checkpoint(tmp_path, 5).block_tensors(Span(0, 5))


@pytest.mark.parametrize(
    "file",
    [
        "../model.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        "x\\y.safetensors",
        ".safetensors",
        3,
        None,
    ],
)
def test_an_index_cannot_name_files_elsewhere(tmp_path, file):
    write_index(tmp_path, {"a": file})

    with pytest.raises(InputError, match="no weights file of that folder"):
        Checkpoint(tmp_path, BLOCKS)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"weight_map": 3}', '{"weight_map": {}}', "[" * 100_000, "\udcff"]
)
def test_a_garbled_index(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text, errors="surrogateescape")

    with pytest.raises(InputError, match=r"index\.json"):
        Checkpoint(tmp_path, BLOCKS)


@pytest.mark.parametrize("memory_budget", [1, 3000, 2**30])
def test_tensors_that_share_storage_are_read_once_and_stay_one(tmp_path, monkeypatch, memory_budget):
    read_tensor, started = reading.read_tensor, []
    monkeypatch.setattr(reading, "read_tensor", lambda *given: started.append(given) or read_tensor(*given))
    [a, b] = tensors = [torch.randn(250), torch.randn(500)]
    save_shared(tmp_path, {"a": a, "b": b}, {"c": "a"})

    names = ["a", "b", "c", "b", "a"]
    read = [tensor for _, tensor in Checkpoint(tmp_path, BLOCKS).read(names, memory_budget=memory_budget)]
    assert all(torch.equal(tensor, tensors[at]) for tensor, at in zip(read, [0, 1, 0, 1, 0], strict=True))
    assert read[0].data_ptr() == read[2].data_ptr() == read[4].data_ptr()
    assert len(started) == 2


def test_what_was_read_is_not_kept_for_who_asks_for_it_later(tmp_path):
    save_single(tmp_path, {"a": torch.randn(10)})
    checkpoint = Checkpoint(tmp_path, BLOCKS)

    [(_, first)], [(_, second)] = checkpoint.read(["a"]), checkpoint.read(["a"])
    assert first.data_ptr() != second.data_ptr()


def save_shared(folder: Path, tensors: dict[str, torch.Tensor], same: dict[str, str]) -> None:
    """`same` names tensors that lie where others do."""
    path = save_single(folder, tensors)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header |= {name: header[other] for name, other in same.items()}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
