"""The library's front door: `connect` for async code, `connect_sync` for scripts and notebooks."""

import asyncio
from collections.abc import Callable, Coroutine, Generator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from swarm.client.blocking import BlockingSwarm
from swarm.client.draft_model import DraftModel
from swarm.client.facade import PAGE_SECRET, Chat, Swarm
from swarm.client.generation import Generation, TextStream
from swarm.client.joining import OnProgress, join_with_model
from swarm.client.options import SessionKeywords, SessionOptions
from swarm.client.routes import OnWaiting
from swarm.net.entrance import entrance

__all__ = ["BlockingSwarm", "Chat", "Generation", "Swarm", "TextStream", "connect", "connect_sync"]


class Connecting(AbstractAsyncContextManager[Swarm]):
    """What `connect` gives: await it for a `Swarm`, or enter it with `async with`."""

    def __init__(self, joining: Callable[[], Coroutine[Any, Any, Swarm]]):
        self._joining = joining
        self._swarm: Swarm | None = None

    def __await__(self) -> Generator[Any, None, Swarm]:
        return self._joining().__await__()

    async def __aenter__(self) -> Swarm:
        self._swarm = await self._joining()
        return self._swarm

    async def __aexit__(self, *failure: object) -> None:
        if self._swarm is not None:
            await self._swarm.close()


def connect(
    initial_peers: Sequence[str] | str,
    model: str = "smollm2-135m",
    *,
    timeout: float = 60.0,
    identity: Path | str | None = None,
    swarm_key: Path | str | None = None,
    allow_peers: Path | None = None,
    block_peers: Path | None = None,
    remembers: bool = True,
    dtype: str = "auto",
    draft_model: str | None = None,
    on_waiting: OnWaiting = lambda reason: None,
    on_progress: OnProgress | None = None,
    **sessions: Unpack[SessionKeywords],
) -> Connecting:
    """Join the swarm of `initial_peers` and wait until its servers cover `model`.

    Use it as `async with connect(...) as swarm`, or `swarm = await connect(...)` and close it yourself.

    Args:
        initial_peers: multiaddrs of servers, as they print them, or an invitation.
        model: an alias, a hub repository or a local folder.
        timeout: seconds that a route through all blocks is waited for, now and for each session.
        identity: the file with this peer's key; a new identity each time without one.
        swarm_key: the file with the key of a private swarm, unless an invitation has it.
        allow_peers: a file of the only peers to have to do with, one id a line.
        block_peers: a file of peers to have nothing to do with.
        remembers: whether to join by peers that were there before where nobody else answers.
        dtype: of embeddings and head on this machine, as for a server.
        draft_model: a small model with the same vocabulary, named as `model` is, that runs on this machine
            and drafts tokens for the swarm to verify; without one, drafts come from the text before.
        on_waiting: called with the reason while a route is waited for.
        on_progress: called, from any thread, with the stage of finding the model and its done fraction.
        sessions: how sessions travel: see `swarm.client.options.SessionOptions`.

    Raises:
        InputError: an option, the model, the draft model, an address or the key cannot be used.
        NoRoute: within `timeout` no route came up; says what is missing and who is loading.
        SwarmError: no initial peer can be reached.
    """
    options = SessionOptions(**sessions)
    peers = (initial_peers,) if isinstance(initial_peers, str) else tuple(initial_peers)

    async def joined() -> Swarm:
        way_in = await asyncio.to_thread(
            partial(entrance, peers, swarm_key, allow_peers, block_peers, remembers=remembers)
        )
        async with AsyncExitStack() as stack:
            network, found, head = await join_with_model(
                stack, way_in, model, identity=identity, dtype=dtype, on_progress=on_progress
            )
            drafts = None
            if draft_model is not None:
                load = partial(DraftModel.load, draft_model, head.tokenizer, found.vocab_size)
                drafts = await asyncio.to_thread(load)
                stack.callback(drafts.close)
            swarm = Swarm(
                network.transport,
                network.store,
                found,
                head,
                secret=network.identity.secret(PAGE_SECRET),
                identity=network.identity,
                is_private=way_in.door.key is not None,
                timeout=timeout,
                sessions=options,
                draft_model=drafts,
                on_waiting=on_waiting,
                resources=stack.pop_all(),
            )
            stack.push_async_callback(swarm.close)
            await swarm.start()
            await swarm.wait_for_route()
            stack.pop_all()
        return swarm

    return Connecting(joined)


def connect_sync(
    initial_peers: Sequence[str] | str,
    model: str = "smollm2-135m",
    *,
    timeout: float = 60.0,
    identity: Path | str | None = None,
    swarm_key: Path | str | None = None,
    allow_peers: Path | None = None,
    block_peers: Path | None = None,
    remembers: bool = True,
    dtype: str = "auto",
    draft_model: str | None = None,
    on_waiting: OnWaiting = lambda reason: None,
    on_progress: OnProgress | None = None,
    **sessions: Unpack[SessionKeywords],
) -> BlockingSwarm:
    """`connect` for code that is not async; works where an event loop already runs, as in a notebook.

    The client lives on a thread of its own, on which the callbacks are called. Use it as
    `with connect_sync(...) as swarm`, or close it yourself.
    """

    async def joined() -> Swarm:
        return await connect(
            initial_peers,
            model,
            timeout=timeout,
            identity=identity,
            swarm_key=swarm_key,
            allow_peers=allow_peers,
            block_peers=block_peers,
            remembers=remembers,
            dtype=dtype,
            draft_model=draft_model,
            on_waiting=on_waiting,
            on_progress=on_progress,
            **sessions,
        )

    return BlockingSwarm(joined)
