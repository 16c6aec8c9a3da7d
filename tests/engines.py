"""Engines on tiny models, and steps of their sessions as tensors."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import torch
from torch import Tensor

from swarm.blocks.engine import Engine, EngineConfig
from swarm.blocks.models import Model
from swarm.kernels.codecs import from_wire, to_wire
from swarm.page_keys import PAGE_TOKENS
from swarm.spans import Span

WHOLE = Span(0, 6)
PAGES = 24


@asynccontextmanager
async def engine_of(model: Model, span: Span = WHOLE, **options: Any) -> AsyncIterator[Engine]:
    """An engine that must have every page back once its sessions are closed."""
    options = {"kv_tokens": PAGES * PAGE_TOKENS, "dtype": "float32", **options}
    engine = await Engine.load(model, span, EngineConfig(device="cpu", **options))
    try:
        yield engine
        engine.check_integrity()
        assert engine.stats.kv_pages_used == 0
        assert engine.queue == 0
    finally:
        engine.close()


async def step(
    engine: Engine,
    session: str,
    seq_pos: int,
    hidden: Tensor,
    keys: bytes = b"",
    *,
    rows: int = 0,
    wire: str = "exact",
) -> Tensor:
    """What a step of `hidden` gives, where the session was opened with that `wire`."""
    form = engine.wire_form(wire)
    data = to_wire(hidden, form.wire_dtype, form.codec)
    done = await engine.step(
        session, seq_pos, data, tuple(hidden.shape), form.wire_dtype, form.codec, page_keys=keys, rows=rows
    )
    assert (done.dtype, done.codec) == (form.wire_dtype, form.codec)
    return from_wire(done.data, done.shape, done.dtype, done.codec)


async def step_ids(
    engine: Engine, session: str, seq_pos: int, ids: list[int], *, wire: str = "exact"
) -> Tensor:
    """What a step of token ids gives."""
    done = await engine.step(session, seq_pos, as_bytes(ids), (len(ids),), "uint32", "raw")
    assert (done.dtype, done.codec) == tuple(vars(engine.wire_form(wire)).values())
    return from_wire(done.data, done.shape, done.dtype, done.codec)


async def likeliest(engine: Engine, session: str, seq_pos: int, ids: list[int], rows: int) -> list[int]:
    """The likeliest token after each of the last `rows` of a step of token ids."""
    done = await engine.step(
        session, seq_pos, as_bytes(ids), (len(ids),), "uint32", "raw", response_type="token_ids", rows=rows
    )
    assert (done.dtype, done.codec, done.shape) == ("uint32", "raw", (rows or len(ids),))
    tokens: list[int] = memoryview(done.data).cast("B").cast("I").tolist()
    return tokens


def as_bytes(ids: list[int]) -> bytes:
    return torch.tensor(ids, dtype=torch.int32).numpy().tobytes()
