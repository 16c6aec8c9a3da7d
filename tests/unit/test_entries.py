"""The tables of safetensors files: what is well formed is understood, and what is not costs nothing."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from swarm.blocks import entries
from swarm.blocks.entries import DTYPES, TensorEntry, read_header
from swarm.blocks.storage import LocalStorage
from swarm.errors import InputError


def header_of(path: Path) -> dict[str, TensorEntry]:
    return read_header(LocalStorage(path.parent), path.name)


def write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_every_known_dtype_exists_in_torch():
    for size, name in DTYPES.values():
        assert getattr(torch, name).itemsize == size


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"not json", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        ([], "not a JSON object"),
        ({"a": 3}, "lacks"),
        ({"a": {**GOOD, "data_offsets": [0]}}, "lacks"),
        ({"a": {**GOOD, "data_offsets": [0, 8.0]}}, "lacks"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "lacks"),
        ({"a": {**GOOD, "dtype": "F31"}}, "unknown dtype 'F31'"),
        ({"a": {**GOOD, "shape": [-1, -2]}}, "impossible shape"),
        ({"a": {**GOOD, "shape": ["2"]}}, "impossible shape"),
        ({"a": {**GOOD, "shape": [True, 2]}}, "impossible shape"),
        ({"a": {**GOOD, "shape": [3]}}, "do not match"),
        ({"a": {**GOOD, "data_offsets": [-8, 0]}}, "do not match"),
        ({"a": {**GOOD, "data_offsets": [8, 0]}}, "do not match"),
        ({"a": GOOD, "b": GOOD, "c": {**GOOD, "data_offsets": [4, 12]}}, "overlap"),
        ({"a": {**GOOD, "shape": [4], "data_offsets": [0, 16]}, "b": GOOD}, "overlap"),
        (
            {"a": {**GOOD, "shape": [4], "data_offsets": [0, 16]}, "b": {**GOOD, "data_offsets": [8, 16]}},
            "overlap",
        ),
        ({"a": GOOD, "b": {**GOOD, "data_offsets": [4, 12]}}, "overlap"),
        ({"a": {**GOOD, "shape": [2**62], "data_offsets": [0, 2**64]}}, "truncated"),
        ({"a": {**GOOD, "data_offsets": [16, 24]}}, "truncated"),
    ],
)
def test_a_malformed_header_is_refused(tmp_path, header, reason):
    with pytest.raises(InputError, match=reason):
        header_of(write_raw(tmp_path / "x.safetensors", header, bytes(16)))


def test_a_well_formed_header_is_not_refused(tmp_path):
    header = {"__metadata__": {"format": "pt"}, "a": GOOD, "b": {**GOOD, "data_offsets": [8, 16]}}

    assert set(header_of(write_raw(tmp_path / "x.safetensors", header, bytes(16)))) == {"a", "b"}


def test_two_names_for_the_same_bytes_share_their_storage(tmp_path):
    table = header_of(write_raw(tmp_path / "x.safetensors", {"a": GOOD, "b": GOOD}, bytes(8)))

    assert table["a"].pieces == table["b"].pieces


@pytest.mark.parametrize("first_read", [8, 9, 40, 2**16])
def test_headers_longer_than_the_first_read(tmp_path, monkeypatch, first_read):
    monkeypatch.setattr(entries, "FIRST_READ_BYTES", first_read)
    tensors = {f"tensor-{i}": torch.full((i,), float(i)) for i in range(1, 9)}
    save_file(tensors, tmp_path / "x.safetensors")

    table = header_of(tmp_path / "x.safetensors")
    assert {name: entry.shape for name, entry in table.items()} == {n: t.shape for n, t in tensors.items()}


@pytest.mark.parametrize("keep", [0, 3, 8, 100, -1])
def test_a_truncated_file_is_called_truncated(tmp_path, keep):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(100), "b": torch.zeros(7)}, path)
    path.write_bytes(path.read_bytes()[:keep])

    with pytest.raises(InputError, match="truncated"):
        header_of(path)


def test_an_enormous_header_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(entries, "MAX_HEADER_BYTES", 10)

    with pytest.raises(InputError, match="larger than"):
        header_of(write_raw(tmp_path / "x.safetensors", {"a": GOOD}, bytes(8)))


def test_a_header_length_beyond_the_file_costs_no_memory(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes((2**63).to_bytes(8, "little") + b"{}")

    with pytest.raises(InputError, match="truncated"):
        header_of(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError, match="missing"):
        header_of(tmp_path / "x.safetensors")
