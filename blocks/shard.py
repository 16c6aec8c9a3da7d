"""Filling modules with their tensors: a span's blocks one after the other, or the two ends of a model.

Only the wanted tensors are read, several at once, with few bytes in flight beside what is already in
place. transformers' own conversions run on each block (some checkpoints store experts one by one).
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from swarm.blocks.architecture import ends_model, load_config, span_model
from swarm.blocks.checkpoint import Checkpoint
from swarm.blocks.heap import give_back_freed_memory
from swarm.blocks.models import Model
from swarm.blocks.precision import Precision
from swarm.blocks.stored_formats import make_plain, stored_format
from swarm.errors import InputError
from swarm.kernels.linear import lean_linear, make_linears_lean
from swarm.kernels.quantised import quantise
from swarm.spans import Span

logger = logging.getLogger(__name__)

READ_THREADS = 4
IN_FLIGHT_FRACTION = 0.05
MAX_IN_FLIGHT = 512 * 2**20


def load_span(
    model: Model,
    span: Span,
    precision: Precision,
    device: torch.device,
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> Any:
    """The blocks of `span` with their weights on `device`, ready for `forward(inputs_embeds=…)`.

    `on_progress` is told the fraction of blocks in place, from this thread. While a block is placed, the
    next is read. Memory peaks at the shard plus one block's tensors in the checkpoint's dtype, and in the
    precision's if they are quantised then, and the read-ahead.

    Raises:
        InputError: a tensor is missing, of the wrong shape or unreadable, or the config cannot be used.
    """
    dtype = _placing_dtype(precision, stored_dtype(model.checkpoint, span))
    config = load_config(str(model.path))
    if precision.quantization != "none":
        config._experts_implementation = "eager"  # the one that takes experts one by one
    module = span_model(config, span, dtype)
    for index, tensors in _blocks(model, span, dtype, _kept_wide(module)):
        wanted = {name for name in module.state_dict() if name.startswith(f"layers.{index}.")}
        _place(module, tensors, device, wanted)
        tensors.clear()
        _make_small(module.layers[index], precision)
        give_back_freed_memory()
        on_progress((index + 1) / span.size)
    return module.to(device).requires_grad_(False)


def load_ends(model: Model, precision: Precision, device: torch.device) -> Any:
    """The causal language model without blocks: embeddings, final norm and head, on `device`.

    Raises:
        InputError: as `load_span`.
    """
    checkpoint = model.checkpoint
    dtype = _placing_dtype(precision, stored_dtype(checkpoint, None))
    module = ends_model(load_config(str(model.path)), dtype)
    wanted = set(module.state_dict()) - ({"lm_head.weight"} if checkpoint.is_tied else set())
    names = checkpoint.head_tensors()
    tensors = {_end_name(name): tensor for name, tensor in checkpoint.read(names, threads=READ_THREADS)}
    _place(module, make_plain(tensors, stored_format(model.config), model.config, dtype), device, wanted)
    if checkpoint.is_tied:
        module.get_output_embeddings().weight = module.get_input_embeddings().weight
    if precision.linear_dtype is not None:
        module.set_output_embeddings(lean_linear(module.get_output_embeddings(), precision.linear_dtype))
        _make_small(module.model.norm, precision)
    return module.to(device).requires_grad_(False)


def _end_name(name: str) -> str:
    """The name that a tensor of the ends has in the causal language model, whatever that is a part of."""
    *_, module, kind = name.split(".")
    return f"{'' if module == 'lm_head' else 'model.'}{module}.{kind}"


def _placing_dtype(precision: Precision, stored: torch.dtype) -> torch.dtype:
    """Float16 linears are made from the checkpoint's own values, not from float32 copies of them."""
    return stored if precision.linear_dtype == torch.float16 else precision.dtype


def _make_small(module: nn.Module, precision: Precision) -> None:
    """Have the loaded `module` keep its weights as the precision wants them."""
    if precision.quantization != "none":
        quantise(module, precision.quantization)
    elif precision.linear_dtype is not None:
        make_linears_lean(module, precision.linear_dtype)
        for parameter in module.parameters():
            parameter.data = parameter.data.to(precision.dtype)


