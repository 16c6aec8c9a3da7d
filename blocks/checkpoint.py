"""A checkpoint: which tensors a model's weights files hold, which of them a span needs, and reading these.

Knows nothing of models being run, nor of where the files came from.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swarm.blocks.entries import TensorEntry, read_header
from swarm.blocks.files import read_json
from swarm.blocks.ranks import assemble, merge, rank_files
from swarm.blocks.reading import DEFAULT_MEMORY_BUDGET, read_ahead
from swarm.blocks.storage import LocalStorage, Storage
from swarm.errors import InputError
from swarm.spans import Span

if TYPE_CHECKING:
    import torch

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_BLOCK_NAME = re.compile(r"^(?P<prefix>(?:.+\.)?layers\.)(?P<block>\d+)\.")
_EMBEDDING, _NORM = "embed_tokens.weight", "norm.weight"
_RECOMPUTED_ENDING = ".rotary_emb.inv_freq"


class Checkpoint:
    """The tensors of one model in a folder, found through the index or in the single file.

    Files that are not there yet are no error until a tensor of theirs is asked for, so that a
    peer may hold only the files of its span.
    """

    def __init__(
        self,
        folder: Path,
        num_blocks: int,
        *,
        storage: Storage | None = None,
        config: Mapping[str, Any] | None = None,
        ties_embeddings: bool = False,
    ):
        """Look at the index in `folder`, or at the names of the files in `storage`; no weights are read.

        `storage`: where the weights files are, None for in `folder`. `config`: the raw config, by which
        files of ranks are put together. `ties_embeddings`: it says that the head shares the embeddings'
        tensor.

        Raises:
            InputError: the index is malformed or names a file outside the folder, or a rank is missing.
        """
        self.folder = folder
        self.num_blocks = num_blocks
        self.storage = LocalStorage(folder) if storage is None else storage
        self._config = config or {}
        self._ties_embeddings = ties_embeddings
        self._headers: dict[str, dict[str, TensorEntry]] = {}
        self.file_of = weight_map(folder, self.storage.names)
        self._ranks = [] if self.file_of else _ranks(self.storage.names)

    @property
    def is_indexed(self) -> bool:
        return self.file_of is not None

    @property
    def files(self) -> tuple[str, ...]:
        """The names of all weights files, sorted, whether they are in the folder or not."""
        return weights_files(self.folder, self.storage.names)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of all tensors, sorted."""
        return tuple(sorted(self._unindexed if self.file_of is None else self.file_of))

    @property
    def tensors(self) -> dict[str, TensorEntry]:
        """The entries of the tensors in all files; each file must be there (see `entry` for one)."""
        return {name: self.entry(name) for name in self.names}

    def entry(self, name: str) -> TensorEntry:
        """Where the tensor `name` lies.

        Raises:
            InputError: no such tensor, or its file is missing, truncated or malformed.
            SwarmError: what gives its file does not answer.
        """
        if self.file_of is None:
            entry = self._unindexed.get(name)
        else:
            entry = self._header(self.file_of[name]).get(name) if name in self.file_of else None
        if entry is None:
            raise InputError(
                f"The checkpoint in {self.storage.where('')} has no tensor '{name}'.",
                "The config.json and the weights are not of the same model: get both again.",
            )
        return entry

    def files_for(self, names: Iterable[str]) -> tuple[str, ...]:
        """The names of the files that hold the tensors `names`, sorted."""
        if self.file_of is None:
            return self.files
        return tuple(sorted({self.file_of[name] for name in names}))

    @cached_property
    def _unindexed(self) -> dict[str, TensorEntry]:
        """All tensors, where only the files themselves tell what they hold."""
        if not self._ranks:
            return self._header(SINGLE_FILE)
        return assemble([merge(map(self._header, files)) for files in self._ranks], self._config)

    def _header(self, file: str) -> dict[str, TensorEntry]:
        if file not in self._headers:
            self._headers[file] = read_header(self.storage, file)
        return self._headers[file]

    @cached_property
    def block_prefix(self) -> str:
        """What the names of block tensors begin with, before the block's number: `model.layers.`

        Raises:
            InputError: no family of tensors is numbered like this model's blocks.
        """
        blocks: dict[str, set[int]] = {}
        for name in self.names:
            if found := _BLOCK_NAME.match(name):
                blocks.setdefault(found["prefix"], set()).add(int(found["block"]))
        complete = [prefix for prefix, seen in blocks.items() if seen.issuperset(range(self.num_blocks))]
        decoders = [p for p in complete if p.removesuffix("layers.") + _EMBEDDING in self.names]
        if not decoders:
            where = self.storage.where("")
            raise InputError(
                f"The checkpoint in {where} does not hold {self.num_blocks} blocks with embeddings.",
                "The config.json and the weights are not of the same model: get both again.",
            )
        return min(decoders, key=len)

    @property
    def base_prefix(self) -> str:
        """What the names of the decoder's tensors begin with: `model.`"""
        return self.block_prefix.removesuffix("layers.")

    @property
    def is_tied(self) -> bool:
        """Whether the head shares the embeddings' tensor."""
        return self._ties_embeddings or not any(map(_is_lm_head, self.names))

    def block_tensors(self, span: Span) -> dict[int, list[str]]:
        """The names of the tensors of each block in `span`, leaving out what is recomputed at load."""
        names: dict[int, list[str]] = {block: [] for block in span.blocks}
        for name in self.names:
            if not name.startswith(self.block_prefix) or name.endswith(_RECOMPUTED_ENDING):
                continue
            block = int(name.removeprefix(self.block_prefix).partition(".")[0])
            if block in names:
                names[block].append(name)
        return names

    @property
    def embedding(self) -> str:
        """The name of the embeddings' tensor [vocabulary, hidden]."""
        return self.base_prefix + _EMBEDDING

    def head_tensors(self) -> list[str]:
        """The names of the tensors a client needs: embeddings, final norm and, unless tied, the head."""
        wanted = {self.embedding, self.base_prefix + _NORM}
        return [name for name in self.names if name in wanted or (_is_lm_head(name) and not self.is_tied)]

    def read(
        self, names: Iterable[str], *, threads: int = 4, memory_budget: int = DEFAULT_MEMORY_BUDGET
    ) -> "Iterator[tuple[str, torch.Tensor]]":
        """Read tensors by byte range, several at a time, and yield them in the order asked for.

        `threads` read at once, or more where the storage is slow to answer. At most `memory_budget` bytes
        are read ahead or in the consumer's hands at once; a tensor is counted until the next one is asked
        for. A tensor larger than the budget goes alone. Tensors that share storage are read once, and share
        it then too. Closing the iterator stops the threads.

        Raises:
            InputError: a tensor or its file is missing, malformed, or shorter than its header says.
            SwarmError: what gives a file does not answer.
        """
        threads = max(threads, self.storage.threads)
        yield from read_ahead(self.storage, [self.entry(name) for name in names], threads, memory_budget)


