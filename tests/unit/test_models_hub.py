"""Models from a hub on loopback: only the needed files, pinned, usable without network afterwards."""

import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from swarm.blocks import hub as hub_room
from swarm.blocks.hub import HubUnreachable
from swarm.blocks.models import resolve
from swarm.errors import InputError
from swarm.spans import Span
from tests.fake_hub import COMMIT, FakeHub, serving

NAME = "someone/tiny-llama"
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 4,
    "hidden_size": 16,
    "vocab_size": 32,
    "tie_word_embeddings": False,
}
SIDES = {"num_attention_heads": 2, "vocab_size": 8, "intermediate_size": 8}
SHARDS = [f"model-0000{shard}-of-00003.safetensors" for shard in (1, 2, 3)]


def shard_of(name: str) -> str:
    """Blocks 0 and 1, blocks 2 and 3, the two ends."""
    block = name.partition("layers.")[2].partition(".")[0]
    return SHARDS[int(block) // 2 if block else 2]


def checkpoint_files(folder: Path) -> dict[str, bytes]:
    """A sharded tiny checkpoint as bytes by file name, along with files that no peer needs."""
    names = [f"model.layers.{block}.mlp.up_proj.weight" for block in range(4)]
    names += ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    folder.mkdir()
    for shard in SHARDS:
        save_file(
            {name: torch.full((8, 16), 1.5) for name in names if shard_of(name) == shard}, folder / shard
        )
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    index = {"weight_map": {name: shard_of(name) for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "consolidated.safetensors").write_bytes(b"not needed")
    (folder / "README.md").write_text("not needed")
    return {path.name: path.read_bytes() for path in folder.iterdir()} | {"original/params.json": b"{}"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    with serving(FakeHub(NAME, checkpoint_files(tmp_path / "origin"))) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_only_the_files_of_the_span_are_downloaded(hub, cache):
    model = resolve(NAME, cache_dir=cache)
    assert set(hub.requests) == {"config.json", "tokenizer.json", "model.safetensors.index.json"}

    model.ensure_files(Span(1, 2), with_head=False)
    assert [name for name in hub.requests if name in SHARDS] == SHARDS[:1]
    assert [name for name, _ in model.checkpoint.read(["model.layers.1.mlp.up_proj.weight"])]

    model.ensure_files(None, with_head=True)
    model.ensure_files(Span(0, 1), with_head=True)
    assert [name for name in hub.requests if name in SHARDS] == [SHARDS[0], SHARDS[2]]
    assert "consolidated.safetensors" not in hub.requests


def test_the_embeddings_come_along_with_the_first_block(hub, cache):
    resolve(NAME, cache_dir=cache).ensure_files(Span(0, 1), with_head=False)

    assert [name for name in hub.requests if name in SHARDS] == [SHARDS[0], SHARDS[2]]


def test_a_repository_of_ranks_is_one_too(hub, cache, tmp_path):
    origin = {
        name: tensor for shard in SHARDS for name, tensor in load_file(tmp_path / "origin" / shard).items()
    }
    save_file(origin, tmp_path / "rank.safetensors")
    for shard in SHARDS:
        del hub.files[shard]
    hub.files["model-rank-0-part-0.safetensors"] = (tmp_path / "rank.safetensors").read_bytes()
    hub.files["config.json"] = json.dumps(CONFIG | SIDES).encode()

    model = resolve(NAME, cache_dir=cache)
    model.ensure_files(Span(1, 2), with_head=False)
    assert set(model.checkpoint.names) == set(origin)


def test_downloading_reports_its_bytes(hub, cache):
    model = resolve(NAME, cache_dir=cache)
    progress: list[tuple[str, float]] = []

    model.ensure_files(Span(0, 4), True, lambda stage, fraction: progress.append((stage, fraction)))

    assert progress == sorted(progress)
    assert len(progress) >= 3
    assert progress[-1] == ("downloading", 1.0)


def test_a_peer_with_all_files_has_the_same_fingerprint_as_one_without(hub, cache, tmp_path):
    remote = resolve(NAME, cache_dir=cache)
    local = resolve(str(tmp_path / "origin"), cache_dir=cache)

    assert remote.model_id == local.model_id
    assert remote.name == NAME
    assert (remote.num_blocks, remote.hidden_size, remote.vocab_size) == (4, 16, 32)


def test_a_known_repository_opens_without_network(hub, cache):
    online = resolve(NAME, cache_dir=cache)
    online.ensure_files(Span(0, 2), with_head=False)
    hub.is_up = False
    offline = resolve(NAME, cache_dir=cache)
    offline.ensure_files(Span(0, 2), with_head=False)

    assert offline.model_id == online.model_id
    assert hub.asked == 1


def test_the_hubs_own_cache_serves_without_network(hub, cache, monkeypatch):
    online = resolve(NAME, cache_dir=cache / "first")
    online.ensure_files(Span(0, 4), with_head=True)
    refs = online.path.parent.parent / "refs"
    refs.mkdir(exist_ok=True)
    (refs / "main").write_text(COMMIT)
    hub.is_up = False
    monkeypatch.setattr("swarm.blocks.fingerprint.sha256_of", lambda *_: pytest.fail("hashed a blob"))

    offline = resolve(NAME, cache_dir=cache / "second")

    assert offline.model_id == online.model_id
    offline.ensure_files(Span(0, 4), with_head=True)


def test_an_incomplete_hub_cache_is_completed_from_the_hub(hub, cache):
    online = resolve(NAME, cache_dir=cache / "first")
    online.ensure_files(Span(0, 2), with_head=False)
    refs = online.path.parent.parent / "refs"
    refs.mkdir(exist_ok=True)
    (refs / "main").write_text(COMMIT)

    assert resolve(NAME, cache_dir=cache / "second").model_id == online.model_id
    assert hub.asked == 2


def test_a_repository_without_hashes_is_downloaded_and_hashed(hub, cache, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.fake_hub._lfs", lambda name, data: {})

    model = resolve(NAME, cache_dir=cache)

    assert model.model_id == resolve(str(tmp_path / "origin"), cache_dir=cache).model_id


def test_a_revision_can_be_named(hub, cache):
    assert resolve(f"{NAME}@{COMMIT}", cache_dir=cache).model_id == resolve(NAME, cache_dir=cache).model_id
    with pytest.raises(InputError, match="no model"):
        resolve(f"{NAME}@elsewhere", cache_dir=cache)


def test_a_weights_file_that_does_not_arrive(hub, cache):
    model = resolve(NAME, cache_dir=cache)
    del hub.files[SHARDS[0]]

    with pytest.raises(HubUnreachable, match="cannot be reached"):
        model.ensure_files(Span(0, 1), with_head=False)


def test_an_index_that_names_a_file_the_repository_lacks(hub, cache):
    del hub.files[SHARDS[1]]

    with pytest.raises(InputError, match=r"names the weights file model-00002-of-00003\.safetensors"):
        resolve(NAME, cache_dir=cache)


@pytest.mark.parametrize("name", ["someone/else", "someone/tiny--llama", "a/..", f"{'x' * 200}/y"])
def test_a_repository_that_does_not_exist(hub, cache, name):
    with pytest.raises(InputError, match="no model"):
        resolve(name, cache_dir=cache)


@pytest.mark.parametrize(
    ("present", "sentence"),
    [
        (["config.json", "pytorch_model.bin"], "pickle"),
        (["config.json"], "no safetensors weights"),
        (["model.safetensors"], "no config.json"),
    ],
)
def test_a_repository_that_is_no_model(hub, cache, present, sentence):
    hub.files = {name: hub.files.get(name, b"x") for name in present}

    with pytest.raises(InputError, match=sentence):
        resolve(NAME, cache_dir=cache)


def test_a_hub_that_refuses_connections(hub, cache, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(HubUnreachable, match="cannot be reached") as caught:
            resolve(NAME, cache_dir=cache)
    assert "local folder" in caught.value.hint


def test_a_hub_that_never_answers(hub, cache, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{mute.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(HubUnreachable, match="cannot be reached"):
            hub_room.find(NAME, "main", cache, timeout=0.1)
    assert time.monotonic() - started < 1.0


@pytest.mark.parametrize("answer", ["<html>log in</html>", "{}", "[]", '{"id": "x", "sha": "../.."}'])
def test_a_hub_that_answers_nonsense(hub, cache, monkeypatch, answer):
    monkeypatch.setattr(FakeHub, "metadata", lambda self: answer)
    monkeypatch.setattr("tests.fake_hub.json.dumps", lambda value: value)

    with pytest.raises(HubUnreachable):
        resolve(NAME, cache_dir=cache)


def test_offline_mode_asks_nobody(hub, cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    with pytest.raises(HubUnreachable, match="HF_HUB_OFFLINE"):
        resolve(NAME, cache_dir=cache)
    assert hub.asked == 0


def test_a_garbled_pin_is_asked_for_again(hub, cache):
    resolve(NAME, cache_dir=cache)
    [pin] = (cache / "hub").glob("*.json")
    for garbage in ("", "[]", '{"files": 3}', '{"files": {"a": {"b": 1}}}'):
        pin.write_text(garbage)
        assert resolve(NAME, cache_dir=cache).num_blocks == 4
    assert hub.asked == 5


def test_a_folder_of_the_same_name_wins(hub, cache, tmp_path, monkeypatch):
    (tmp_path / "someone").mkdir()
    os.symlink(tmp_path / "origin", tmp_path / "someone" / "tiny-llama")
    monkeypatch.chdir(tmp_path)

    resolve(NAME, cache_dir=cache)

    assert hub.asked == 0