def read_ahead_bytes(stored: Sequence[int]) -> int:
    """Bytes that may be read ahead where the blocks of a span take `stored` bytes each in the checkpoint.

    A whole block, so that the next is read while one is placed, or more where that is little of the shard.
    """
    return min(MAX_IN_FLIGHT, max(1, *stored, int(sum(stored) * IN_FLIGHT_FRACTION)))


def _blocks(
    model: Model, span: Span, dtype: torch.dtype, kept_wide: frozenset[str]
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """The tensors of each block of the span in turn, by their names in the span's model, read ahead.

    They come as `dtype`, but for those of the checkpoint whose names contain one of `kept_wide`.
    """
    checkpoint, stored = model.checkpoint, stored_format(model.config)
    names = checkpoint.block_tensors(span)
    sizes = [sum(checkpoint.entry(name).nbytes for name in names[block]) for block in span.blocks]
    ordered = [name for block in span.blocks for name in names[block]]
    stream = checkpoint.read(ordered, threads=READ_THREADS, memory_budget=read_ahead_bytes(sizes))
    for block in span.blocks:
        index, inside = block - span.start, f"{checkpoint.block_prefix}{block}."
        tensors = {}
        for _ in names[block]:
            name, tensor = next(stream)
            is_final = stored is None and not any(part in name for part in kept_wide)
            tensors[f"layers.{index}.{name.removeprefix(inside)}"] = tensor.to(dtype) if is_final else tensor
            del tensor
        yield index, make_plain(tensors, stored, model.config, dtype)


def _kept_wide(module: Any) -> frozenset[str]:
    """Parts of the names of tensors that stay float32 in whatever dtype the model is."""
    return frozenset(module._keep_in_fp32_modules_strict or ())


def _place(module: Any, tensors: dict[str, Tensor], device: torch.device, wanted: set[str]) -> None:
    """Give the parameters `wanted` of `module` their values, converted as transformers would."""
    mapping: Any = get_model_conversion_mapping(module)
    plan = LoadStateDictConfig(
        device_map={"": str(device)},
        dtype=next(module.parameters()).dtype,
        dtype_plan=dict.fromkeys(_kept_wide(module), torch.float32),
        weight_mapping=mapping,
    )
    with _no_progress_bars():
        loaded, _ = convert_and_load_state_dict_in_model(module, tensors, plan)
    for name, found, expected in sorted(loaded.mismatched_keys):
        raise InputError(
            f"The tensor '{name}' has shape {list(found)}, but the model's config asks for {list(expected)}.",
            "The config.json and the weights are not of the same model: get both again.",
        )
    for reason in loaded.conversion_errors.values():
        raise InputError(
            f"Some tensors of the checkpoint cannot be put together: {reason.strip().splitlines()[-1]}",
            "The config.json and the weights are not of the same model: get both again.",
        )
    missing = sorted(wanted & loaded.missing_keys)
    if missing:
        raise InputError(
            f"The checkpoint lacks {len(missing)} tensors that the model needs, the first is '{missing[0]}'.",
            "The config.json and the weights are not of the same model: get both again.",
        )
    if loaded.unexpected_keys:
        logger.warning("the model does not use %s", ", ".join(sorted(loaded.unexpected_keys)))


def stored_dtype(checkpoint: Checkpoint, span: Span | None) -> torch.dtype:
    """The dtype of the largest tensor of `span`, or of the two ends: norms may be wider than the weights.

    Quantised tensors stand for bfloat16.
    """
    names = checkpoint.head_tensors() if span is None else checkpoint.block_tensors(span)[span.start]
    largest = max((checkpoint.entry(name) for name in names), key=lambda entry: entry.nbytes)
    if largest.dtype in ("F32", "F64"):
        return torch.float32
    return torch.float16 if largest.dtype == "F16" else torch.bfloat16


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """transformers draws a bar for each call; progress is reported by the caller here."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()
