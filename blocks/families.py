"""Which families of models run here, by the `model_type` of their config, and what sets each apart.

Listed are the families whose spans were compared with the unsplit model. Knows nothing of weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from swarm.errors import InputError
from swarm.spans import Span


@dataclass(frozen=True, slots=True)
class Family:
    """`ties_embeddings`: the head shares the embeddings' tensor where the config does not say.

    `embedding_factor` names the entry of the config by which embeddings are multiplied before the first
    block. With `has_latent_kv`, all heads share one compressed key and value.
    """

    ties_embeddings: bool = False
    embedding_factor: str | None = None
    has_latent_kv: bool = False


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one block keeps of a token: keys [heads, key_dim] and values [heads, value_dim]."""

    heads: int
    key_dim: int
    value_dim: int


FAMILIES: Mapping[str, Family] = {
    "cohere2": Family(ties_embeddings=True),
    "deepseek_v3": Family(has_latent_kv=True),
    "gemma2": Family(ties_embeddings=True),
    "gemma3_text": Family(ties_embeddings=True),
    "glm4": Family(),
    "gpt_oss": Family(),
    "granite": Family(embedding_factor="embedding_multiplier"),
    "llama": Family(),
    "llama4_text": Family(),
    "mistral": Family(),
    "mixtral": Family(),
    "olmo2": Family(),
    "phi3": Family(),
    "qwen2": Family(),
    "qwen2_moe": Family(),
    "qwen3": Family(),
    "qwen3_moe": Family(),
    "qwen3_next": Family(),
    "smollm3": Family(ties_embeddings=True),
}


WITH_VISION = ("llama4",)
"""Kinds of checkpoints of which the text model alone runs here; their config holds that of it."""


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a raw config that describes the text model: all of it, unless the model also sees."""
    inner = config.get("text_config")
    is_outer = config.get("model_type") in WITH_VISION and isinstance(inner, Mapping)
    return inner if is_outer and inner is not None else config


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that the raw config of a text model belongs to.

    Raises:
        InputError: the family is unknown, or the config does not name one.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise InputError("The model's config.json does not name a model_type.", "Get the file again.")
    if model_type not in FAMILIES:
        needs_code = " and needs code of its own, which is never run" if "auto_map" in config else ""
        raise InputError(
            f"The architecture '{model_type}' does not run here{needs_code}.",
            f"Choose a model of one of these: {', '.join(FAMILIES)}.",
        )
    return FAMILIES[model_type]


def kv_shapes(config: Any, span: Span) -> list[KVShape | None]:
    """What each block of `span` keeps of a token; None for one that keeps a state of the sequence instead.

    `config` is transformers' own of the text model.
    """
    shape = _kv_shape(config)
    layer_types = getattr(config, "layer_types", None) or ()
    stateful = {block for block, kind in enumerate(layer_types) if kind == "linear_attention"}
    return [None if block in stateful else shape for block in span.blocks]


def _kv_shape(config: Any) -> KVShape:
    family = FAMILIES.get(config.model_type)
    if family is not None and family.has_latent_kv:
        return KVShape(1, config.kv_lora_rank + config.qk_rope_head_dim, config.kv_lora_rank)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return KVShape(heads, dim, dim)
