"""A model's own code, from transformers, cut to what one peer needs: a span of blocks, or the two ends.

The whole model is laid out on the meta device, which costs no memory, and everything that is not
wanted is dropped. Decoder layers stay as transformers wrote them; attention goes through our function.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig

from swarm.blocks.adapted import adapt
from swarm.blocks.families import FAMILIES
from swarm.blocks.flat import ATTENTION
from swarm.errors import InputError
from swarm.spans import Span


def load_config(path: str) -> PreTrainedConfig:
    """The text model's config, with our attention chosen.

    Raises:
        InputError: transformers cannot read it.
    """
    try:
        loaded = AutoConfig.from_pretrained(path).get_text_config()
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(
            f"The config of this model cannot be used: {error}", f"Check config.json in {path}."
        ) from error
    loaded._attn_implementation = ATTENTION
    loaded.use_cache = True
    return loaded


def span_model(config: PreTrainedConfig, span: Span, dtype: torch.dtype) -> Any:
    """A base model on the meta device that holds only the blocks of `span`, numbered from 0.

    Its `forward(inputs_embeds=[1, tokens, hidden], past_key_values=FlatBatch)` runs them; embedding and
    final norm pass hidden states through. Rotary embeddings are real: they are not in checkpoints.
    """
    plain, _ = _without_embedding_factor(config)
    with torch.device("meta"):
        model = AutoModel.from_config(plain, dtype=dtype)
        model.layers = nn.ModuleList(list(model.layers)[span.start : span.end])
        with _default_dtype(dtype):
            for block, layer in zip(span.blocks, model.layers, strict=True):
                adapt(layer, model.config, block)
    for module in model.layers.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            module.layer_idx -= span.start
    model.config = _cut(model.config, span)
    model.embed_tokens = nn.Identity()
    model.norm = nn.Identity()
    _make_rotary(model, config)
    return model.eval()


def part_of(model: Any, span: Span) -> Any:
    """A span's model that runs only its blocks `span`, counted from the model's first; shares all tensors."""
    part = copy.copy(model)
    part._modules = {**model._modules, "layers": nn.ModuleList(list(model.layers)[span.start : span.end])}
    part.config = _cut(model.config, span)
    return part


def ends_model(config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """The causal language model on the meta device without any block: embedding, final norm and head.

    Its input embeddings give what the first block takes; its `forward` takes hidden states of the last.
    """
    plain, factor = _without_embedding_factor(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_cut(plain, Span(0, 0)), dtype=dtype)
    _make_rotary(model.model, config)
    embedding = model.get_input_embeddings()
    if factor != 1.0:
        model.set_input_embeddings(ScaledEmbedding(embedding.weight, factor))
    scale = getattr(embedding, "scalar_embed_scale", None)
    if scale is not None:
        embedding.embed_scale = torch.tensor(scale)
    return model.eval()


class ScaledEmbedding(nn.Embedding):
    """Embeddings multiplied by `factor`, for models that do so where their blocks begin."""

    def __init__(self, weight: nn.Parameter, factor: float):
        super().__init__(weight.shape[0], weight.shape[1], _weight=weight)
        self.factor = factor

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.factor


def _without_embedding_factor(config: PreTrainedConfig) -> tuple[PreTrainedConfig, float]:
    """The config of a model that takes its inputs as they are, and what it would multiply them by."""
    family = FAMILIES.get(config.model_type)
    if family is None or family.embedding_factor is None:
        return config, 1.0
    plain = copy.deepcopy(config)
    setattr(plain, family.embedding_factor, 1.0)
    return plain, float(getattr(config, family.embedding_factor))


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Modules are made in `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _cut(config: PreTrainedConfig, span: Span) -> PreTrainedConfig:
    """The config of a model that has only the blocks of `span`."""
    cut = copy.deepcopy(config)
    layer_types = getattr(config, "layer_types", None)
    cut.num_hidden_layers = span.size
    if layer_types is not None:
        cut.layer_types = layer_types[span.start : span.end]
    return cut


def _make_rotary(model: Any, config: PreTrainedConfig) -> None:
    for name, module in list(model.named_children()):
        if name.startswith("rotary_emb"):
            setattr(model, name, type(module)(config=config))
