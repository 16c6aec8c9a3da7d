"""A span's forward pass on a flat batch of rows, by the fastest way that its layers and the device allow.

Owns the span's module and what it keeps of tokens: the tensors of the pages, or the states of sessions
whose blocks fold the whole sequence into one. Runs in one thread; knows nothing of sessions' lives.
"""

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor

from swarm.blocks.architecture import part_of
from swarm.blocks.families import KVShape
from swarm.blocks.flat import FlatBatch
from swarm.blocks.fused import fuse
from swarm.blocks.kv import PageCopy
from swarm.blocks.recurrent import RecurrentSession
from swarm.kernels.pages import Pages, Segment, Segments
from swarm.spans import Span

MAX_PARTS = 64
"""Sub-spans whose models are kept; they share the tensors of the whole."""


ROPE_BY_BATCH = ("dynamic", "longrope")
"""Rotary embeddings that transformers turns by the longest sequence of a batch: each session runs alone."""


class Forward(Protocol):
    """Runs rows of sessions through blocks, counted from the span's first.

    `pages` are those of each block, none where blocks keep states instead.
    """

    pages: Sequence[Pages]

    def new_state(self, blocks: Span, capacity: int) -> RecurrentSession | None:
        """What a session of at most `capacity` tokens keeps beside its pages."""
        ...

    def run(self, hidden: Tensor, blocks: Span, parts: Sequence[Segment]) -> Tensor:
        """Hidden states [rows, hidden] of `parts`, one behind the other, through `blocks`."""
        ...

    def copy(self, copies: Sequence[PageCopy]) -> None:
        """Give pages what others hold."""
        ...


class PagedForward:
    """Runs `module`, what `load_span` gives, on rows of many sessions at once.

    Its blocks keep `pages` pages of `shapes` each.
    """

    def __init__(
        self, module: Any, shapes: Sequence[KVShape], pages: int, dtype: torch.dtype, device: torch.device
    ):
        self._device = device
        self._dtype = dtype
        self._turns_by_batch = _rope_type(module.config) in ROPE_BY_BATCH
        self._part = lru_cache(MAX_PARTS)(partial(part_of, module))
        fused = fuse(module, self._run_plainly)
        self.is_fused = fused is not None
        self._run = self._run_plainly if fused is None else fused.run
        self.pages: Sequence[Pages] = [
            Pages.empty(pages, shape.heads, shape.key_dim, shape.value_dim, dtype, device) for shape in shapes
        ]

    def new_state(self, blocks: Span, capacity: int) -> None:
        return None

    @torch.inference_mode()
    def run(self, hidden: Tensor, blocks: Span, parts: Sequence[Segment]) -> Tensor:
        if not self._turns_by_batch:
            return self._run(hidden, blocks, self.pages, Segments.of(parts, self._device))
        rows = hidden.split([part.rows for part in parts])
        each = zip(rows, parts, strict=True)
        return torch.cat(
            [self._run(own, blocks, self.pages, Segments.of([part], self._device)) for own, part in each]
        )

    @torch.inference_mode()
    def copy(self, copies: Sequence[PageCopy]) -> None:
        for one in copies:
            for pages in self.pages:
                pages.copy(one.source, one.target)

    def _run_plainly(
        self, hidden: Tensor, blocks: Span, pages: Sequence[Pages], segments: Segments
    ) -> Tensor:
        """By transformers' layers."""
        batch = FlatBatch(pages[: blocks.end], segments)
        with batch.running():
            out = self._part(blocks)(
                inputs_embeds=hidden[None].to(self._device, self._dtype),
                position_ids=segments.positions[None],
                past_key_values=batch,
                use_cache=True,
            )
        return out.last_hidden_state[0]


class RecurrentForward:
    """Runs `module` on one session after the other, each with a state of its own instead of pages."""

    def __init__(self, module: Any, dtype: torch.dtype, device: torch.device):
        self._device = device
        self._dtype = dtype
        self._config = module.config
        self.pages: Sequence[Pages] = ()
        self._part = lru_cache(MAX_PARTS)(partial(part_of, module))

    def new_state(self, blocks: Span, capacity: int) -> RecurrentSession:
        return RecurrentSession(self._config, blocks, capacity)

    @torch.inference_mode()
    def run(self, hidden: Tensor, blocks: Span, parts: Sequence[Segment]) -> Tensor:
        """
        Raises:
            StepError: a session cannot go back to where its rows begin.
        """
        rows = hidden.split([part.rows for part in parts])
        return torch.cat([self._run_one(one, blocks, part) for one, part in zip(rows, parts, strict=True)])

    def copy(self, copies: Sequence[PageCopy]) -> None: ...

    def _run_one(self, hidden: Tensor, blocks: Span, part: Segment) -> Tensor:
        state: RecurrentSession = part.state
        state.roll_back(part.first)
        out = self._part(blocks)(
            inputs_embeds=hidden[None].to(self._device, self._dtype),
            position_ids=torch.arange(part.first, part.length, device=self._device)[None],
            past_key_values=state,
            use_cache=True,
        )
        return out.last_hidden_state[0]


def _rope_type(config: Any) -> str | None:
    parameters = getattr(config, "rope_parameters", None) or {}
    return parameters.get("rope_type")


def forward_of(
    module: Any, shapes: Sequence[KVShape | None], pages: int, dtype: torch.dtype, device: torch.device
) -> Forward:
    """The way to run `module`, whose blocks keep `shapes` of a token each, None where they keep a state."""
    paged = [shape for shape in shapes if shape is not None]
    if len(paged) < len(shapes):
        return RecurrentForward(module, dtype, device)
    return PagedForward(module, paged, pages, dtype, device)
