"""What a server finds out about its machine before it says so to others."""

import pytest

from swarm.blocks import memory
from swarm.blocks.models import resolve
from swarm.page_keys import PAGE_TOKENS
from swarm.server import startup
from swarm.server.config import ServerConfig
from swarm.spans import Span

MIB = 2**20


@pytest.mark.parametrize(
    ("limit", "kv_tokens", "fits"),
    [(2048 * MIB, PAGE_TOKENS, True), (2048 * MIB, 2**24, False), (401 * MIB, PAGE_TOKENS, False)],
)
async def test_whether_as_many_blocks_fit_beside_what_the_process_holds(
    checkpoint_of, tmp_path, monkeypatch, limit, kv_tokens, fits
):
    model = resolve(str(checkpoint_of("Llama")[0]), cache_dir=tmp_path)
    monkeypatch.setattr(memory, "_available", lambda: 8192 * MIB)
    monkeypatch.setattr(memory, "_taken", lambda: 400 * MIB)
    config = ServerConfig(model.name, memory_limit=limit, kv_tokens=8)
    shard = startup._shard(config, model, Span(1, 4))
    assert await shard.fits_beside(Span(1, 4), kv_tokens) == fits
