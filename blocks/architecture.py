"""A model's own code, from transformers, cut to what one peer needs: a span of blocks, or the two ends.

The whole model is laid out on the meta device, which costs no memory, and everything that is not
wanted is dropped. Decoder layers stay as transformers wrote them; attention goes through our function.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig

from swarm.errors import InputError
from swarm.kernels.attention import attend
from swarm.spans import Span

ATTENTION = "swarm"
"""Name of our attention function. transformers builds no masks for a name it does not know."""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """transformers' interface: one sequence, [1, heads, tokens, dim] in, [1, tokens, heads, dim] out."""
    out = attend(
        query[0], key[0], value[0], scale=scaling, window=sliding_window, softcap=softcap, sinks=s_aux
    )
    return out.transpose(0, 1)[None], None


AttentionInterface.register(ATTENTION, _attention)


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

    Its `forward(inputs_embeds=[1, tokens, hidden], past_key_values=SessionKV)` runs them; embedding and
    final norm pass hidden states through. Rotary embeddings are real: they are not in checkpoints.
    """
    with torch.device("meta"):
        model = AutoModel.from_config(config, dtype=dtype)
    model.layers = nn.ModuleList(list(model.layers)[span.start : span.end])
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
    """The causal language model on the meta device without any block: embedding, final norm and head."""
    bare = _cut(config, Span(0, 0))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(bare, dtype=dtype)
    _make_rotary(model.get_decoder(), config)
    embedding = model.get_input_embeddings()
    scale = getattr(embedding, "scalar_embed_scale", None)
    if scale is not None:
        embedding.embed_scale = torch.tensor(scale)
    return model.eval()


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
