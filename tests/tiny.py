"""Tiny real models of each family, random weights, saved as checkpoints the way transformers saves them."""

from pathlib import Path
from typing import Any

import torch
import transformers

COMMON = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
SPECIAL: dict[str, dict[str, Any]] = {
    "Llama": {"tie_word_embeddings": True},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3},
    "Qwen3": {},
    "Mistral": {"sliding_window": 9},
    "Gemma2": {"sliding_window": 9, "query_pre_attn_scalar": 8, "final_logit_softcapping": 20.0},
    "Gemma3": {"sliding_window": 9, "query_pre_attn_scalar": 8, "sliding_window_pattern": 3},
    "Phi3": {"sliding_window": 9},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "decoder_sparse_step": 2,
    },
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 9},
    "Qwen2Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "Olmo2": {},
    "Glm4": {},
    "SmolLM3": {"no_rope_layer_interval": 2},
    "Cohere2": {"sliding_window": 9, "sliding_window_pattern": 3},
    "Granite": {
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.3,
    },
    "Llama4": {
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 40,
        "interleave_moe_layer_step": 2,
        "no_rope_layer_interval": 3,
        "attention_chunk_size": 9,
        "floor_scale": 4,
    },
    "DeepseekV3": {
        "num_key_value_heads": 4,
        "head_dim": 4,
        "moe_intermediate_size": 24,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 2,
        "kv_lora_rank": 12,
        "q_lora_rank": 20,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 6,
        "v_head_dim": 10,
        "num_mtp_layers": 0,
    },
    "Qwen3Next": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "full_attention_interval": 3,
        "linear_conv_kernel_dim": 3,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 6,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
}
CONFIG_NAMES = {"Gemma3": "Gemma3TextConfig", "Llama4": "Llama4TextConfig"}
MODEL_NAMES = {"Gemma3": "Gemma3ForCausalLM"}


def tiny_model(family: str, seed: int = 0) -> Any:
    """A causal language model of `family` in float32, in evaluation mode."""
    torch.manual_seed(seed)
    config = getattr(transformers, CONFIG_NAMES.get(family, f"{family}Config"))(
        **{**COMMON, **SPECIAL[family]}
    )
    config._attn_implementation = "eager"
    model = getattr(transformers, MODEL_NAMES.get(family, f"{family}ForCausalLM"))(config).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # all zero in a fresh model, which would hide its loss
            buffer.normal_()
    return model


def tiny_checkpoint(folder: Path, family: str = "Llama", *, shard_size: str = "5GB", seed: int = 0) -> Any:
    """Save a tiny model with a tokenizer of single bytes below `folder`; returns the model."""
    model = tiny_model(family, seed)
    model.save_pretrained(folder, max_shard_size=shard_size)
    tiny_tokenizer().save_pretrained(folder)
    return model


def tiny_tokenizer() -> Any:
    """One token a printable ASCII character, with a plain chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    specials = ["<pad>", "<s>", "</s>", "<unk>"]
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = {token: index for index, token in enumerate(specials + characters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    return fast


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """What `transformers.generate` continues `prompt` with, greedily, `count` tokens, past any end token."""
    ids = torch.tensor([prompt])
    model.generation_config.eos_token_id = None
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
        )
    return out[0, len(prompt) :].tolist()


def greedy_choices(model: Any, prompt: list[int], answer: list[int]) -> list[int]:
    """What `model` finds likeliest at each place of `answer`, given all before it, in one pass without KV.

    It equals `answer` if and only if the model, continuing `prompt` greedily, gives that answer.
    """
    ids = torch.tensor([[*prompt, *answer]])
    with torch.inference_mode():
        logits = model(ids, use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1].argmax(-1).tolist()
