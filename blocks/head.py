"""The two ends of a model, which a client holds: tokenizer, embeddings, final norm and head."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationConfig

from swarm.blocks.embedding import as_embedded
from swarm.blocks.models import Model
from swarm.blocks.precision import Precision, choose_device, choose_precision
from swarm.blocks.shard import load_ends, stored_dtype
from swarm.errors import InputError


class Logits:
    """Hidden states of the last block to logits: final norm and head of a causal language model."""

    def __init__(self, module: Any, dtype: torch.dtype):
        """`module` is what `load_ends` gives, activations are `dtype`."""
        self._module = module
        self._dtype = dtype
        self._weight: Tensor = module.model.norm.weight
        self._run = self._fastest()

    @classmethod
    def load(cls, model: Model, precision: Precision, device: torch.device) -> "Logits":
        """Read final norm and head of `model`, whose files are here.

        Raises:
            InputError: the weights are missing or cannot be used.
        """
        module = load_ends(model, precision, device)
        module.set_input_embeddings(nn.Identity())  # gives their memory back
        return cls(module, precision.dtype)

    @property
    def module(self) -> Any:
        """What holds the weights."""
        return self._module

    @torch.inference_mode()
    def __call__(self, hidden: Tensor) -> Tensor:
        """[tokens, hidden] to float32 [tokens, vocabulary] on CPU."""
        hidden = hidden[None].to(self._weight.device, self._dtype)
        return self._run(hidden)[0].float().cpu()

    @torch.inference_mode()
    def _fastest(self) -> Callable[[Tensor], Tensor]:
        """The plain way where the model does no more, found out by trying: some scale or cap their logits."""
        some = torch.randn(1, 2, len(self._weight), generator=torch.Generator().manual_seed(0))
        some = some.to(self._weight.device, self._dtype)
        return self._plainly if torch.equal(self._plainly(some), self._by_model(some)) else self._by_model

    def _plainly(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._module.get_output_embeddings()(self._module.model.norm(hidden))
        return logits

    def _by_model(self, hidden: Tensor) -> Tensor:
        """As the model's own forward does it, which takes a millisecond more."""
        logits: Tensor = self._module(inputs_embeds=hidden, use_cache=False).logits
        return logits


class Head:
    """Token ids to hidden states, and hidden states to logits. Its methods block: call them off the loop."""

    def __init__(self, module: Any, tokenizer: Any, generation_config: GenerationConfig, dtype: torch.dtype):
        """`module` is what `load_ends` gives, activations are `dtype`."""
        self.module = module
        self.dtype = dtype
        self._embedding = module.get_input_embeddings()
        self._logits = Logits(module, dtype)
        self.tokenizer = tokenizer
        self.generation_config = generation_config

    @classmethod
    def load(cls, model: Model, dtype: str = "auto", device: str = "auto") -> "Head":
        """Read the two ends of `model`; `dtype` is as for a server.

        Raises:
            InputError: the weights or the tokenizer are missing or cannot be used.
        """
        model.ensure_files(None, with_head=True)
        place = choose_device(device)
        precision = choose_precision(dtype, place, stored_dtype(model.checkpoint, None))
        return cls(load_ends(model, precision, place), _tokenizer(model), _generation(model), precision.dtype)

    @torch.inference_mode()
    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [tokens] to hidden states [tokens, hidden]."""
        weight = self._embedding.weight
        return as_embedded(self._embedding, weight[ids.to(weight.device)].to(self.dtype))

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states of the last block [tokens, hidden] to float32 logits [tokens, vocabulary] on CPU."""
        return self._logits(hidden)


def _tokenizer(model: Model) -> Any:
    try:
        return AutoTokenizer.from_pretrained(model.path)
    except (ValueError, OSError, KeyError) as error:
        raise InputError(
            f"The tokenizer of {model.name} cannot be used: {str(error).splitlines()[0]}",
            f"Check tokenizer.json and tokenizer_config.json in {model.path}.",
        ) from error


def _generation(model: Model) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(model.path)
    except OSError:
        return GenerationConfig(eos_token_id=model.config.get("eos_token_id"))
