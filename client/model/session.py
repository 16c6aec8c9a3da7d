"""Inference sessions: a batch that grows on the servers, as users of Petals and transformers' caches have it.

Owns what was said in a session, and which rows of an answer have ended. Must not know of heads, nor of how
tokens are chosen.
"""

from collections.abc import Collection
from contextvars import ContextVar
from typing import Self

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from swarm.client.blocking import BlockingSwarm
from swarm.client.facade import context_length
from swarm.client.model.batch import Batch
from swarm.errors import InputError
from swarm.spans import Span

active: ContextVar["InferenceSession | None"] = ContextVar("active", default=None)
"""The session whose `with` statement is running."""


class InferenceSession(Cache):
    """A batch of sequences that grows on the servers of the blocks `span`. A context manager.

    It is given either hidden states, by `step`, or tokens, by the model's `generate` and `forward`, which
    take it as `session` and as `past_key_values`. The batch has as many rows as what is given first. Within
    its `with` statement the model's `generate` goes on with it by itself.

    `output_ids` [batch, tokens] are all tokens of `generate` so far, of which the newest has not gone through
    the blocks yet; `output_mask` tells which of them are no padding. Both are None before the first.
    """

    def __init__(self, swarm: BlockingSwarm, span: Span, *, max_length: int, room: int | None = None):
        """It holds `max_length` tokens a row. Servers are asked for `room`, and for more once that is full.

        Raises:
            InputError: the model takes fewer tokens.
        """
        super().__init__(layers=[])
        context = context_length(swarm.swarm.model)
        if not 0 < max_length <= context:
            raise InputError(f"max_length is {max_length}.", f"This model takes 1 to {context} tokens.")
        self.span = span
        self.max_length = max_length
        self.output_ids: Tensor | None = None
        self.output_mask: Tensor | None = None
        self._swarm = swarm
        self._batch = Batch(swarm, span, max_length if room is None else min(room, max_length))
        self._answer: Answer | None = None
        self._outer: InferenceSession | None = None

    def __repr__(self) -> str:
        return f"InferenceSession(blocks {self.span}, position {self.position} of {self.max_length})"

    def belongs_to(self, swarm: BlockingSwarm) -> bool:
        """Whether it goes through all blocks of that client's model."""
        return self._swarm is swarm and self.span.size == swarm.swarm.model.num_blocks

    @property
    def takes_hidden(self) -> bool:
        """Whether it was given hidden states, whose tokens are not known."""
        return self._batch.takes_hidden

    @property
    def shown(self) -> Tensor:
        """Which columns up to `position` are no padding, bool [batch, position]."""
        return self._batch.shown

    @property
    def position(self) -> int:
        """How many tokens of each row went through the blocks, padding included.

        Setting it to less forgets what came after. The token at that place, the next one to go through the
        blocks, stays the newest of `output_ids`, unless the position is 0.
        """
        return self._batch.columns

    @position.setter
    def position(self, position: int) -> None:
        if not 0 <= position <= self.position:
            raise InputError(
                f"The session cannot go to position {position}.", f"It is at position {self.position}."
            )
        self._batch.rewind(position)
        if self.output_ids is None or self.output_mask is None:
            return
        if position:
            said = position + 1
            self.output_ids, self.output_mask = self.output_ids[:, :said], self.output_mask[:, :said]
        else:
            self.output_ids = self.output_mask = None

    def step(self, hidden_states: Tensor) -> Tensor:
        """What the blocks make of `hidden_states` [batch, tokens, hidden], which follow those before.

        Returns:
            The same shape, on the same device, in the same dtype.

        Raises:
            InputError: the shape does not fit the model or the session, there is no room for so many tokens,
                the session was given tokens before, or gradients are wanted.
            SwarmError: servers were lost for which there are no others, or the session has ended.
        """
        require_states(hidden_states)
        return self.advance(hidden_states).to(hidden_states)

    def advance(self, given: Tensor, shown: Tensor | None = None, keep: int = 0) -> Tensor:
        """Run what follows: token ids [batch, tokens], or hidden states [batch, tokens, hidden].

        Where `shown` [batch, tokens] is 0 there is padding.

        Returns:
            Hidden states [batch, keep, hidden] after the last `keep` tokens, or all if 0, on CPU; zeros for
            padding.

        Raises:
            InputError, SwarmError: as `step`. A session of tokens then stays where it was.
        """
        if given.requires_grad and torch.is_grad_enabled():
            raise InputError(
                "No gradients go through the swarm, and these hidden states require them.",
                "Detach them, or run this under torch.no_grad().",
            )
        self._batch.require_open()
        shown = torch.ones(given.shape[:2]) if shown is None else shown.cpu()
        seen = self._answer.seen(shown.bool()) if self._answer is not None else shown.bool()
        self._check_room(seen)
        hidden = self._batch.run(given, seen, keep)
        if self._answer is not None:
            self._answer.ran(given.cpu())
        return hidden

    @property
    def is_answering(self) -> bool:
        return self._answer is not None

    def begin_answer(self, ends: Collection[int]) -> None:
        """An answer begins, whose rows end with one of the tokens `ends`."""
        self._answer = Answer(torch.tensor(sorted(ends), dtype=torch.long))

    def end_answer(self, sequences: Tensor | None) -> None:
        """It is written, or given up where `sequences` [batch, tokens], all tokens so far, are None."""
        answer, self._answer = self._answer, None
        if sequences is not None and answer is not None:
            newest = ~answer.ended[:, None]
            self.output_ids, self.output_mask = sequences, torch.cat([self.shown, newest], dim=1)

    def continue_from(self) -> int:
        """How many tokens were said. What went through the blocks besides is forgotten: it was given up."""
        said = 0 if self.output_ids is None else self.output_ids.shape[1]
        self.position = min(self.position, max(said - 1, 0))
        return said

    def continued(self, inputs: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """All that was said with `inputs` [batch, tokens] behind it, and an attention mask for all of that.

        Raises:
            InputError: they do not fit, or a row has nothing to go on with.
        """
        assert self.output_ids is not None
        assert self.output_mask is not None
        said, shown = self.output_ids, self.output_mask.long().to(self.output_ids.device)
        if inputs is None:
            if not shown[:, -1].all():
                raise InputError("A row of the answer has ended.", "Give it inputs to go on with.")
            return said, shown
        if inputs.ndim != 2 or len(inputs) != len(said):
            raise InputError(
                f"inputs have the shape {list(inputs.shape)}.", f"This session has {len(said)} rows."
            )
        mask = torch.ones_like(inputs) if mask is None else mask
        return torch.cat([said.to(inputs), inputs], dim=1), torch.cat([shown.to(mask), mask], dim=1)

    def close(self) -> None:
        """Free what servers hold. Safe to call again."""
        self._batch.close()

    def __enter__(self) -> Self:
        self._outer = active.get()
        active.set(self)
        return self

    def __exit__(self, *failure: object) -> None:
        active.set(self._outer)
        self.close()

    def _check_room(self, shown: Tensor) -> None:
        before = self._batch.lengths or [0] * len(shown)
        needed = max(map(sum, zip(before, shown.sum(1).tolist(), strict=False)), default=0)
        if needed > self.max_length:
            raise InputError(
                f"This session holds {self.max_length} tokens; {needed} are needed.",
                "Open one with a larger max_length, or set its position back.",
            )

    # What transformers asks of a cache. The layers are elsewhere, so there are none here.

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return True

    def __len__(self) -> int:
        return self.span.size

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.position

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.max_length

    def activate_past_recording(self) -> None:
        """Servers can always go back."""

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens; transformers gives how many as a negative number."""
        self.position -= abs(tokens_to_remove)

    def reset(self) -> None:
        self.position = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise no_copies()

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise no_copies()

    def batch_select_indices(self, indices: Tensor) -> None:
        raise no_copies()


class Answer:
    """An answer while it is written. A row has ended once one of the tokens `ends` has gone through it."""

    def __init__(self, ends: Tensor):
        self.ended = torch.zeros(0, dtype=torch.bool)
        """Of each row, once the prompt is through."""
        self._ends = ends

    def seen(self, shown: Tensor) -> Tensor:
        """What of the columns `shown` is to go through the blocks: of rows that have ended, nothing more.

        Raises:
            InputError: a row of the prompt has no token in its last place, where the answer begins.
        """
        if len(self.ended):
            return shown & ~self.ended[:, None]
        if not shown[:, -1].all():
            raise InputError(
                f"Row {int(shown[:, -1].int().argmin())} of the batch ends with padding.",
                "Pad on the left: tokenizer.padding_side = 'left'.",
            )
        return shown

    def ran(self, given: Tensor) -> None:
        """Those have gone through: the prompt, or the newest tokens [batch, tokens]."""
        if not len(self.ended):
            self.ended = torch.zeros(len(given), dtype=torch.bool)
        elif len(given) > 1:  # what is drafted for a single row may be taken back
            self.ended |= torch.isin(given[:, -1], self._ends)


def require_states(given: Tensor) -> None:
    """
    Raises:
        InputError: that are no hidden states of a batch.
    """
    if given.ndim != 3 or not given.is_floating_point():
        raise InputError(
            f"Hidden states are needed, not {given.dtype} of the shape {list(given.shape)}.",
            "They have the shape [batch, tokens, hidden].",
        )
    require_some(given)


def require_some(given: Tensor) -> None:
    """
    Raises:
        InputError: there is nothing to run.
    """
    if not given.numel():
        raise InputError(f"There are no tokens to run: the shape is {list(given.shape)}.")


def no_copies() -> InputError:
    return InputError("Servers cannot copy a session.", "Use num_return_sequences with do_sample, not beams.")
