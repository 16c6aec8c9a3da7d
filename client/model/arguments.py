"""Which of transformers' arguments `generate` takes over a swarm, and what follows from them.

An argument that would change nothing is taken, one that could not be honoured is refused by its name. Knows
nothing of sessions or tensors' contents.
"""

from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig

from swarm.errors import InputError

SETTINGS = frozenset(
    {
        *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time", "stop_strings"),
        *(
            "do_sample",
            "temperature",
            "top_k",
            "top_p",
            "top_h",
            "min_p",
            "typical_p",
            "num_return_sequences",
        ),
        *("epsilon_cutoff", "eta_cutoff", "renormalize_logits", "remove_invalid_values"),
        *("repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size"),
        *("encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "bad_words_ids"),
        *("sequence_bias", "suppress_tokens", "begin_suppress_tokens", "watermarking_config"),
        *("forced_bos_token_id", "forced_eos_token_id", "bos_token_id", "eos_token_id", "pad_token_id"),
        *("return_dict_in_generate", "output_scores", "output_logits"),
        *("prompt_lookup_num_tokens", "max_matching_ngram_size", "num_assistant_tokens"),
        *("num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("assistant_lookbehind", "target_lookbehind", "is_assistant"),
    }
)
"""Settings of transformers' `GenerationConfig` that mean here what they mean there."""

INPUTS = frozenset(
    {
        *("input_ids", "attention_mask", "inputs_embeds", "logits_processor", "stopping_criteria"),
        *("prefix_allowed_tokens_fn", "streamer", "tokenizer", "assistant_model", "assistant_tokenizer"),
    }
)

NEUTRAL: Mapping[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "use_cache": True,
    "length_penalty": 1.0,
    "diversity_penalty": 0.0,
    "guidance_scale": 1.0,
    "decoder_start_token_id": Any,
    "transformers_version": Any,
}
"""Values of other arguments that change nothing, besides None and False. `Any` stands for every value."""

HINTS: Mapping[str, str] = {
    "num_beams": "Servers cannot copy sessions: use do_sample with num_return_sequences.",
    "use_cache": "Servers always keep what they have computed.",
    "past_key_values": "Give session=model.inference_session(max_length=…) to go on with a sequence.",
    "output_hidden_states": "model.model.layers gives the hidden states after any block.",
    "position_ids": "Positions follow from attention_mask.",
}

CACHING = ("cache_implementation", "cache_config", "max_cache_len", "compile_config", "disable_compile")
"""Settings of a cache in the same process, which some checkpoints bring along."""


class Arguments:
    """What a call of `generate` was given, on top of the model's own settings.

    Raises:
        InputError: something that could not be honoured.
    """

    def __init__(self, own: GenerationConfig, given: GenerationConfig | None, keywords: Mapping[str, Any]):
        self._layers = (keywords, _set(given), _set(own))
        for name in dict.fromkeys(name for layer in self._layers for name in layer):
            _refuse(name, self.get(name))

    def get(self, name: str) -> Any:
        """What holds for `name`, None where nobody said anything, or a keyword None."""
        return next((layer[name] for layer in self._layers if name in layer), None)

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end a row."""
        found = self.get("eos_token_id")
        if found is None:
            return frozenset()
        return frozenset([found] if isinstance(found, int) else [int(token) for token in found])

    def length(self, prompt_tokens: int) -> int:
        """Tokens that a row may have at last."""
        new_tokens, length = self.get("max_new_tokens"), self.get("max_length")
        if new_tokens is not None:
            return prompt_tokens + int(new_tokens)
        return int(length) if length is not None else prompt_tokens + DEFAULT_NEW_TOKENS


DEFAULT_NEW_TOKENS = 20
"""So many transformers makes where nobody says how many; a session grows where that is no longer so."""


def usable(config: GenerationConfig) -> GenerationConfig:
    """A checkpoint's settings, without those that are about a cache in the same process."""
    for name in CACHING:
        setattr(config, name, None)
    return config


def _set(config: GenerationConfig | None) -> dict[str, Any]:
    values = vars(config) if config is not None else {}
    return {name: value for name, value in values.items() if value is not None and not name.startswith("_")}


def _refuse(name: str, value: Any) -> None:
    changes_nothing = value is None or (value is False and name != "use_cache")
    if name in SETTINGS | INPUTS or changes_nothing:
        return
    neutral = NEUTRAL.get(name)
    if neutral is Any or (neutral is not None and value == neutral):
        return
    raise InputError(f"generate cannot take {name}={_short(value)} over a swarm.", HINTS.get(name, ""))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
