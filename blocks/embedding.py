"""Token ids to hidden states, for a server of the first block: a row a token, looked up where it lies.

The embeddings of a file on this machine are mapped, not loaded: they cost the memory of the rows in use,
which the system takes back when it wants. What a family does to the rows is done by its own module. Knows
nothing of heads and tokenizers.
"""

import copy
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from swarm.blocks.architecture import ends_model, load_config
from swarm.blocks.entries import DTYPES, TensorEntry
from swarm.blocks.models import Model
from swarm.blocks.storage import unreadable
from swarm.errors import InputError

Rows: TypeAlias = Callable[[Tensor], Tensor]
"""int64 ids [tokens] within the vocabulary to their rows [tokens, hidden], in the checkpoint's dtype."""


class Embedding:
    """The embeddings of one model, on CPU. Any thread may call it."""

    def __init__(self, module: Any, rows: Rows, vocabulary: int, dtype: torch.dtype):
        """`module` is the model's own, whose weights are not looked at."""
        self._module = module
        self._rows = rows
        self._dtype = dtype
        self.vocabulary = vocabulary

    @classmethod
    def open(cls, model: Model, dtype: torch.dtype) -> "Embedding":
        """The embeddings of `model` as `dtype`; their file must be here, see `Model.ensure_files`.

        Raises:
            InputError: the tensor or its file is missing, of the wrong shape or unreadable.
            SwarmError: what gives its file does not answer.
        """
        module = ends_model(load_config(str(model.path)), dtype).get_input_embeddings()
        entry = model.checkpoint.entry(model.checkpoint.embedding)
        if entry.shape != tuple(module.weight.shape):
            raise InputError(
                f"The tensor '{entry.name}' has shape {list(entry.shape)}, but the model's config asks for"
                f" {list(module.weight.shape)}.",
                "The config.json and the weights are not of the same model: get both again.",
            )
        return cls(module, _mapped(model, entry) or _loaded(model, entry), entry.shape[0], dtype)

    @torch.inference_mode()
    def __call__(self, ids: Tensor) -> Tensor:
        """Token ids [tokens] of any whole-number dtype to hidden states [tokens, hidden].

        Raises:
            ValueError: an id is beyond the vocabulary.
        """
        ids = ids.to(torch.int64)
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocabulary:
            raise ValueError(f"token ids go from 0 to {self.vocabulary - 1}")
        return as_embedded(self._module, self._rows(ids).to(self._dtype))


def as_embedded(module: Any, rows: Tensor) -> Tensor:
    """What a model's own embedding `module` makes of `rows` [tokens, hidden] of its weights, in their dtype.

    Some families scale them, and a scale must be no coarser than the hidden states are.
    """
    part = copy.copy(module)
    part._parameters = {"weight": nn.Parameter(rows, requires_grad=False)}
    part.padding_idx = None  # it matters for gradients alone, and a row is not its id here
    hidden: Tensor = part(torch.arange(len(rows), device=rows.device))
    return hidden


def _mapped(model: Model, entry: TensorEntry) -> Rows | None:
    """Rows out of the file itself; None where it is not one file on this machine."""
    storage = model.checkpoint.storage
    path = storage.path(entry.pieces[0].file)
    if path is None or len(entry.pieces) != 1:
        return None
    whole = _map(path)
    piece = entry.pieces[0]
    table = np.frombuffer(whole, np.uint8, piece.nbytes, piece.start).reshape(entry.shape[0], -1)
    stored = getattr(torch, DTYPES[entry.dtype][1])

    def rows(ids: Tensor) -> Tensor:
        found = torch.empty(len(ids), entry.shape[1], dtype=stored)
        np.take(table, ids.numpy(), axis=0, out=found.view(torch.uint8).numpy())
        return found

    return rows


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise unreadable(path, error) from error
    if hasattr(mmap, "MADV_RANDOM"):
        mapped.madvise(mmap.MADV_RANDOM)  # neighbours of a row in use are not worth reading
    return mapped


def _loaded(model: Model, entry: TensorEntry) -> Rows:
    [(_, weight)] = model.checkpoint.read([entry.name])

    def rows(ids: Tensor) -> Tensor:
        return weight[ids]

    return rows
