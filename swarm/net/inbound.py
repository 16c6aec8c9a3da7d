"""The streams that other peers opened: one task each, bounded in number, ended together.

Both networks accept streams through this, so that limits, logging and shutdown are the same in tests
as in the world. Does not know how a stream came to be.
"""

import asyncio
import logging
from collections import Counter

from swarm.net.door import Door
from swarm.net.transport import FrameError, NotAdmitted, OnStream, PeerId, Stream, StreamClosed

logger = logging.getLogger(__name__)

MAX_STREAMS_PER_PEER = 64
MAX_STREAMS = 4096


class Inbound:
    """Runs `on_stream` for each accepted stream that may come in at the `door` of the peer `own`.

    One that fails is logged and leaves the others alone.
    """

    def __init__(self, on_stream: OnStream, door: Door, own: PeerId):
        self._on_stream = on_stream
        self._door = door
        self._own = own
        self._tasks: set[asyncio.Task[None]] = set()
        self._open: Counter[PeerId] = Counter()
        self._is_closed = False

    def accept(self, stream: Stream) -> None:
        """Serve `stream` in a task of its own, or close it at once where the peer has too many."""
        if self._is_closed:
            stream.close()
            return
        if self._open[stream.peer] >= MAX_STREAMS_PER_PEER or len(self._tasks) >= MAX_STREAMS:
            logger.warning("refused a stream of peer %s: it or this peer has too many open", stream.peer)
            stream.close()
            return
        self._open[stream.peer] += 1
        task = asyncio.create_task(self._serve(stream), name=f"stream of {stream.peer}")
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._on_end(task, stream))

    def cancel(self) -> None:
        """Ask every stream's task to end, and accept no more."""
        self._is_closed = True
        for task in self._tasks - {asyncio.current_task()}:
            task.cancel()

    async def close(self) -> None:
        """Cancel every stream's task and wait until they have ended."""
        self.cancel()
        await asyncio.gather(*(self._tasks - {asyncio.current_task()}), return_exceptions=True)

    async def _serve(self, stream: Stream) -> None:
        try:
            await self._door.on_enter(stream, self._own)
            await self._on_stream(stream)
        except NotAdmitted as refusal:
            logger.info("refused a stream: %s", refusal)
        except StreamClosed:
            logger.debug("peer %s ended its stream", stream.peer)
        except FrameError as error:
            logger.warning("closed a stream of peer %s: %s", stream.peer, error)
        except Exception:  # a bug in serving one stream must not end the others
            logger.exception("serving a stream of peer %s failed", stream.peer)

    def _on_end(self, task: asyncio.Task[None], stream: Stream) -> None:
        stream.close()  # here rather than in `_serve`, which never runs if it is cancelled before it starts
        self._tasks.discard(task)
        self._open[stream.peer] -= 1
        if not self._open[stream.peer]:
            del self._open[stream.peer]
