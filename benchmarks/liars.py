"""Engines that give wrong results, each kind of liar one: they look like the honest ones they stand for."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from swarm.blocks.engine import Engine, EngineConfig
from swarm.blocks.models import Model
from swarm.kernels.codecs import from_wire, to_wire
from swarm.spans import Span

KINDS = ("other weights", "int8 as float32", "a block left out", "noise", "zeros", "old results")


class Liar:
    """Wraps an engine. Everything but `step` is the engine's own; `says` is what it claims to compute in."""

    def __init__(self, engine: Engine, says: Any = None):
        self._engine = engine
        self._says = says

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    @property
    def precision(self) -> Any:
        return self._says or self._engine.precision

    @property
    def gives_token_ids(self) -> bool:
        return False

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            super().__setattr__(name, value)
        else:
            setattr(self._engine, name, value)

    async def measure(self) -> tuple[float, float]:
        """So fast that all routes lead here."""
        return 1e6, 1e8

    async def step(self, session_id: str, seq_pos: int, *args: Any, **kwargs: Any) -> Any:
        done = await self._engine.step(session_id, seq_pos, *args, **kwargs)
        if done.dtype == "uint32":
            return done
        form = done.dtype, done.codec
        hidden = self.spoiled(from_wire(done.data, done.shape, *form).float().clone())
        return replace(done, data=to_wire(hidden, *form))

    def spoiled(self, hidden: Tensor) -> Tensor:
        return hidden


class Noisy(Liar):
    """Adds noise, of that part of a row's mean size, to one row of so many."""

    def __init__(self, engine: Engine, size: float = 0.1, every: int = 1):
        super().__init__(engine)
        self._size = size
        self._every = every
        self._rng = torch.Generator().manual_seed(0)

    def spoiled(self, hidden: Tensor) -> Tensor:
        noise = torch.randn(hidden.shape, generator=self._rng) * hidden.abs().mean(-1, keepdim=True)
        hidden[:: self._every] += (self._size * noise)[:: self._every]
        return hidden


class Inventing(Liar):
    """Gives noise of the results' size."""

    def __init__(self, engine: Engine):
        super().__init__(engine)
        self._rng = torch.Generator().manual_seed(0)

    def spoiled(self, hidden: Tensor) -> Tensor:
        return torch.randn(hidden.shape, generator=self._rng) * hidden.abs().mean(-1, keepdim=True)


class Idle(Liar):
    """Gives the hidden states that it was brought, as blocks do whose weights are zero."""

    async def step(self, session_id: str, seq_pos: int, *args: Any, **kwargs: Any) -> Any:
        done = await self._engine.step(session_id, seq_pos, *args, **kwargs)
        return replace(done, data=to_wire(from_wire(*args), done.dtype, done.codec))


class Zeroing(Liar):
    """Gives a tenth of the channels as nothing."""

    def spoiled(self, hidden: Tensor) -> Tensor:
        hidden[:, : max(1, hidden.shape[1] // 10)] = 0
        return hidden


class Replaying(Liar):
    """Gives the rows that it gave before, where it has as many."""

    def __init__(self, engine: Engine):
        super().__init__(engine)
        self._old: dict[int, Tensor] = {}

    def spoiled(self, hidden: Tensor) -> Tensor:
        return self._old.setdefault(len(hidden), hidden)


class Skipping(Liar):
    """Leaves out the last of its blocks, and so serves sessions one block shorter than they ask."""

    def open_session(self, session_id: str, span: Span, *args: Any, **kwargs: Any) -> Any:
        return self._engine.open_session(
            session_id, Span(span.start, max(span.start + 1, span.end - 1)), *args, **kwargs
        )


async def liar(kind: str, model: Model, other: Model, span: Span, config: EngineConfig) -> Any:
    """An engine of that kind for `span` of `model`; `other` is one of the same shape and other weights."""
    if kind == "other weights":
        return Liar(await Engine.load(other, span, config))
    if kind == "int8 as float32":
        honest = await Engine.load(model, span, config)
        says = honest.precision
        honest.close()
        return Liar(await Engine.load(model, span, replace(config, quantize="int8")), says)
    makers = {"noise": Noisy, "zeros": Zeroing, "old results": Replaying, "a block left out": Skipping}
    return makers[kind](await Engine.load(model, span, config))
