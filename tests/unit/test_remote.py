"""Models of a storage far away, by URL: read in ranges, hashed once, and clear about what goes wrong."""

import errno
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import load_file

from swarm.blocks import remote
from swarm.blocks.architecture import load_config
from swarm.blocks.embedding import Embedding
from swarm.blocks.models import resolve
from swarm.blocks.precision import choose_precision
from swarm.blocks.remote import RemoteStorage
from swarm.blocks.shard import load_span
from swarm.errors import InputError, SwarmError
from swarm.spans import Span

URL = "memory://bucket/models/tiny"


@pytest.fixture
def bucket() -> Iterator[MemoryFileSystem]:
    """A storage in this process."""
    filesystem = MemoryFileSystem()
    yield filesystem
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


@pytest.fixture
def uploaded(bucket, checkpoint_of) -> Path:
    """The folder whose files lie in the bucket."""
    folder, _ = checkpoint_of("Qwen3")
    for file in folder.iterdir():
        bucket.pipe(f"/bucket/models/tiny/{file.name}", file.read_bytes())
    return folder


@pytest.fixture
def reads(monkeypatch) -> list[tuple[str, int]]:
    """The ranges that were read: file and bytes."""
    seen: list[tuple[str, int]] = []
    read = MemoryFileSystem.cat_file

    def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        data = read(self, path, start, end)
        seen.append((path.rpartition("/")[2], len(data)))
        return data

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    return seen


def of_weights(reads: list[tuple[str, int]]) -> int:
    return sum(count for name, count in reads if name.endswith(".safetensors"))


def test_a_model_by_url_is_the_model_of_the_folder(uploaded, tmp_path):
    model = resolve(URL, cache_dir=tmp_path)
    local = resolve(str(uploaded), cache_dir=tmp_path)

    assert model.model_id == local.model_id
    assert model.public_name == "tiny"
    assert model.path.is_relative_to(tmp_path)
    assert not list(model.path.glob("*.safetensors"))
    model.ensure_files(Span(0, 6), with_head=True)
    for name, tensor in model.checkpoint.read(model.checkpoint.names):
        assert torch.equal(tensor, dict(local.checkpoint.read([name]))[name])


