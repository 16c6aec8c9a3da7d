"""The API over a toy swarm at a real address, in a thread of its own, for clients that know no event loop.

`python -m tests.toy_api` serves it until Ctrl-C.
"""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress

from swarm.client.http.site import ApiSite, SiteOptions
from swarm.listening import bind, serving
from swarm.spans import Span
from tests.byte_tokenizer import byte_tokenizer
from tests.toy_swarm import EOS, letters, toy_swarm

SPANS = {"one": Span(0, 3), "two": Span(3, 6)}
CONTEXT = 64
"""Few tokens, so that whoever asks for all that there is gets it soon."""

START = 60.0


@contextmanager
def toy_api(options: SiteOptions | None = None) -> Iterator[str]:
    """Serve while inside; gives the URL, with a slash at its end."""
    started: Future[tuple[str, asyncio.Event]] = Future()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=(_serve(options, started),))
    thread.start()
    try:
        url, over = started.result(START)
        yield url
    finally:
        if started.done() and started.exception() is None:
            loop.call_soon_threadsafe(over.set)
        thread.join()
        loop.close()


async def _serve(options: SiteOptions | None, started: Future[tuple[str, asyncio.Event]]) -> None:
    over = asyncio.Event()
    try:
        async with toy_swarm(SPANS, next_token=_soon_over, context=CONTEXT, timeout=10.0) as toy:
            toy.ends.tokenizer = byte_tokenizer()  # type: ignore[assignment]
            site = ApiSite(toy.swarm, options)
            async with serving(site.app, bind("127.0.0.1", 0)) as url:
                started.set_result((url, over))
                await over.wait()
            assert site.answers == 0, "every answer must have left its seat"
    except BaseException as error:
        if not started.done():
            started.set_exception(error)
        raise


def _soon_over(total: int, count: int) -> int:
    return EOS if (total + count) % 16 == 0 else letters(total, count)


if __name__ == "__main__":
    with toy_api() as address, suppress(KeyboardInterrupt):
        print(address, flush=True)
        threading.Event().wait()
