"""KV memory of one session on one span: a slab a block, as transformers' cache interface wants it.

Sliding-window blocks keep every position too, so that a session can be rolled back to any of them.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from swarm.spans import Span


class Slab(CacheLayerMixin):
    """Keys and values of one block, [1, kv_heads, capacity, dim] each, filled from the left."""

    is_sliding = False

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def slab(like: Tensor) -> Tensor:
            return like.new_empty(1, like.shape[1], self.capacity, like.shape[3])

        self.keys, self.values = slab(key_states), slab(value_states)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append [1, kv_heads, tokens, dim]; returns everything so far, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        end = self.length + key_states.shape[2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def addresses(self, states: Tensor) -> tuple[int, int]:
        """Where keys and values lie; made like `states`, [1, kv_heads, any, dim], if nothing was held yet."""
        if not self.is_initialized:
            self.lazy_initialization(states, states)
        assert self.keys is not None
        assert self.values is not None
        return self.keys.data_ptr(), self.values.data_ptr()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.capacity


class SessionKV(Cache):
    """The slabs of the blocks a session uses, `length` tokens of at most `capacity` in each.

    `blocks` are numbered as in the span's model; those before them have a place and take no memory.
    """

    def __init__(self, blocks: Span, capacity: int):
        slabs = [Slab(capacity) for _ in range(blocks.end)]
        super().__init__(layers=list(slabs))
        self.blocks = blocks
        self._slabs = slabs[blocks.start :]
        self.capacity = capacity
        self._addresses: Tensor | None = None

    @property
    def length(self) -> int:
        return self._slabs[0].length

    def roll_back(self, length: int) -> None:
        """Forget every position from `length` on; a no-op when the session is shorter."""
        for slab in self._slabs:
            slab.length = min(slab.length, length)

    def grow(self, tokens: int) -> None:
        """Count `tokens` whose keys and values were written to the slabs directly."""
        for slab in self._slabs:
            slab.length += tokens

    def addresses(self, kv_heads: int, dim: int, like: Tensor) -> Tensor:
        """Where keys and values of each used block lie, [blocks, 2]; they never move."""
        if self._addresses is None:
            states = like.new_empty(1, kv_heads, 0, dim)
            self._addresses = torch.tensor([slab.addresses(states) for slab in self._slabs])
        return self._addresses
