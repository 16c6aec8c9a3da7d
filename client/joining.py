"""Joining a swarm as a client: the network, and the ends of a model beside it, since both take seconds.

The heavy rooms are imported off the event loop, when they are needed.
"""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swarm.client.concurrently import concurrently
from swarm.dht.joining import Network, join
from swarm.importing import imported
from swarm.net.entrance import Entrance

if TYPE_CHECKING:
    from swarm.blocks.head import Head
    from swarm.blocks.models import Model

__all__ = ["Network", "OnProgress", "join", "join_with_model", "load_ends"]

OnProgress = Callable[[str, float], None]
"""Called, from any thread, with the stage that finding and loading the model is in, and its done fraction."""


async def load_ends(name: str, dtype: str, on_progress: OnProgress | None) -> "tuple[Model, Head]":
    """Find the model and load its tokenizer, embeddings and head, off the event loop.

    Raises:
        InputError: the model cannot be found, or its files cannot be used.
    """
    models = await imported("swarm.blocks.models")
    model = await asyncio.to_thread(partial(models.resolve, name, on_progress=on_progress))
    if on_progress is not None:
        await asyncio.to_thread(model.ensure_files, None, True, on_progress)
    heads = await imported("swarm.blocks.head")
    return model, await asyncio.to_thread(heads.Head.load, model, dtype)


async def join_with_model(
    stack: AsyncExitStack,
    entrance: Entrance,
    name: str,
    *,
    identity: Path | str | None = None,
    dtype: str = "auto",
    on_progress: OnProgress | None = None,
) -> "tuple[Network, Model, Head]":
    """`join` and `load_ends` at the same time."""
    work: list[Coroutine[Any, Any, Any]] = [
        join(stack, entrance, identity),
        load_ends(name, dtype, on_progress),
    ]
    network, (model, head) = await concurrently(*work)
    return network, model, head