def test_a_span_is_loaded_from_ranges(uploaded, tmp_path, reads):
    model, span = resolve(URL, cache_dir=tmp_path), Span(2, 4)
    tensors = model.checkpoint.block_tensors(span)
    wanted = sum(model.checkpoint.entry(name).nbytes for names in tensors.values() for name in names)
    precision = choose_precision("float32", torch.device("cpu"), torch.float32)
    reads.clear()
    here = load_span(resolve(str(uploaded), cache_dir=tmp_path), span, precision, torch.device("cpu"))
    there = load_span(model, span, precision, torch.device("cpu"))

    assert of_weights(reads) == wanted
    for (name, one), other in zip(here.state_dict().items(), there.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_embeddings_far_away_are_loaded(uploaded, tmp_path):
    embedding = Embedding.open(resolve(URL, cache_dir=tmp_path), torch.float32)
    weights = {
        name: tensor for file in uploaded.glob("*.safetensors") for name, tensor in load_file(file).items()
    }

    ids = torch.tensor([3, 127, 3])
    assert torch.equal(embedding(ids), weights["model.embed_tokens.weight"][ids])


def test_weights_are_hashed_once_and_small_files_fetched_once(uploaded, tmp_path, reads):
    first = resolve(f"{URL}/", cache_dir=tmp_path)
    assert of_weights(reads) == sum(file.stat().st_size for file in uploaded.glob("*.safetensors"))
    reads.clear()
    second = resolve(URL, cache_dir=tmp_path)

    assert reads == []
    assert (second.model_id, second.path) == (first.model_id, first.path)
    load_config(str(second.path))


def test_a_file_that_was_written_again_is_hashed_again(uploaded, bucket, tmp_path, reads):
    before = resolve(URL, cache_dir=tmp_path)
    [name] = before.checkpoint.files_for(["model.norm.weight"])
    data = bytearray(bucket.cat_file(f"/bucket/models/tiny/{name}"))
    data[-1] ^= 1
    bucket.pipe(f"/bucket/models/tiny/{name}", bytes(data))

    assert resolve(URL, cache_dir=tmp_path).model_id != before.model_id


def test_a_changed_config_makes_a_new_copy(uploaded, bucket, tmp_path):
    before = resolve(URL, cache_dir=tmp_path)
    config = (uploaded / "config.json").read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05')
    bucket.pipe("/bucket/models/tiny/config.json", config.encode())
    after = resolve(URL, cache_dir=tmp_path)

    assert after.config["rms_norm_eps"] == 1e-05 != before.config["rms_norm_eps"]
    assert after.path != before.path


def test_where_nothing_tells_of_a_change_everything_is_read_again(uploaded, tmp_path, reads, monkeypatch):
    monkeypatch.setattr(remote, "_CHANGING_FACTS", ())
    first = resolve(URL, cache_dir=tmp_path)
    count = len(reads)

    assert resolve(URL, cache_dir=tmp_path).model_id == first.model_id
    assert len(reads) == 2 * count > 0


def test_a_local_folder_by_url(uploaded, tmp_path):
    model = resolve(f"file://{uploaded}", cache_dir=tmp_path)

    assert model.model_id == resolve(str(uploaded), cache_dir=tmp_path).model_id


@pytest.mark.parametrize("name", ["memory://bucket/nowhere", "memory://elsewhere/tiny", "file:///no/where"])
def test_a_folder_that_is_not_there(uploaded, tmp_path, name):
    with pytest.raises(InputError, match=f"There is no {name}"):
        resolve(name, cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("lacking", "sentence"),
    [
        ("config.json", "holds no config.json"),
        ("model.safetensors.index.json", "holds no safetensors weights"),
    ],
)
def test_a_folder_that_lacks_something(uploaded, bucket, tmp_path, lacking, sentence):
    bucket.rm(f"/bucket/models/tiny/{lacking}")

    with pytest.raises(InputError, match=f"{URL} {sentence}"):
        resolve(URL, cache_dir=tmp_path)


def test_a_weights_file_that_is_missing(uploaded, bucket, tmp_path):
    [name] = resolve(URL, cache_dir=tmp_path).checkpoint.files_for(["model.norm.weight"])
    bucket.rm(f"/bucket/models/tiny/{name}")

    with pytest.raises(InputError, match=rf"{URL}/{name} is missing"):
        resolve(URL, cache_dir=tmp_path)


def test_a_file_that_shrinks_while_it_is_read(uploaded, bucket, tmp_path):
    model = resolve(URL, cache_dir=tmp_path)
    [name] = model.checkpoint.files_for(["model.norm.weight"])
    assert model.checkpoint.entry("model.norm.weight").nbytes
    data = bucket.cat_file(f"/bucket/models/tiny/{name}")
    bucket.pipe(f"/bucket/models/tiny/{name}", data[:100])

    with pytest.raises(InputError, match="truncated"):
        list(model.checkpoint.read(["model.norm.weight"]))


def test_a_storage_that_does_not_answer(uploaded, tmp_path, monkeypatch):
    model = resolve(URL, cache_dir=tmp_path)
    answer = threading.Event()
    monkeypatch.setattr(remote, "READ_TIMEOUT", 0.05)
    monkeypatch.setattr(MemoryFileSystem, "cat_file", lambda *_, **__: answer.wait(10))

    with pytest.raises(SwarmError, match=r"cannot be read \(TimeoutError\)"):
        list(model.checkpoint.read(["model.norm.weight"]))
    answer.set()


def test_a_listing_that_does_not_come(uploaded, tmp_path, monkeypatch):
    answer = threading.Event()
    monkeypatch.setattr(remote, "LIST_TIMEOUT", 0.05)
    monkeypatch.setattr(MemoryFileSystem, "ls", lambda *_, **__: answer.wait(10))

    with pytest.raises(SwarmError, match="cannot be read"):
        resolve(URL, cache_dir=tmp_path)
    answer.set()


def failing_with(error: Exception) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


class NoCredentialsError(ValueError):
    """Called as botocore's."""


class OddError(Exception):
    """Of a storage's own package."""


@pytest.mark.parametrize(
    ("error", "kind", "sentence"),
    [
        (PermissionError("Forbidden"), InputError, "may not be read with the credentials"),
        (
            NoCredentialsError("Unable to locate credentials"),
            InputError,
            "may not be read with the credentials",
        ),
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), SwarmError, r"cannot be read \(.*refused\)"),
        (ImportError("Install s3fs to access S3"), InputError, "package that is not installed .Install s3fs"),
        (FileNotFoundError("The specified bucket does not exist"), InputError, "There is no"),
        (OddError("odd"), SwarmError, r"cannot be read \(odd\)"),
    ],
)
def test_what_goes_wrong_is_said_in_a_sentence(uploaded, tmp_path, monkeypatch, error, kind, sentence):
    package = ModuleType("botocore.exceptions")
    package.ClientError = OddError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "botocore.exceptions", package)
    monkeypatch.setattr(MemoryFileSystem, "ls", failing_with(error))

    with pytest.raises(kind, match=sentence) as said:
        resolve(URL, cache_dir=tmp_path)
    assert said.value.hint
    assert said.value.exit_code == (2 if kind is InputError else 1)


def test_an_error_of_our_own_is_not_explained_away(uploaded, tmp_path, monkeypatch):
    monkeypatch.setattr(MemoryFileSystem, "ls", failing_with(TypeError("a bug")))

    with pytest.raises(TypeError, match="a bug"):
        resolve(URL, cache_dir=tmp_path)


def test_a_kind_of_storage_that_nobody_knows(tmp_path):
    with pytest.raises(SwarmError, match=r"cannot be read \(Protocol not known: nonsense\)"):
        resolve("nonsense://bucket/tiny", cache_dir=tmp_path)


def test_a_cache_that_cannot_be_written(uploaded, tmp_path):
    (tmp_path / "file").write_bytes(b"")

    with pytest.raises(InputError, match=r"cache folder .* cannot be used"):
        resolve(URL, cache_dir=tmp_path / "file")


def test_only_the_files_right_in_the_folder_count(uploaded, bucket):
    bucket.pipe("/bucket/models/tiny/more/config.json", b"{}")

    assert set(RemoteStorage.at(URL).names) == {file.name for file in uploaded.iterdir()}
