"""Loading what an engine runs: the span's forward pass, its pages, and what the wire must know of it.

Everything is decided here once, from what was asked for and what the machine and the checkpoint have.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from swarm.blocks.architecture import load_config
from swarm.blocks.batch import MAX_ROWS
from swarm.blocks.embedding import Embedding
from swarm.blocks.families import kv_shapes
from swarm.blocks.forward import Forward, forward_of
from swarm.blocks.head import Logits
from swarm.blocks.kv import pages_of
from swarm.blocks.memory import most_blocks, plan_memory
from swarm.blocks.models import Model
from swarm.blocks.precision import Precision, choose_device, choose_precision
from swarm.blocks.shard import load_span, stored_dtype
from swarm.errors import InputError, SwarmError
from swarm.spans import Span


@dataclass(frozen=True)
class EngineConfig:
    """What an engine may take and do.

    `kv_tokens`: what all sessions together may hold; `memory_limit` and `max_vram`: bytes, of the whole
    process; `threads`: of the CPU. None leaves the choice to the machine. `overcommit` is how much more than
    there is sessions may be promised together.
    """

    dtype: str = "auto"
    device: str = "auto"
    quantize: str = "none"
    kv_tokens: int | None = None
    memory_limit: int | None = None
    max_vram: int | None = None
    overcommit: float = 1.0
    prefix_cache: bool = True
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("kv-tokens", self.kv_tokens), ("threads", self.threads)):
            if value is not None and value < 1:
                raise InputError(f"--{name} {value} is not possible.", "Give a whole number from 1 on.")
        if self.overcommit < 1:
            raise InputError(
                f"--kv-overcommit {self.overcommit:g} is not possible.", "Give a number from 1 on."
            )


@dataclass(frozen=True)
class LoadedSpan:
    """A span that is ready to run, with so many KV `pages`.

    `embedding` is there where the span begins the model, `logits` where it ends it. `keeps_pages` is false
    where blocks keep a state of the whole sequence instead, which nobody can share. `shard_bytes` are those
    of the weights.
    """

    forward: Forward
    span: Span
    precision: Precision
    hidden_size: int
    pages: int
    shard_bytes: int
    embedding: Embedding | None = None
    logits: Logits | None = None
    keeps_pages: bool = True
    is_on_cpu: bool = True


def load(model: Model, span: Span, config: EngineConfig, on_progress: Callable[[float], None]) -> LoadedSpan:
    """Read the weights of `span`; tells the fraction that is in place.

    Raises:
        InputError: the checkpoint, the span, the dtype, the device or a limit cannot be used.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    stored = stored_dtype(model.checkpoint, span)
    precision = choose_precision(config.dtype, device, stored, config.quantize)
    architecture, is_last = load_config(str(model.path)), span.end == model.num_blocks
    plan = plan_memory(
        model,
        span,
        precision,
        architecture,
        kv_tokens=config.kv_tokens,
        memory_limit=config.memory_limit,
        max_vram=config.max_vram,
        device=device,
        max_rows=MAX_ROWS,
        head_bytes=is_last * _head_bytes(architecture, precision),
    )
    module = load_span(model, span, precision, device, on_progress)
    logits = Logits.load(model, precision, device) if is_last else None
    shapes, pages = kv_shapes(architecture, span), pages_of(plan.kv_tokens)
    return LoadedSpan(
        forward=forward_of(module, shapes, pages, precision.dtype, device),
        span=span,
        precision=precision,
        hidden_size=module.config.hidden_size,
        pages=pages,
        shard_bytes=_bytes_of(module) + (_bytes_of(logits.module) if logits else 0),
        embedding=Embedding.open(model, precision.dtype) if span.start == 0 else None,
        logits=logits,
        keeps_pages=None not in shapes,
        is_on_cpu=device.type == "cpu",
    )


def blocks_that_fit(model: Model, config: EngineConfig) -> int:
    """How many successive blocks of the model fit here, whichever they are. Its weights files may be missing.

    Raises:
        InputError: the config, the dtype, the device or a limit cannot be used, or not one block fits.
    """
    device, architecture = choose_device(config.device), load_config(str(model.path))
    precision = choose_precision(config.dtype, device, _dtype_at_hand(model, architecture), config.quantize)
    return most_blocks(
        model,
        precision,
        architecture,
        kv_tokens=config.kv_tokens,
        memory_limit=config.memory_limit,
        max_vram=config.max_vram,
        device=device,
        max_rows=MAX_ROWS,
        head_bytes=_head_bytes(architecture, precision),
    )


def _dtype_at_hand(model: Model, architecture: Any) -> torch.dtype:
    """That of the model's weights, as its config has it where its files are not here yet."""
    try:
        return stored_dtype(model.checkpoint, Span(0, 1))
    except SwarmError:
        named = architecture.dtype
        return named if isinstance(named, torch.dtype) else torch.bfloat16


def _head_bytes(architecture: Any, precision: Precision) -> int:
    itemsize = (precision.linear_dtype or precision.dtype).itemsize
    return int(architecture.vocab_size * architecture.hidden_size * itemsize)


def _bytes_of(module: Any) -> int:
    """Memory of a module's weights; those that share it are counted once."""
    tensors: Iterable[torch.Tensor] = (*module.parameters(), *module.buffers())
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
