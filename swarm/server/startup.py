"""Starting a server: its model, its network and its engine, each from the room that owns it.

Only here, and late, what is heavy is imported: a server must be listed within seconds of its start, and
torch's models take longer than that. Imports run in threads, beside the work that does not need them.
"""

import asyncio
import importlib
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import cache, partial
from typing import Any

from swarm.blocks.errors import DoesNotFit
from swarm.blocks.hardware import hardware
from swarm.blocks.models import Model, resolve
from swarm.cache import cache_folder
from swarm.cli import Progress
from swarm.dht.announcement import ModelEntry
from swarm.dht.joining import import_network
from swarm.errors import InputError, SwarmError
from swarm.importing import importing
from swarm.server.cell import OnProgress
from swarm.server.config import ServerConfig
from swarm.server.entering import enter, way_in
from swarm.server.events import Events, JsonEvents, TextEvents
from swarm.server.evicting import requests
from swarm.server.gauge import Gauge, Setting
from swarm.server.invite import Invite
from swarm.server.lives import Lives
from swarm.server.server import Shard
from swarm.server.sizing import clearly_fits
from swarm.server.span_engine import SpanEngine
from swarm.server.stopping import Stopping, unless
from swarm.server.threads import cores, default_threads, servers_here
from swarm.spans import Span
from swarm.version import VERSION

logger = logging.getLogger(__name__)

FETCH_SHARE = 0.5
"""The part of loading's progress that downloading counts for, where there is something to download."""


async def serve(config: ServerConfig, stopping: Stopping, *, as_json: bool) -> None:
    """Be a server until asked to stop.

    Raises:
        InputError: the model, the blocks, the identity, an address or a port cannot be used.
        SwarmError: the swarm cannot be reached, or this peer's network failed. Both may come in groups.
    """
    async with AsyncExitStack() as stack:
        evictions = stack.enter_context(requests())
        lives = await unless(stopping.asked, _start(config, stack, as_json=as_json))
        if lives is not None:
            await lives.run(stopping.asked, evictions)
    stopping.has_left = True


async def _start(config: ServerConfig, stack: AsyncExitStack, *, as_json: bool) -> Lives:
    identity, entrance = await way_in(config)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(import_network(), name="import the network")
        finding = tasks.create_task(_find_models(config, quiet=as_json), name="find the models")
    found = finding.result()
    if config.blocks is None and any(span.size < model.num_blocks for model, span in found):
        beside = await stack.enter_async_context(asyncio.TaskGroup())
        beside.create_task(asyncio.to_thread(_import_engine), name="import the engine")
    network = await enter(stack, config, identity, entrance)
    invite = Invite.of(config, entrance)

    def events_of(index: int) -> Events:
        if as_json:
            return JsonEvents(invite)
        model, _ = found[index]
        return TextEvents(model.name, config.blocks, model.num_blocks, is_first=network.is_new, invite=invite)

    return Lives(
        [await asyncio.to_thread(_shard, config, model, span) for model, span in found],
        network,
        events_of,
        name=config.public_name,
        evict_after=config.evict_after,
        metrics_port=config.metrics_port,
    )


def _shard(config: ServerConfig, model: Model, span: Span) -> Shard:
    return Shard(
        _entry(model),
        model.hidden_size,
        span,
        partial(_load, config, model),
        is_fixed=config.blocks is not None,
        gauge=_gauge(config, model, span),
        fits_beside=partial(_fits_beside, config, model),
        dtype=config.dtype,
        quantization=config.quantize,
    )


def _gauge(config: ServerConfig, model: Model, span: Span) -> Gauge:
    setting = Setting(
        hardware=hardware(),
        model_id=model.model_id,
        blocks=span.size,
        dtype=config.dtype,
        quantization=config.quantize,
        device=config.device,
        threads=config.threads or _threads(),
        version=VERSION,
    )
    return Gauge(setting, cache_folder() / "speed")


async def _find_models(config: ServerConfig, *, quiet: bool) -> list[tuple[Model, Span]]:
    """The models to choose from, and the blocks to serve of each; where these are to be chosen, as many as it
    will be. Those of which not one block fits here are left out.

    Raises:
        InputError: a model cannot be found or used, does not have these blocks, is named twice, or none fits.
    """
    if not config.models:
        return [await _find_model(config, config.model, quiet=quiet)]
    found: dict[str, tuple[Model, Span]] = {}
    reason: DoesNotFit | None = None
    for name in config.models:
        try:
            model, span = await _find_model(config, name, quiet=quiet)
        except DoesNotFit as error:
            logger.warning("%s is left out: %s", name, error)
            reason = error
            continue
        if model.model_id in found:
            same, _ = found[model.model_id]
            raise InputError(f"{same.name} and {name} are the same model.", "Name each one once.")
        found[model.model_id] = model, span
    if reason is not None and not found:
        raise reason
    return list(found.values())


