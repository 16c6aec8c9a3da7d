"""Checkpoints saved a file per rank: how the slices that tensor-parallel engines keep make whole tensors.

vLLM and SGLang save what each rank holds as `model-rank-{rank}-part-{part}.safetensors`: a part is some of
the rank's tensors, column-parallel weights are cut along their outputs, row-parallel ones along their
inputs, and queries, keys and values, like gate and up, are one tensor. Only what is certain from names,
shapes and the config is put together. Knows nothing of blocks being run.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from swarm.blocks.entries import Piece, TensorEntry
from swarm.errors import InputError

_RANK_FILE = re.compile(r"model-rank-(?P<rank>\d{1,4})-part-(?P<part>\d{1,6})\.safetensors")
_VOCABULARY = frozenset({"embed_tokens", "lm_head"})
_BY_OUTPUTS = frozenset({"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"})
_BY_INPUTS = frozenset({"o_proj", "down_proj"})
_PADDING = 64
"""Engines pad the vocabulary of each rank by less than this."""

_NOT_WEIGHTS = re.compile(r"\.rotary_emb\.|\.attn\._?\w+_scale(_float)?$")
"""What engines keep beside the weights: tables of rotary embeddings, scales of KV in 8 bits."""

_BLOCK = re.compile(r"(?P<base>(?:.+\.)?)layers\.\d+\.")

_FUSED_IN = {"qkv_proj": ("phi3",), "gate_up_proj": ("phi3", "glm4")}
"""The `model_type`s whose own tensors are fused so; all others have them apart."""


def rank_files(names: Collection[str]) -> list[list[str]]:
    """The files of each rank among `names`, in order; empty where none is one.

    Raises:
        InputError: a rank, or a part before another one, is missing.
    """
    found: dict[int, dict[int, str]] = {}
    for name in names:
        if match := _RANK_FILE.fullmatch(name):
            found.setdefault(int(match["rank"]), {})[int(match["part"])] = name
    for rank in range(max(found, default=-1) + 1):
        for part in range(max(found.get(rank, {0: ""})) + 1):
            if part not in found.get(rank, {}):
                raise InputError(
                    f"The weights file model-rank-{rank}-part-{part}.safetensors is missing.",
                    "The files of all ranks, with all their parts, are needed: get the missing one.",
                )
    return [[found[rank][part] for part in sorted(found[rank])] for rank in sorted(found)]


def assemble(
    tables: Sequence[Mapping[str, TensorEntry]], config: Mapping[str, Any]
) -> dict[str, TensorEntry]:
    """The whole tensors that the tensors of all ranks make, by the names that transformers knows.

    `tables` has the tensors of each rank, `config` is the raw config of a text model.

    Raises:
        InputError: a tensor cannot be put together exactly; the message names it.
    """
    sides = _Sides.of(config)
    whole: dict[str, TensorEntry] = {}
    for name in sorted(set().union(*tables)):
        if _NOT_WEIGHTS.search(name):
            continue
        slices = [table[name] for table in tables if name in table]
        if len(slices) < len(tables) or len({(entry.dtype, len(entry.shape)) for entry in slices}) > 1:
            raise _refused(name, "the ranks do not all hold a slice of it")
        whole |= {entry.name: entry for entry in _together(name, slices, sides)}
    return whole | _tied(whole)


def merge(tables: Iterable[Mapping[str, TensorEntry]]) -> dict[str, TensorEntry]:
    """The tensors of one rank, from those of its parts.

    Raises:
        InputError: two parts hold the same tensor.
    """
    merged: dict[str, TensorEntry] = {}
    for table in tables:
        if twice := sorted(merged.keys() & table.keys()):
            raise _refused(twice[0], "two parts of a rank hold it")
        merged |= table
    return merged


@dataclass(frozen=True, slots=True)
class _Sides:
    """The sides of a model's tensors, of which the slices must be parts."""

    model_type: str
    vocab: int
    dim: int
    heads: int
    kv_heads: int
    intermediate: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "_Sides":
        def side(*names: str) -> int:
            found = next((config[name] for name in names if config.get(name) is not None), None)
            if type(found) is not int or found < 1:
                raise InputError(
                    f"The model's config.json has no usable {names[0]}.",
                    "A checkpoint saved by rank is put together by it: get the file again.",
                )
            return found

        heads = side("num_attention_heads")
        return cls(
            model_type=str(config.get("model_type")),
            vocab=side("vocab_size"),
            dim=side("head_dim") if config.get("head_dim") else side("hidden_size") // heads,
            heads=heads,
            kv_heads=side("num_key_value_heads", "num_attention_heads"),
            intermediate=side("intermediate_size"),
        )

    def of_module(self, module: str) -> int:
        """How many outputs, or inputs where it is cut along these, the whole `module` has."""
        if module in ("q_proj", "o_proj"):
            return self.heads * self.dim
        return self.kv_heads * self.dim if module in ("k_proj", "v_proj") else self.intermediate


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows `[start, end)` of one rank's tensor."""

    entry: TensorEntry
    start: int
    end: int

    @classmethod
    def all_of(cls, entry: TensorEntry) -> "_Rows":
        return cls(entry, 0, entry.shape[0])

    @property
    def size(self) -> int:
        return self.end - self.start

    def piece(self, at: int) -> Piece:
        [stored], row = self.entry.pieces, prod(self.entry.shape[1:]) * self.entry.itemsize
        return Piece(stored.file, stored.start + self.start * row, stored.start + self.end * row, at)


