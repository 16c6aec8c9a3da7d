"""Which families of models run here, by the `model_type` of their config, and what sets each apart.

Listed are the families whose spans were compared with the unsplit model. Knows nothing of weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from swarm.errors import InputError


@dataclass(frozen=True, slots=True)
class Family:
    """`ties_embeddings`: the head shares the embeddings' tensor where the config does not say."""

    ties_embeddings: bool = False


FAMILIES: Mapping[str, Family] = {
    "cohere2": Family(ties_embeddings=True),
    "gemma2": Family(ties_embeddings=True),
    "gemma3_text": Family(ties_embeddings=True),
    "glm4": Family(),
    "gpt_oss": Family(),
    "llama": Family(),
    "mistral": Family(),
    "mixtral": Family(),
    "olmo2": Family(),
    "phi3": Family(),
    "qwen2": Family(),
    "qwen2_moe": Family(),
    "qwen3": Family(),
    "qwen3_moe": Family(),
    "smollm3": Family(ties_embeddings=True),
}


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
