"""A flat batch of many sessions through transformers' layers: their cache and attention over pages.

The rows of all sessions are one sequence to transformers. Its layers hand their new keys and values to the
cache, which writes them to the pages, and call our attention function, which reads them there.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin

from swarm.blocks.adapted import chunk_of, temper
from swarm.kernels.attention import attend
from swarm.kernels.pages import Pages, Segments, append, attend_pages

ATTENTION = "swarm"
"""Name of our attention function. transformers builds no masks for a name it does not know."""

_batch: ContextVar["FlatBatch | None"] = ContextVar("flat batch", default=None)
"""The batch that this thread computes: transformers hands its attention functions no cache."""


class FlatBatch(Cache):
    """transformers' cache for one forward pass of `segments` through blocks that keep `pages`, one each."""

    def __init__(self, pages: Sequence[Pages], segments: Segments):
        super().__init__(layers=[_BlockPages(one, segments) for one in pages])
        self.pages = pages
        self.segments = segments

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let attention find this batch while its forward pass runs."""
        token = _batch.set(self)
        try:
            yield
        finally:
            _batch.reset(token)


class _BlockPages(CacheLayerMixin):
    """One block's pages. To transformers the cache is empty: attention alone looks back."""

    is_sliding = False

    def __init__(self, pages: Pages, segments: Segments):
        super().__init__()
        self._pages = pages
        self._segments = segments

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep [1, kv_heads, rows, dim] where they belong."""
        append(self._pages, key_states[0].transpose(0, 1), value_states[0].transpose(0, 1), self._segments)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


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
    """transformers' interface: [1, heads, rows, dim] in, [1, rows, heads, dim] out.

    Without a batch the rows are the last ones of one sequence, whose keys and values are all given.
    """
    batch = _batch.get()
    options: dict[str, Any] = {
        "scale": scaling,
        "window": sliding_window,
        "chunk": chunk_of(module),
        "softcap": softcap,
        "sinks": s_aux,
    }
    if batch is None:
        return attend(query[0], key[0], value[0], **options).transpose(0, 1)[None], None
    rows = temper(module, query[0], batch.segments.positions).transpose(0, 1)
    assert isinstance(module.layer_idx, int)
    return attend_pages(rows, batch.pages[module.layer_idx], batch.segments, **options)[None], None


AttentionInterface.register(ATTENTION, _attention)