def _together(name: str, slices: Sequence[TensorEntry], sides: _Sides) -> list[TensorEntry]:
    """The whole tensors of which `slices`, one a rank, are parts."""
    module, _, kind = name.rpartition(".")
    prefix, module = module[: module.rfind(".") + 1], module.rpartition(".")[2]
    if kind in ("w13_weight", "w2_weight") or ("experts" in name and len(slices) > 1):
        raise _refused(name, "how engines store experts differs between them")
    if module in _FUSED_IN and kind in ("weight", "bias"):
        return _apart(prefix, module, kind, slices, sides)
    if module in _FUSED_IN:
        raise _refused(name, "it belongs to quantised weights")
    if module in _VOCABULARY and kind in ("weight", "bias"):
        return [_vocabulary(name, slices, sides.vocab)]
    if len(slices) == 1:
        return [slices[0]]
    if module in _BY_OUTPUTS and kind in ("weight", "bias"):
        return [_stacked(name, _distinct(name, map(_Rows.all_of, slices), sides.of_module(module)))]
    if module in _BY_INPUTS and kind == "weight":
        return [_side_by_side(name, slices, sides.of_module(module))]
    if module.endswith("norm") or (module in _BY_INPUTS and kind == "bias"):
        return [_replicated(name, slices)]
    raise _refused(name, "it is not known how the ranks share it")


