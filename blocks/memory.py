"""What a shard will take of a machine's memory, worked out before anything of it is loaded.

Weights, the work space beside them and the KV of the sessions share what the process may take. The
machine and the checkpoint are asked in `plan_memory`; all else is numbers in, plan out. Knows nothing of
how the memory is used in the end.
"""

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import chain
from math import prod
from typing import Any

import psutil
import torch
from torch import nn

from swarm.blocks.architecture import span_model
from swarm.blocks.errors import DoesNotFit
from swarm.blocks.families import KVShape, kv_shapes
from swarm.blocks.models import Model
from swarm.blocks.precision import Precision
from swarm.blocks.recurrent import state_bytes
from swarm.blocks.shard import read_ahead_bytes
from swarm.kernels.linear import PANEL, has_native
from swarm.kernels.pages import VALUE_LANES
from swarm.kernels.quantised import is_stack, quantised_bytes
from swarm.page_keys import PAGE_TOKENS
from swarm.spans import Span

FREE_KV_FRACTION = 0.25
MAX_FREE_KV_TOKENS = 2**18
"""How much of what is free becomes KV, and how many tokens at most, where no limit says what may be taken."""

SOUND_KV_TOKENS = 8192
"""Tokens that a server should have KV for, which serves as many blocks as fit: some sessions' worth."""

MARGIN_BYTES = 96 * 2**20
"""Attention scores, bytes on their way from and to peers, and what the heaps hold unused."""

STATEFUL_SESSIONS = 8
"""Sessions whose states there is work space for, where blocks keep states instead of KV."""

