"""What one session keeps on a span with linear-attention blocks, as transformers' cache interface wants it.

Such a block folds the whole sequence into a state of fixed size, which cannot be taken apart again: a session
goes back to where its last step began, or to its start, and nowhere else. Its other blocks keep keys and
values. Knows nothing of other sessions: those run one at a time.
"""

from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionLayer

from swarm.blocks.errors import StepError
from swarm.spans import Span

LINEAR = "linear_attention"


class StateLayer(LinearAttentionLayer):
    """The state of one linear-attention block, and the one before the last step.

    States are replaced and never written to, so that keeping the one before costs no copy.
    """

    def __init__(self) -> None:
        super().__init__()
        self.length = self.start = 0
        self._before: tuple[Tensor | None, Tensor | None] = (None, None)
        self.activate_past_recording()  # else decoding would write to the state in place

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> Tensor:
        """Begin a step with [1, channels, tokens]; returns these after what the convolution still sees."""
        assert conv_kernel_size is not None
        self.start, self._before = self.length, (self.conv_states[0], self.recurrent_states[0])
        self.length += conv_states.shape[-1]
        seen = self.conv_states[0]
        full = conv_states if seen is None else torch.cat([seen, conv_states], dim=-1)
        self.conv_states[0] = full[..., -conv_kernel_size:].clone()
        return full

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
        """End a step with the new state."""
        self.recurrent_states[0] = recurrent_states
        self.has_previous_state[0] = True
        return recurrent_states

    def can_go_back(self, length: int) -> bool:
        return length in (0, self.start) or length >= self.length

    def go_back(self, length: int) -> None:
        if length >= self.length:
            return
        if length == self.start:
            self.conv_states[0], self.recurrent_states[0] = self._before
            self.has_previous_state[0] = self.start > 0
        else:
            self.conv_states[0] = self.recurrent_states[0] = None
            self.has_previous_state[0] = False
        self.start = self.length = length
        self._before = self.conv_states[0], self.recurrent_states[0]


class KeyValueLayer(CacheLayerMixin):
    """Keys and values of one attention block, [1, kv_heads, capacity, dim] each, filled from the left."""

    is_sliding = False

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def slab(like: Tensor) -> Tensor:
            return like.new_empty(1, like.shape[1], self.capacity, like.shape[3])

        self.keys, self.values = slab(key_states), slab(value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append [1, kv_heads, tokens, dim]; returns everything so far, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = cast(Tensor, self.keys), cast(Tensor, self.values)
        end = self.length + key_states.shape[2]
        keys[:, :, self.length : end] = key_states
        values[:, :, self.length : end] = value_states
        self.length = end
        return keys[:, :, :end], values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.capacity

    def can_go_back(self, length: int) -> bool:
        return True

    def go_back(self, length: int) -> None:
        self.length = min(self.length, length)


class RecurrentSession(Cache):
    """What a session of at most `capacity` tokens keeps on `blocks`, numbered as in the span's model."""

    def __init__(self, config: Any, blocks: Span, capacity: int):
        """`config` is the span model's own: its `layer_types` are those of the span."""
        kinds = config.layer_types[: blocks.end]
        layers = [StateLayer() if kind == LINEAR else KeyValueLayer(capacity) for kind in kinds]
        super().__init__(layers=list(layers))
        self.blocks = blocks
        self.capacity = capacity
        self._used = layers[blocks.start :]

    @property
    def length(self) -> int:
        """Tokens that every block has seen."""
        return min(layer.length for layer in self._used)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def roll_back(self, length: int) -> None:
        """Forget every position from `length` on; a no-op when the session is shorter.

        Raises:
            StepError: a linear-attention block has no state of that position; nothing has changed then.
        """
        if not all(layer.can_go_back(length) for layer in self._used):
            raise StepError(
                "bad_request",
                "This model keeps a state that cannot go back to any position: "
                "start the last step again, or the whole sequence.",
            )
        for layer in self._used:
            layer.go_back(length)


def state_bytes(config: Any, span: Span, value_bytes: int) -> int:
    """Most bytes that one session's states take on `span` of the model with `config`, beside keys and values.

    Twice the states, for the one before the last step; recurrent states are float32 whatever the model is.
    """
    blocks = sum(config.layer_types[block] == LINEAR for block in span.blocks)
    heads, dim = config.linear_num_value_heads, config.linear_value_head_dim
    key_width = config.linear_num_key_heads * config.linear_key_head_dim
    convolved = (2 * key_width + heads * dim) * config.linear_conv_kernel_dim
    return 2 * blocks * (4 * heads * config.linear_key_head_dim * dim + value_bytes * convolved)
