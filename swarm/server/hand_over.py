"""Giving what a session holds to another server, so that nothing of it has to be computed again.

The KV memory goes straight there, some pages at a time, over a stream of its own.
"""

import asyncio

from swarm.net.calls import MessageStream
from swarm.net.messages import Adopt, Feed, HandOver
from swarm.net.transport import PeerId, Transport
from swarm.page_keys import PAGE_TOKENS
from swarm.server.span_engine import SpanEngine

PIECE_BYTES = 4 * 1024 * 1024
"""About how much is sent at a time."""

MAX_PIECE_BYTES = 64 * 1024 * 1024
"""What is taken at a time: one page of the largest models has more than `PIECE_BYTES`."""

DEADLINE = 25.0
PIECE_DEADLINE = 15.0
"""Seconds for all of it, and for one piece."""


async def hand_over(
    transport: Transport, engine: SpanEngine, session_id: str, tokens: int, asked: HandOver
) -> None:
    """Bring the first `tokens` of the session to where `asked` says.

    Raises:
        SwarmError: the other server cannot be reached, or does not take it; or as `SpanEngine.export_kv`.
        TimeoutError: it took longer than `DEADLINE` seconds.
    """
    if not tokens:
        return
    page_bytes = max(engine.kv_bytes(session_id, PAGE_TOKENS), 1)
    stride = PAGE_TOKENS * max(PIECE_BYTES // page_bytes, 1)
    async with asyncio.timeout(DEADLINE):
        calls = MessageStream(await transport.open_stream(PeerId(asked.peer), asked.addresses))
        try:
            await calls.call(Feed(session_id=asked.to_session), timeout=PIECE_DEADLINE)
            for first in range(0, tokens, stride):
                end = min(first + stride, tokens)
                data = await engine.export_kv(session_id, first, end)
                piece = Adopt(session_id=asked.to_session, first=first, end=end, size=len(data))
                await calls.call(piece, data, timeout=PIECE_DEADLINE)
        finally:
            calls.close()