HIDDEN_COPIES, MLP_COPIES, QUERY_COPIES, KV_COPIES = 6, 4, 3, 2
"""How many of each kind of values of a row are alive at once, at most."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of the weights, of the work space beside them, and of one token's KV on all blocks of the span.

    The sessions together may hold `kv_tokens`, whose memory is that of whole pages.
    """

    weight_bytes: int
    work_bytes: int
    kv_token_bytes: int
    kv_tokens: int

    @property
    def kv_bytes(self) -> int:
        return -(-self.kv_tokens // PAGE_TOKENS) * PAGE_TOKENS * self.kv_token_bytes

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.work_bytes + self.kv_bytes


@dataclass(frozen=True, slots=True)
class BlockBytes:
    """Bytes of one block: in the checkpoint, held while it is placed, in place, and as KV of one token."""

    stored: int
    staged: int
    placed: int
    kv_token: int


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes that may be taken beside what is taken already; `bound` tells people what ends them.

    Of what weights and work space leave, `kv_fraction` may become KV, but no more than `max_kv_tokens`.
    Neither holds for a number of tokens that was asked for.
    """

    free: int
    bound: str
    kv_fraction: float = 1.0
    max_kv_tokens: int | None = None


def plan_memory(
    model: Model,
    span: Span,
    precision: Precision,
    config: Any,
    *,
    kv_tokens: int | None,
    memory_limit: int | None,
    max_vram: int | None,
    device: torch.device,
    max_rows: int,
    head_bytes: int = 0,
) -> MemoryPlan:
    """What `span`, whose weights files are here, will take on `device`, before anything is loaded.

    Args:
        config: transformers' own of the text model.
        kv_tokens: what all sessions together shall hold; None for what there is room for.
        memory_limit: bytes of main memory for the whole process, all that it holds now included.
        max_vram: bytes of the GPU's memory for the whole process.
        max_rows: tokens in a batch, at most.
        head_bytes: what the model's head takes beside the blocks; it counts as work space.

    Raises:
        DoesNotFit: the span does not fit, or not with `kv_tokens`; the message has the numbers.
    """
    blocks, compute = _needs(model, span, precision, config, max_rows, head_bytes)
    title = f"Blocks {span} of {model.name}"
    if device.type != "cuda":
        return plan(blocks, compute, _main_room(memory_limit), kv_tokens, title, precision.name)
    gpu_room = _gpu_room(max_vram, device)
    passing = [replace(block, placed=0, kv_token=0) for block in blocks]
    plan(passing, 0, _main_room(memory_limit), 0, title, precision.name)
    return plan(blocks, compute, gpu_room, kv_tokens, title, precision.name)


def most_blocks(
    model: Model,
    precision: Precision,
    config: Any,
    *,
    kv_tokens: int | None,
    memory_limit: int | None,
    max_vram: int | None,
    device: torch.device,
    max_rows: int,
    head_bytes: int,
) -> int:
    """How many successive blocks fit, whichever they are, with the KV of `kv_tokens`, or of a sound number.

    No weights file need be here. The arguments are those of `plan_memory`.

    Raises:
        DoesNotFit: not even one of them does.
    """
    whole = Span(0, model.num_blocks)
    blocks, compute = _needs(model, whole, precision, config, max_rows, head_bytes, are_files_here=False)
    largest = BlockBytes(*map(max, zip(*map(astuple, blocks), strict=True)))
    passing = replace(largest, placed=0, kv_token=0)
    is_on_gpu = device.type == "cuda"
    main = _main_room(memory_limit)
    room = _gpu_room(max_vram, device) if is_on_gpu else main
    for count in range(model.num_blocks, 0, -1):
        fitting = _fit([largest] * count, compute, room, kv_tokens)
        passes = not is_on_gpu or _fit([passing] * count, 0, main, 0) is not None
        if fitting is not None and passes and fitting.kv_tokens >= (kv_tokens or SOUND_KV_TOKENS):
            return count
    plan([largest], compute, room, kv_tokens, f"One block of {model.name}", precision.name)
    return 1


def plan(
    blocks: Sequence[BlockBytes], compute: int, room: Room, kv_tokens: int | None, title: str, dtype: str
) -> MemoryPlan:
    """How `blocks` share `room` with the KV of `kv_tokens` tokens, or of as many as it then has room for.

    `compute` is the work space of a batch in bytes; `title` and `dtype` say what this is, for people.

    Raises:
        DoesNotFit: they do not fit. The hint tells how many of the first blocks would.
    """
    if fitting := _fit(blocks, compute, room, kv_tokens):
        return fitting
    count = next((n for n in range(len(blocks) - 1, 0, -1) if _fit(blocks[:n], compute, room, kv_tokens)), 0)
    raise DoesNotFit(
        f"{title} take {_parts(blocks, compute, kv_tokens, dtype)}: that does not fit {room.bound}.",
        _hint(blocks, compute, room, kv_tokens, count),
    )


def loading_bytes(blocks: Sequence[BlockBytes]) -> int:
    """What loading holds beside the shard: one block that is being placed, and what is read ahead."""
    return max(block.staged for block in blocks) + read_ahead_bytes([block.stored for block in blocks])


def compute_bytes(config: Any, shapes: Iterable[KVShape | None], rows: int, itemsize: int) -> int:
    """The work space of a batch of `rows` tokens, whose values take `itemsize` bytes, without a margin."""
    mlp = max(getattr(config, name, None) or 0 for name in ("intermediate_size", "intermediate_size_mlp"))
    chosen = getattr(config, "num_experts_per_tok", None) or 1
    expert = getattr(config, "moe_intermediate_size", None) or mlp
    values = MLP_COPIES * max(mlp, chosen * expert)
    if kept := [shape for shape in shapes if shape is not None]:
        values += QUERY_COPIES * max(config.num_attention_heads * shape.key_dim for shape in kept)
        values += KV_COPIES * max(shape.heads * (shape.key_dim + shape.value_dim) for shape in kept)
    hidden = HIDDEN_COPIES * config.hidden_size * torch.float32.itemsize  # norms are computed in float32
    return rows * (hidden + values * itemsize)


def placed_bytes(layer: nn.Module, precision: Precision) -> int:
    """What a decoder layer, which may be on the meta device, takes once it holds its weights."""
    total = 0
    for module in layer.modules():
        for name, tensor in chain(
            module.named_parameters(recurse=False), module.named_buffers(recurse=False)
        ):
            if type(module) is nn.Linear and name == "weight":
                total += _linear_bytes(tensor, precision)
            elif precision.quantization != "none" and is_stack(tensor):
                total += quantised_bytes(tensor.shape, precision.quantization)
            else:
                total += tensor.numel() * precision.dtype.itemsize
    return total


def _linear_bytes(weight: torch.Tensor, precision: Precision) -> int:
    if precision.quantization != "none":
        return quantised_bytes(weight.shape, precision.quantization)
    if precision.linear_dtype is None:
        return weight.numel() * precision.dtype.itemsize
    rows, columns = weight.shape
    panels = -(-rows // PANEL) * PANEL if has_native() else rows
    return panels * columns * precision.linear_dtype.itemsize


def _fit(blocks: Sequence[BlockBytes], compute: int, room: Room, kv_tokens: int | None) -> MemoryPlan | None:
    weights, work = _weights_and_work(blocks, compute)
    token_bytes = sum(block.kv_token for block in blocks)
    left = room.free - weights - work
    tokens = _tokens_in(left, token_bytes, room) if kv_tokens is None else kv_tokens
    fitting = MemoryPlan(weights, work, token_bytes, tokens)
    is_empty = kv_tokens is None and tokens < PAGE_TOKENS
    return None if is_empty or fitting.total_bytes > room.free else fitting


def _weights_and_work(blocks: Sequence[BlockBytes], compute: int) -> tuple[int, int]:
    """Work space serves loading first and batches then."""
    return sum(block.placed for block in blocks), max(compute, loading_bytes(blocks)) + MARGIN_BYTES


def _tokens_in(left: int, token_bytes: int, room: Room) -> int:
    """The KV tokens, in whole pages, that `left` bytes beside weights and work space make."""
    tokens = int(max(0, left) * room.kv_fraction) // token_bytes if token_bytes else MAX_FREE_KV_TOKENS
    if room.max_kv_tokens is not None:
        tokens = min(tokens, room.max_kv_tokens)
    return tokens // PAGE_TOKENS * PAGE_TOKENS


def _parts(blocks: Sequence[BlockBytes], compute: int, kv_tokens: int | None, dtype: str) -> str:
    weights, work = _weights_and_work(blocks, compute)
    parts = [f"{size(weights)} as {dtype}"] if weights else []
    parts.append(f"{size(work)} work space")
    kv = MemoryPlan(0, 0, sum(block.kv_token for block in blocks), kv_tokens or PAGE_TOKENS).kv_bytes
    if kv:
        parts.append(f"{size(kv)} for {kv_tokens or PAGE_TOKENS} tokens")
    return ", and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def _hint(blocks: Sequence[BlockBytes], compute: int, room: Room, kv_tokens: int | None, count: int) -> str:
    without_limit = replace(room, kv_fraction=1.0, max_kv_tokens=None)
    fewer = _fit(blocks, compute, without_limit, None) if kv_tokens else None
    if fewer:
        return f"Give --kv-tokens {fewer.kv_tokens} or less, or fewer blocks."
    if count:
        return f"The first {count} of them fit: serve fewer blocks, or allow more memory."
    return "Not one of its blocks fits: allow more memory, or choose a --dtype that takes less."


def size(count: int) -> str:
    """Bytes as people read them: `3.1 GiB`, `600 MiB`, `5 KiB`."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}" if count < 10 * unit else f"{count / unit:.0f} {name}"
    return f"{count / 2**10:.0f} KiB"


def _needs(
    model: Model,
    span: Span,
    precision: Precision,
    config: Any,
    max_rows: int,
    head_bytes: int,
    *,
    are_files_here: bool = True,
) -> tuple[list[BlockBytes], int]:
    """What each block takes, and the work space of a batch."""
    module = span_model(config, span, precision.dtype)
    shapes = kv_shapes(config, span)
    compute = compute_bytes(config, shapes, max_rows, precision.dtype.itemsize)
    compute += _unpacked_bytes(module, precision) + head_bytes
    if None in shapes:
        compute += STATEFUL_SESSIONS * state_bytes(config, span, precision.dtype.itemsize)
    names = model.checkpoint.block_tensors(span) if are_files_here else {}
    found = []
    for block, layer, shape in zip(span.blocks, module.layers, shapes, strict=True):
        whole = sum(weight.numel() for weight in layer.parameters()) * precision.dtype.itemsize
        stored = sum(model.checkpoint.entry(name).nbytes for name in names[block]) if names else whole
        staged = stored + (whole if precision.quantization != "none" else 0)
        kv_token = 0 if shape is None else _kv_values(shape) * precision.dtype.itemsize
        found.append(BlockBytes(stored, staged, placed_bytes(layer, precision), kv_token))
    return found, compute


def _kv_values(shape: KVShape) -> int:
    return shape.heads * (shape.key_dim + -(-shape.value_dim // VALUE_LANES) * VALUE_LANES)


def _unpacked_bytes(module: Any, precision: Precision) -> int:
    """Quantised weights are turned back one matrix at a time."""
    if precision.quantization == "none":
        return 0
    matrices = (prod(weight.shape[-2:]) for weight in module.layers.parameters())
    return max(matrices, default=0) * torch.float32.itemsize


def _main_room(limit: int | None) -> Room:
    free = _available()
    by_machine = f"the {size(free)} of memory that are free"
    if limit is None:
        return Room(free, by_machine, FREE_KV_FRACTION, MAX_FREE_KV_TOKENS)
    taken = _taken()
    if free < limit - taken:
        return Room(free, by_machine)
    return Room(limit - taken, f"--memory-limit {size(limit)}, of which {size(taken)} are taken already")


def _available() -> int:
    return int(psutil.virtual_memory().available)


def _taken() -> int:
    return int(psutil.Process().memory_info().rss)


def _gpu_room(limit: int | None, device: torch.device) -> Room:
    free = torch.cuda.mem_get_info(device)[0]
    by_machine = f"the {size(free)} that are free on the GPU"
    if limit is None:
        return Room(free, by_machine, FREE_KV_FRACTION, MAX_FREE_KV_TOKENS)
    taken = torch.cuda.memory_reserved(device)
    if free < limit - taken:
        return Room(free, by_machine)
    return Room(limit - taken, f"--max-vram-mb {limit // 2**20}")