def _apart(
    prefix: str, module: str, kind: str, slices: Sequence[TensorEntry], sides: _Sides
) -> list[TensorEntry]:
    """Queries, keys and values, or gate and up, out of the slices that hold all of them."""
    names = ("q_proj", "k_proj", "v_proj") if module == "qkv_proj" else ("gate_proj", "up_proj")
    wholes = [sides.of_module(name) for name in names]
    least = sides.dim if module == "qkv_proj" else 1  # a head is never cut: ranks share it instead
    sizes = [max(whole // len(slices), least) for whole in wholes]
    if any(entry.shape[0] != sum(sizes) for entry in slices):
        raise _refused(f"{prefix}{module}.{kind}", f"its slices do not have {sum(sizes)} rows")
    columns, start = [], 0
    for name, size, whole in zip(names, sizes, wholes, strict=True):
        rows = [_Rows(entry, start, start + size) for entry in slices]
        columns.append(_distinct(f"{prefix}{name}.{kind}", rows, whole))
        start += size
    if sides.model_type in _FUSED_IN[module]:
        return [_stacked(f"{prefix}{module}.{kind}", [rows for column in columns for rows in column])]
    return [_stacked(f"{prefix}{name}.{kind}", rows) for name, rows in zip(names, columns, strict=True)]


def _distinct(name: str, rows: Iterable[_Rows], whole: int) -> list[_Rows]:
    """Those of the ranks' rows that make `whole` rows: neighbours may hold the same ones, of KV heads."""
    found = list(rows)
    held = sum(part.size for part in found)
    copies = held // whole
    if not copies or held % whole or len(found) % copies or len({part.size for part in found}) > 1:
        raise _refused(name, f"{held} rows on {len(found)} ranks are not {whole} rows of the whole")
    return found[::copies]


def _stacked(name: str, parts: Sequence[_Rows]) -> TensorEntry:
    entry = parts[0].entry
    if any(part.entry.shape[1:] != entry.shape[1:] for part in parts):
        raise _refused(name, "its slices do not fit each other")
    row, rows = prod(entry.shape[1:]) * entry.itemsize, 0
    pieces = []
    for part in parts:
        pieces.append(part.piece(rows * row))
        rows += part.size
    return TensorEntry(name, entry.dtype, (rows, *entry.shape[1:]), tuple(pieces))


def _vocabulary(name: str, slices: Sequence[TensorEntry], vocab: int) -> TensorEntry:
    """Rows of tokens, without those that fill the last ranks up."""
    if slices[0].shape[:1] == (vocab,):
        return _replicated(name, slices)
    held = sum(entry.shape[0] for entry in slices)
    if not vocab <= held < vocab + _PADDING * len(slices) or len({entry.shape for entry in slices}) > 1:
        raise _refused(name, f"{held} rows on {len(slices)} ranks are not those of {vocab} tokens")
    parts, left = [], vocab
    for entry in slices:
        parts.append(_Rows(entry, 0, min(left, entry.shape[0])))
        left -= parts[-1].size
    return _stacked(name, [part for part in parts if part.size])


def _side_by_side(name: str, slices: Sequence[TensorEntry], whole: int) -> TensorEntry:
    if len({entry.shape for entry in slices}) > 1 or len(slices[0].shape) != 2:
        raise _refused(name, "its slices do not fit each other")
    rows, columns = slices[0].shape
    if columns == whole:
        return _replicated(name, slices)
    if columns * len(slices) != whole:
        raise _refused(name, f"{columns} columns on {len(slices)} ranks are not {whole} columns of the whole")
    run = columns * slices[0].itemsize
    pieces = tuple(
        replace(entry.pieces[0], at=rank * run, run=run, stride=len(slices) * run)
        for rank, entry in enumerate(slices)
    )
    return TensorEntry(name, slices[0].dtype, (rows, whole), pieces)


def _replicated(name: str, slices: Sequence[TensorEntry]) -> TensorEntry:
    """What every rank holds, read from the first."""
    if len({entry.shape for entry in slices}) > 1:
        raise _refused(name, "the ranks hold it in different shapes")
    return slices[0]


def _tied(whole: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The embeddings where they share the head's tensor: of two names, the first is what engines save."""
    bases = {match["base"] for match in map(_BLOCK.match, whole) if match}
    head = whole.get("lm_head.weight")
    if head is None or not bases or any(name.endswith("embed_tokens.weight") for name in whole):
        return {}
    name = f"{min(bases, key=len)}embed_tokens.weight"
    return {name: replace(head, name=name)}


def _refused(name: str, reason: str) -> InputError:
    return InputError(
        f"The tensor '{name}' cannot be put together from the files of the ranks: {reason}.",
        "Use the checkpoint that these files were made from.",
    )
