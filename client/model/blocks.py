"""The model's blocks, which run on servers, and the ends of the model around them, which run here.

`RemoteSequential` looks like the list of a model's layers and can be sliced like one. Must not know how
tokens are chosen.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from swarm.blocks.head import Head
from swarm.client.blocking import BlockingSwarm
from swarm.client.model.batch import MAX_BATCH
from swarm.client.model.session import InferenceSession, require_some, require_states
from swarm.errors import InputError
from swarm.spans import Span


class RemoteSequential(nn.Module):
    """The blocks `span` of a swarm's model. Its slices are of the same kind; indices count from its first."""

    def __init__(self, swarm: BlockingSwarm, span: Span):
        super().__init__()
        self.span = span
        self.swarm = swarm

    def extra_repr(self) -> str:
        return f"blocks {self.span} of {self.swarm.swarm.model.name}"

    def __len__(self) -> int:
        return self.span.size

    def __getitem__(self, index: int | slice) -> "RemoteSequential":
        """
        Raises:
            IndexError: there is no such block.
            InputError: the slice has no block, or leaves some out.
        """
        blocks = self.span.blocks[index]
        if isinstance(blocks, int):
            return RemoteSequential(self.swarm, Span(blocks, blocks + 1))
        if not blocks or blocks.step != 1:
            raise InputError(
                f"No blocks can be run as [{_text(index)}] of {len(self)}.",
                "A slice has at least one block, and all between its first and last.",
            )
        return RemoteSequential(self.swarm, Span(blocks.start, blocks.stop))

    def __iter__(self) -> Iterator["RemoteSequential"]:
        return (self[index] for index in range(len(self)))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """What the blocks make of whole sequences `hidden_states` [batch, tokens, hidden]: the same shape.

        Raises:
            InputError, SwarmError: as `InferenceSession.step`.
        """
        require_states(hidden_states)
        return self.run(hidden_states).to(hidden_states)

    def run(self, given: Tensor, shown: Tensor | None = None, keep: int = 0) -> Tensor:
        """`InferenceSession.advance` on sessions that are closed after it."""
        parts = []
        for at in range(0, len(given), MAX_BATCH):
            rows = slice(at, at + MAX_BATCH)
            session = self.inference_session(max_length=given.shape[1])
            try:
                parts.append(session.advance(given[rows], None if shown is None else shown[rows], keep))
            finally:
                session.close()
        return torch.cat(parts)

    def inference_session(self, *, max_length: int) -> InferenceSession:
        """A session on these blocks, of at most `max_length` tokens a row. A context manager."""
        return InferenceSession(self.swarm, self.span, max_length=max_length)


class WordEmbeddings(nn.Module):
    """Token ids [...] to what the first block takes, [..., hidden]."""

    def __init__(self, ends: Head):
        super().__init__()
        self.embedding = ends.module.get_input_embeddings()
        self._ends = ends

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.embedding.weight
        return weight

    def forward(self, input_ids: Tensor) -> Tensor:
        return self._ends.embed(input_ids.flatten()).view(*input_ids.shape, -1).clone()


class RemoteModel(nn.Module):
    """The model without its head. Names are transformers' own, and besides them those of Petals."""

    def __init__(self, swarm: BlockingSwarm, ends: Head):
        super().__init__()
        self.embed_tokens = WordEmbeddings(ends)
        self.layers = RemoteSequential(swarm, Span(0, swarm.swarm.model.num_blocks))
        self.norm = ends.module.model.norm
        self.word_embeddings_layernorm = nn.Identity()
        self._ends = ends

    @property
    def word_embeddings(self) -> WordEmbeddings:
        return self.embed_tokens

    @property
    def h(self) -> RemoteSequential:
        return self.layers

    @property
    def ln_f(self) -> nn.Module:
        norm: nn.Module = self.norm
        return norm

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: InferenceSession | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the final norm, `last_hidden_state` [batch, tokens, hidden]; see `run`."""
        hidden, _ = self.run(input_ids, inputs_embeds, attention_mask, past_key_values)
        weight = self.norm.weight
        last = self.norm(hidden.to(weight.device, self._ends.dtype))
        return BaseModelOutputWithPast(last_hidden_state=last, past_key_values=past_key_values)

    def run(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        session: InferenceSession | None,
        keep: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Bring token ids [batch, tokens], or what they embed to, through all blocks, on with `session`.

        `attention_mask` [batch, tokens] is 0 for padding; it begins with that of the tokens in the session.

        Returns:
            Hidden states [batch, keep, hidden] after the last `keep` tokens, or all if 0, and which of these
            are no padding, bool [batch, keep].

        Raises:
            InputError: there are neither ids nor embeddings, or both, or the shapes do not fit each other.
            SwarmError: as `InferenceSession.step`.
        """
        given = _the_one(input_ids, inputs_embeds)
        if session is not None and not self._is_mine(session):
            raise InputError(
                f"past_key_values is {type(session).__name__}, which is no session of this model's.",
                "Make one by model.inference_session(max_length=…).",
            )
        shown = _newest(attention_mask, given, session)
        run = self.layers.run if session is None else session.advance
        return run(given, shown, keep), shown[:, -keep:]

    def _is_mine(self, session: object) -> bool:
        return isinstance(session, InferenceSession) and session.belongs_to(self.layers.swarm)


def _the_one(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    if input_ids is not None and inputs_embeds is None and input_ids.ndim == 2:
        require_some(input_ids)
        return input_ids
    if inputs_embeds is not None and input_ids is None:
        require_states(inputs_embeds)
        return inputs_embeds
    raise InputError(
        "The model takes input_ids [batch, tokens], or else inputs_embeds [batch, tokens, hidden]."
    )


def _newest(mask: Tensor | None, given: Tensor, session: InferenceSession | None) -> Tensor:
    """Which of `given` are no padding, bool [batch, tokens]."""
    if mask is None:
        return torch.ones(given.shape[:2], dtype=torch.bool)
    before = session.position if session is not None else 0
    expected = given.shape[0], before + given.shape[1]
    if mask.shape != expected:
        raise InputError(
            f"attention_mask has the shape {list(mask.shape)}; it must be {list(expected)}.",
            "It is for all tokens, those in the session included.",
        )
    mask = mask.cpu().bool()
    if session is not None and not session.is_answering and not mask[:, :before].equal(session.shown):
        raise InputError("attention_mask is another one than before for the tokens in the session.")
    return mask[:, before:]


def _text(index: int | slice) -> str:
    if isinstance(index, int):
        return str(index)
    return ":".join("" if part is None else str(part) for part in (index.start, index.stop, index.step or ""))
