"""Computing anew what evidence says that a hop got wrong, in float32, and judging by the evidence alone.

What is accused must differ from the true results by more than honest peers do that compute as the hop claims
to, on inputs as sensitive as these: who accuses may have chosen some by which the least rounding grows out of
all proportion, and nobody is to be convicted by those.
"""

import asyncio
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swarm.blocks.engine import Engine, EngineConfig
from swarm.blocks.head import Head
from swarm.blocks.models import resolve
from swarm.client.evidence import Evidence, load
from swarm.client.gaps import gaps
from swarm.client.joining import OnProgress
from swarm.client.sensitivity import jittered, sensitivity
from swarm.client.verdict import TRUE, allowance
from swarm.errors import InputError
from swarm.kernels.codecs import from_wire, to_wire
from swarm.kernels.imprint import difference, projected
from swarm.net.vouchers import Voucher
from swarm.page_keys import PAGE_TOKENS
from swarm.spans import Span

CHUNK = 128
"""Positions that are computed at once."""

SESSION = "evidence"


@dataclass(frozen=True)
class Finding:
    """What came of examining evidence.

    The accused is at a distance of `apart` from the true results, where it may be at one of `allowed`: more
    than usual if differences in these inputs grow, `growth` times. For tokens the distances are their gaps.
    """

    accused: str
    auditor: str
    span: Span
    dtype: str
    apart: float
    allowed: float
    growth: float

    @property
    def holds(self) -> bool:
        return self.apart > self.allowed

    def __str__(self) -> str:
        form = f"blocks {self.span}, which it says it computes in {self.dtype}"
        if self.holds:
            return (
                f"The evidence holds: peer {self.accused} gave wrong results for {form}."
                f" They are {self.apart:.2g} from the true ones, where {self.allowed:.2g} is allowed."
            )
        return (
            f"The evidence does not hold: what peer {self.accused} gave for {form}"
            f" is {self.apart:.2g} from the true results, where {self.allowed:.2g} is allowed."
            f" (Differences in these inputs grow {self.growth:.2g} times.)"
        )

    def as_json(self) -> dict[str, Any]:
        """The contract of `--json`."""
        return {
            "holds": self.holds,
            "accused": self.accused,
            "auditor": self.auditor,
            "blocks": list(self.span),
            "dtype": self.dtype,
            "distance": self.apart,
            "allowed": self.allowed,
            "growth": self.growth,
        }


async def examine(path: Path, name: str, on_progress: OnProgress) -> Finding:
    """Whether the evidence at `path` holds, by the weights of the model called `name`.

    Raises:
        InputError: it cannot be read, is void, or is about another model.
    """
    evidence = await asyncio.to_thread(load, path)
    voucher = evidence.checked()
    model = await asyncio.to_thread(partial(resolve, name, on_progress=on_progress))
    if model.model_id != voucher.model_id or evidence.width != model.hidden_size:
        raise InputError(
            f"The evidence is about another model than {name}: {voucher.model_id[:100]}.",
            "Give the one it is about with --model.",
        )
    if max((*evidence.tokens, *evidence.ids), default=0) >= model.vocab_size:
        raise InputError(f"The evidence is void: it names tokens that {name} does not have.")
    span = Span(voucher.start, voucher.end)
    model.check_span(span)
    needs_ends = voucher.brings_ids or voucher.kind == "token_ids"
    await asyncio.to_thread(model.ensure_files, span, needs_ends, on_progress)
    head = await asyncio.to_thread(Head.load, model, "float32") if needs_ends else None
    room = -(-voucher.until // PAGE_TOKENS) * PAGE_TOKENS
    config = EngineConfig(dtype="float32", kv_tokens=room)
    engine = await Engine.load(model, span, config, partial(on_progress, "loading"))
    try:
        return await _compared(evidence, voucher, engine, head)
    finally:
        engine.close()


async def _compared(evidence: Evidence, voucher: Voucher, engine: Engine, head: Head | None) -> Finding:
    brought = evidence.inputs(voucher)
    if brought is not None:
        given = from_wire(*brought).float()
    else:
        assert head is not None
        given = head.embed(torch.tensor(evidence.tokens)).float()
    rows = slice(voucher.first, voucher.until)
    true = (await _run(engine, given))[rows]
    moved = (await _run(engine, jittered(given)))[rows]
    found = sensitivity(given[rows], true, moved)
    form = voucher.dtype, voucher.quantization
    allowed = found.of(allowance([form, TRUE], voucher.codec, voucher.end - voucher.start))
    if voucher.kind == "token_ids":
        assert head is not None
        apart, limit = max(gaps(head.logits(true), evidence.ids)), allowed.gap
    else:
        kept = projected(true.numpy())
        apart, limit = max(difference(voucher.imprint, kept, voucher.first)), allowed.mean
    span = Span(voucher.start, voucher.end)
    return Finding(voucher.peer, evidence.auditor, span, " ".join(form), apart, limit, found.growth)


async def _run(engine: Engine, hidden: Tensor) -> Tensor:
    """What the blocks make of hidden states [positions, hidden], all positions."""
    engine.open_session(SESSION, engine.span, len(hidden))
    given = []
    for start in range(0, len(hidden), CHUNK):
        part = hidden[start : start + CHUNK]
        done = await engine.step(
            SESSION, start, to_wire(part, "float32"), tuple(part.shape), "float32", "raw"
        )
        given.append(from_wire(done.data, done.shape, done.dtype, done.codec).float())
    engine.close_session(SESSION)
    return torch.cat(given)