async def _find_model(config: ServerConfig, name: str, *, quiet: bool) -> tuple[Model, Span]:
    with Progress(quiet=quiet) as progress:
        model = await asyncio.to_thread(resolve, name, on_progress=_bars(progress))
    count = config.num_blocks or (0 if config.blocks else await _most_blocks(config, model))
    if config.models:
        count = min(count, model.num_blocks)
    span = config.blocks or Span(0, count)
    model.check_span(span)
    return model, span


async def _most_blocks(config: ServerConfig, model: Model) -> int:
    if clearly_fits(model, config):
        return model.num_blocks
    blocks = await asyncio.to_thread(_import_engine)
    found: int = await asyncio.to_thread(blocks.blocks_that_fit, model, _engine_config(blocks, config))
    logger.info("%d of %d blocks of %s fit here", found, model.num_blocks, model.name)
    return found


def _bars(progress: Progress) -> Callable[[str, float], None]:
    """A bar for each stage of finding a model, made when it begins."""
    bars: dict[str, OnProgress] = {}

    def on_progress(stage: str, fraction: float) -> None:
        if stage not in bars:
            bars[stage] = progress.stage(f"{stage.capitalize()} the model")
        bars[stage](fraction)

    return on_progress


async def _load(
    config: ServerConfig,
    model: Model,
    span: Span,
    on_progress: OnProgress,
    *,
    kv_tokens: int | None = None,
) -> SpanEngine:
    """Fetch the files that hold the span, and fill an engine from them, with KV for `kv_tokens` if that is
    given.

    Raises:
        InputError: the files cannot be had or used, or the device cannot.
        SwarmError: the shard does not fit into memory.
    """
    fetched = 0.0

    def on_fetch(stage: str, fraction: float) -> None:
        nonlocal fetched
        fetched = FETCH_SHARE
        on_progress(fraction * FETCH_SHARE)

    await asyncio.to_thread(model.ensure_files, span, False, on_fetch)
    blocks = await asyncio.to_thread(_import_engine)
    threads = config.threads or await asyncio.to_thread(_threads)
    wanted = _engine_config(blocks, config, kv_tokens=kv_tokens or config.kv_tokens, threads=threads)
    try:
        engine: SpanEngine = await blocks.Engine.load(
            model, span, wanted, lambda fraction: on_progress(fetched + fraction * (1 - fetched))
        )
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise SwarmError(
            f"Blocks {span} of {model.name} do not fit into this machine's memory.",
            "Serve fewer blocks, or use a smaller --dtype.",
        ) from error
    return engine


async def _fits_beside(config: ServerConfig, model: Model, span: Span, kv_tokens: int) -> bool:
    """Whether as many blocks as `span` has, with KV for `kv_tokens`, fit beside all that is loaded here."""
    blocks = await asyncio.to_thread(_import_engine)
    wanted = _engine_config(blocks, config, kv_tokens=kv_tokens)
    try:
        fitting: int = await asyncio.to_thread(blocks.blocks_that_fit, model, wanted)
    except InputError:
        return False
    return fitting >= span.size


def _engine_config(blocks: Any, config: ServerConfig, **changes: int | None) -> Any:
    asked: dict[str, Any] = {
        "dtype": config.dtype,
        "device": config.device,
        "quantize": config.quantize,
        "kv_tokens": config.kv_tokens,
        "memory_limit": config.memory_limit,
        "max_vram": config.max_vram,
        "overcommit": config.kv_overcommit,
        "prefix_cache": config.prefix_cache,
    }
    return blocks.EngineConfig(**asked | changes)


@cache
def _import_engine() -> Any:
    with importing():
        return importlib.import_module("swarm.blocks.engine")


def _threads() -> int:
    """This server's share of the cores, counted anew for each load."""
    servers, count = servers_here(), cores()
    threads = default_threads(count, servers)
    logger.info("%d threads compute here: %d servers share %d cores", threads, servers, count)
    return threads


def _is_out_of_memory(error: Exception) -> bool:
    """torch tells of full memory by a RuntimeError, with one of two texts."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "allocate memory" in text or "out of memory" in text


def _entry(model: Model) -> ModelEntry:
    return ModelEntry(
        model_id=model.model_id,
        name=model.public_name[:100],
        num_blocks=model.num_blocks,
        fingerprint=model.fingerprint,
    )
