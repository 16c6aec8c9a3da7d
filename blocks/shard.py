"""Filling modules with their tensors: a span's blocks one after the other, or the two ends of a model.

Only the wanted tensors are read, several at once, with few bytes in flight beside what is already in
place. transformers' own conversions run on each block (some checkpoints store experts one by one).
"""

import logging
from collections.abc import Callable, Iterator
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
from swarm.errors import InputError
from swarm.kernels.linear import lean_linear, make_linears_lean
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

    `on_progress` is told the fraction of blocks in place, from this thread. Memory peaks at the shard plus
    one block's tensors in the checkpoint's dtype and a small read-ahead.

    Raises:
        InputError: a tensor is missing, of the wrong shape or unreadable, or the config cannot be used.
    """
    names = model.checkpoint.block_tensors(span)
    dtype = _placing_dtype(precision, stored_dtype(model.checkpoint, span))
    module = span_model(load_config(str(model.path)), span, dtype)
    for index, tensors in _blocks(model.checkpoint, span, names, dtype):
        wanted = {name for name in module.state_dict() if name.startswith(f"layers.{index}.")}
        _place(module, tensors, device, wanted)
        tensors.clear()
        _make_lean(module.layers[index], precision)
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
    _place(module, dict(checkpoint.read(checkpoint.head_tensors(), threads=READ_THREADS)), device, wanted)
    if checkpoint.is_tied:
        module.get_output_embeddings().weight = module.get_input_embeddings().weight
    if precision.linear_dtype is not None:
        module.set_output_embeddings(lean_linear(module.get_output_embeddings(), precision.linear_dtype))
        _make_lean(module.get_decoder().norm, precision)
    return module.to(device).requires_grad_(False)


def _placing_dtype(precision: Precision, stored: torch.dtype) -> torch.dtype:
    """Float16 linears are made from the checkpoint's own values, not from float32 copies of them."""
    return stored if precision.linear_dtype == torch.float16 else precision.dtype


def _make_lean(module: nn.Module, precision: Precision) -> None:
    if precision.linear_dtype is None:
        return
    make_linears_lean(module, precision.linear_dtype)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(precision.dtype)


def _blocks(
    checkpoint: Checkpoint, span: Span, names: dict[int, list[str]], dtype: torch.dtype
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """The tensors of each block of the span in turn, by their names in the span's model, read ahead."""
    ordered = [name for block in span.blocks for name in names[block]]
    shard_bytes = sum(checkpoint.entry(name).nbytes for name in ordered)
    budget = min(MAX_IN_FLIGHT, max(1, int(shard_bytes * IN_FLIGHT_FRACTION)))
    stream = checkpoint.read(ordered, threads=READ_THREADS, memory_budget=budget)
    for block in span.blocks:
        index, inside = block - span.start, f"{checkpoint.block_prefix}{block}."
        tensors = {}
        for _ in names[block]:
            name, tensor = next(stream)
            tensors[f"layers.{index}.{name.removeprefix(inside)}"] = tensor.to(dtype)
            del tensor
        yield index, tensors


def _place(module: Any, tensors: dict[str, Tensor], device: torch.device, wanted: set[str]) -> None:
    """Give the parameters `wanted` of `module` their values, converted as transformers would."""
    mapping: Any = get_model_conversion_mapping(module)
    plan = LoadStateDictConfig(
        device_map={"": str(device)}, dtype=next(module.parameters()).dtype, weight_mapping=mapping
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
    """The dtype of the largest tensor of `span`, or of the two ends: norms may be wider than the weights."""
    names = checkpoint.head_tensors() if span is None else checkpoint.block_tensors(span)[span.start]
    largest = max((checkpoint.entry(name) for name in names), key=lambda entry: entry.nbytes)
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get(largest.dtype, torch.float32)


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
