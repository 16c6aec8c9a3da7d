"""Token ids to hidden states on a server: the very values a client computes, for next to no memory."""

import json
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from swarm.blocks.embedding import Embedding
from swarm.blocks.head import Head
from swarm.blocks.models import resolve
from swarm.errors import InputError
from tests.tiny import SPECIAL, tiny_checkpoint

IDS = torch.tensor([5, 0, 127, 5, 64])


@pytest.mark.parametrize("family", SPECIAL)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_gives_what_a_client_computes(checkpoint_of, tmp_path, family, dtype):
    model = resolve(str(checkpoint_of(family)[0]), cache_dir=tmp_path)
    embedding = Embedding.open(model, getattr(torch, dtype))

    hidden = embedding(IDS)
    assert hidden.dtype == getattr(torch, dtype)
    assert torch.equal(hidden, Head.load(model, dtype, "cpu").embed(IDS))


def test_ids_come_in_any_whole_numbers_and_number(checkpoint_of, tmp_path):
    embedding = Embedding.open(resolve(str(checkpoint_of("Llama")[0]), cache_dir=tmp_path), torch.float32)

    for dtype in (torch.uint32, torch.int32, torch.uint8):
        assert torch.equal(embedding(IDS.to(dtype)), embedding(IDS))
    assert embedding(torch.empty(0, dtype=torch.uint32)).shape == (0, 32)


@pytest.mark.parametrize("id", [-1, 128, 2**32 - 1])
def test_an_id_beyond_the_vocabulary(checkpoint_of, tmp_path, id):
    embedding = Embedding.open(resolve(str(checkpoint_of("Llama")[0]), cache_dir=tmp_path), torch.float32)

    with pytest.raises(ValueError, match="from 0 to 127"):
        embedding(torch.tensor([1, id]))


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_16_bit_rows_become_float32_before_anything_is_done_to_them(tmp_path, dtype):
    tiny_checkpoint(tmp_path / "m", "Gemma3").to(torch.bfloat16).save_pretrained(tmp_path / "m")
    model = resolve(str(tmp_path / "m"), cache_dir=tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)

    assert torch.equal(Embedding.open(model, torch.float32)(IDS), whole.get_input_embeddings()(IDS))
    assert torch.equal(Head.load(model, dtype, "cpu").embed(IDS), whole.get_input_embeddings()(IDS))


def test_mapping_costs_the_rows_in_use_alone(tmp_path):
    folder = large_vocabulary(tmp_path / "m", tokens=100_000)
    model = resolve(str(folder), cache_dir=tmp_path)
    Embedding.open(model, torch.float32)
    before = psutil.Process().memory_info().rss
    embedding = Embedding.open(model, torch.float32)
    rows = embedding(torch.tensor([0, 50_000, 99_999]))

    assert torch.equal(rows[:, 0], torch.tensor([0.0, 50_000.0, 99_999.0]))
    assert psutil.Process().memory_info().rss - before < 4 * 2**20 < model.checkpoint.entry(EMBEDDING).nbytes


EMBEDDING = "model.embed_tokens.weight"


def large_vocabulary(folder: Path, tokens: int) -> Path:
    tiny_checkpoint(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[EMBEDDING] = torch.arange(tokens, dtype=torch.float32)[:, None].repeat(1, 32)
    return rewritten(folder, tensors, vocab_size=tokens)


def rewritten(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    save_file(tensors, folder / "model.safetensors")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def test_embeddings_of_another_model_are_refused(tmp_path):
    tiny_checkpoint(tmp_path / "m")
    rewritten(tmp_path / "m", load_file(tmp_path / "m" / "model.safetensors"), vocab_size=200)

    with pytest.raises(InputError, match=r"'model\.embed_tokens\.weight' has shape \[128, 32\]"):
        Embedding.open(resolve(str(tmp_path / "m"), cache_dir=tmp_path), torch.float32)


def test_embeddings_that_are_missing_are_named(checkpoint_of, tmp_path):
    folder = tmp_path / "m"
    tiny_checkpoint(folder, shard_size="20KB")
    model = resolve(str(folder), cache_dir=tmp_path)
    (folder / model.checkpoint.files_for([EMBEDDING])[0]).unlink()

    with pytest.raises(InputError, match="is missing"):
        Embedding.open(model, torch.float32)
