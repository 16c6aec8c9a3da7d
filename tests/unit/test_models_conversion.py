"""A GGUF becomes a checkpoint that computes the same, byte for byte each time, whole or not at all."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from swarm.blocks.conversion import convert
from swarm.errors import InputError
from tests.tiny_gguf import CHAT_TEMPLATE, TOKENS, tiny_llama, write_gguf

pytest.importorskip("gguf")


def ignore(fraction: float) -> None:
    pass


@pytest.mark.parametrize("is_tied", [True, False])
def test_the_converted_model_computes_the_same(tmp_path, is_tied):
    model = tiny_llama(is_tied=is_tied)
    convert(write_gguf(tmp_path / "m.gguf", model), tmp_path / "out", ignore)

    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)

    ids = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(converted(ids).logits, model(ids).logits)
    assert converted.config.rms_norm_eps == 1e-5
    assert converted.config.tie_word_embeddings == is_tied
    assert converted.generation_config.eos_token_id == 2


def test_the_tokenizer_is_the_ggufs(tmp_path):
    convert(write_gguf(tmp_path / "m.gguf", tiny_llama()), tmp_path / "out", ignore)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")

    def tokens(text: str) -> list[str]:
        return tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)

    assert tokenizer.get_vocab() == {token: index for index, token in enumerate(TOKENS)}
    assert tokens("ab ab a b") == ["ab", "Ġab", "Ġ", "a", "Ġ", "b"]
    assert tokens("\n\n12") == ["ĊĊ", "1", "2"]
    assert tokens("<|im_start|>ab<|im_end|>") == ["<|im_start|>", "ab", "<|im_end|>"]
    assert tokenizer.decode(tokenizer("ab: 12.\n\nab").input_ids) == "ab: 12.\n\nab"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert chat == "<|im_start|>ab<|im_end|>"


def test_the_same_file_gives_the_same_bytes(tmp_path):
    source = write_gguf(tmp_path / "m.gguf", tiny_llama())
    convert(source, tmp_path / "a", ignore)
    convert(source, tmp_path / "b", ignore)

    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_progress_goes_from_nothing_to_all(tmp_path):
    progress: list[float] = []
    convert(write_gguf(tmp_path / "m.gguf", tiny_llama()), tmp_path / "out", progress.append)

    assert progress == sorted(progress)
    assert len(progress) > 10
    assert progress[-1] == 1.0


def test_a_conversion_that_fails_leaves_nothing(tmp_path):
    source = write_gguf(tmp_path / "m.gguf", tiny_llama())

    def fail(fraction: float) -> None:
        if fraction > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out" / "m", fail)
    assert list((tmp_path / "out").iterdir()) == []


def test_what_a_killed_conversion_left_is_cleaned_up(tmp_path):
    (tmp_path / "out" / ".m.abc.part").mkdir(parents=True)
    convert(write_gguf(tmp_path / "m.gguf", tiny_llama()), tmp_path / "out" / "m", ignore)

    assert [path.name for path in (tmp_path / "out").iterdir()] == ["m"]


@pytest.mark.parametrize("keep", [0, 4, 100, 3000, -100])
def test_a_truncated_gguf(tmp_path, keep):
    source = write_gguf(tmp_path / "m.gguf", tiny_llama())
    source.write_bytes(source.read_bytes()[:keep])

    with pytest.raises(InputError, match="cannot be read as GGUF"):
        convert(source, tmp_path / "out", ignore)
    assert not (tmp_path / "out").exists()


def test_garbage(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + b"\xff" * 1000)

    with pytest.raises(InputError, match="cannot be read as GGUF"):
        convert(tmp_path / "m.gguf", tmp_path / "out", ignore)


def test_another_architecture(tmp_path):
    source = write_gguf(tmp_path / "m.gguf", tiny_llama(), architecture="mamba")

    with pytest.raises(InputError, match="not a Llama"):
        convert(source, tmp_path / "out", ignore)


def test_without_the_package_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gguf", None)

    with pytest.raises(InputError, match="needs the package gguf") as caught:
        convert(tmp_path / "m.gguf", tmp_path / "out", ignore)
    assert "swarm-llm[demo]" in caught.value.hint