def weights_files(folder: Path, names: Collection[str]) -> tuple[str, ...]:
    """The names of all weights files of the checkpoint in `folder`, which has files called `names`, sorted.

    Files that the index speaks of belong to it whether they are among `names` or not.

    Raises:
        InputError: the index is malformed or names a file outside the folder, or a rank is missing.
    """
    if indexed := weight_map(folder, names):
        return tuple(sorted(set(indexed.values())))
    return tuple(file for files in _ranks(names) for file in files) or (SINGLE_FILE,)


def weight_map(folder: Path, names: Collection[str]) -> dict[str, str] | None:
    """Tensor name -> file name, or None where there is no index for the weights files among `names`.

    An index that was copied along with files of ranks speaks of files that are not there.

    Raises:
        InputError: the index is malformed or names a file outside the folder.
    """
    index = folder / INDEX_FILE
    if not index.exists():
        return None
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise InputError(f"{index} holds no weight map.", "Get the file again.")
    for name, file in found.items():
        if not _is_plain_file_name(file):
            raise InputError(
                f"{index} places the tensor '{name}' in {file!r}, which is no weights file of that folder.",
                "Do not use this checkpoint unless you trust where it comes from.",
            )
    is_stale = not set(found.values()) & set(names) and _ranks(names)
    return None if is_stale else found


def _ranks(names: Collection[str]) -> list[list[str]]:
    """The files of each rank, where there is no file of the whole model."""
    return [] if SINGLE_FILE in names else rank_files(names)


def _is_plain_file_name(file: object) -> bool:
    return (
        isinstance(file, str)
        and file.endswith(".safetensors")
        and not file.startswith(".")
        and not set(file) & set("/\\:\0")
    )


def _is_lm_head(name: str) -> bool:
    return name == "lm_head.weight" or name.endswith(".lm_head.weight") or name == "lm_head.bias"
