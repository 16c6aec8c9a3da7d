"""The command `serve`: the API of one model, from joining the swarm until a signal.

Puts the parts together in order. What they do is not known here.
"""

import argparse
import asyncio
import logging
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from swarm import cli
from swarm.client.facade import Swarm
from swarm.client.http.access import is_loopback
from swarm.client.http.site import ApiSite, SiteOptions
from swarm.client.terminal import joined_swarm
from swarm.errors import InputError, reason_of
from swarm.listening import bind, serving

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)


async def main(args: argparse.Namespace) -> int:
    """Answer until a signal.

    Raises:
        InputError: the keys, the host or the port cannot be used.
        SwarmError: no route came up, or this client's network failed.
    """
    options = await asyncio.to_thread(site_options, args)
    if not (options.is_local or options.keys):
        logger.warning("Whoever reaches %s may ask: no --api-key was given.", args.host)
    with closing(await asyncio.to_thread(bind, args.host, args.port)) as bound:
        async with joined_swarm(args) as swarm:
            site = ApiSite(swarm, options)
            async with serving(site.app, bound, site.close) as url:
                with _stopping() as stop:
                    _say(args, swarm.model.name, url)
                    await _until_over(swarm, stop)
    return 0


async def _until_over(swarm: Swarm, stop: asyncio.Event) -> None:
    """
    Raises:
        SwarmError: this client's network failed before `stop`.
    """
    failing = asyncio.create_task(swarm.wait_failed(), name="watch this client's network")
    stopping = asyncio.create_task(stop.wait(), name="wait for a signal")
    try:
        await asyncio.wait((failing, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not stop.is_set():
            raise failing.result()
    finally:
        failing.cancel()
        stopping.cancel()


def site_options(args: argparse.Namespace) -> SiteOptions:
    """
    Raises:
        InputError: the file with the keys cannot be read or holds none, or a key is none.
    """
    keys = [*args.api_key, *(_keys_of(args.api_key_file) if args.api_key_file else ())]
    if not all(map(_is_sendable, keys)):
        raise InputError(
            "An API key is empty, or has characters that no request can send.",
            "Use letters, digits and signs of ASCII, without blanks at the ends.",
        )
    return SiteOptions(
        given_name=args.model,
        keys=tuple(keys),
        cors_origins=tuple(args.cors_origin),
        max_answers=args.max_answers,
        default_tokens=args.default_tokens,
        patience=args.patience,
        is_local=is_loopback(args.host),
    )


def _is_sendable(key: str) -> bool:
    return bool(key) and key == key.strip() and key.isascii() and key.isprintable()


def _keys_of(path: Path) -> list[str]:
    try:
        keys = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"The keys in {path} cannot be read: {reason_of(error)}.",
            "Write a text file with a key a line.",
        ) from error
    if not keys:
        raise InputError(f"There are no keys in {path}.", "Write one a line, or leave --api-key-file out.")
    return keys


@contextmanager
def _stopping() -> Iterator[asyncio.Event]:
    """Set by the first SIGTERM or SIGINT; a second one cancels the command, which ends with its number."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    task = asyncio.current_task()
    assert task is not None

    def on_signal() -> None:
        if stop.is_set():
            task.cancel()
        stop.set()

    for number in SIGNALS:
        loop.add_signal_handler(number, on_signal)
    yield stop


def _say(args: argparse.Namespace, model: str, page: str) -> None:
    url = f"{page}v1"
    if args.json:
        cli.emit({"event": "listening", "url": url, "page": page, "model": model})
    else:
        print(f"{model} answers at {url}; chat with it at {page}", flush=True)
