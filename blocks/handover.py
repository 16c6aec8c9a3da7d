"""A session's KV as bytes for another server, and back: what one holds the other goes on from, bit for bit.

The bytes are rows of tokens, in no way those of the pages that they lie in: keys [tokens, kv_heads, key_dim],
then values [tokens, kv_heads, value_dim], block after block, little-endian, in the dtype that the span
computes in. Copying runs in the compute thread, beside no step of the same session, but for that of full
pages, which no step changes while they are lent. Knows no peers.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from swarm.blocks.compute_thread import ComputeThread
from swarm.blocks.errors import StepError
from swarm.blocks.loading import LoadedSpan
from swarm.blocks.sessions import Sessions
from swarm.blocks.steps import Session
from swarm.kernels.codecs import from_wire
from swarm.kernels.pages import Pages, Segment, Segments, append, rows_of
from swarm.page_keys import PAGE_TOKENS

Given = TypeVar("Given")


class Handover:
    """Gives the KV of sessions away, and takes that of others in, by work in `thread`."""

    def __init__(self, loaded: LoadedSpan, sessions: Sessions, thread: ComputeThread):
        self.is_possible = loaded.keeps_pages
        self._forward = loaded.forward
        self._sessions = sessions
        self._thread = thread

    def size(self, session_id: str, tokens: int) -> int:
        """As `Engine.kv_bytes`."""
        return kv_bytes(self._pages_of(self._sessions.find(session_id)), tokens)

    async def give(self, session_id: str, first: int, end: int) -> memoryview:
        """As `Engine.export_kv`."""
        session = self._find(session_id, first, end)
        if end > session.kv.length:
            raise StepError("bad_request", f"The session holds {session.kv.length} tokens, not {end}.")
        pages, table = self._pages_of(session), tuple(session.kv.table)
        return await self._run(session, lambda: kv_to_bytes(pages, table, first, end))

    async def copy(self, session_id: str, first: int, end: int) -> memoryview:
        """As `Engine.copy_kv`."""
        session = self._sessions.find(session_id)
        self._check(first, end)
        if first % PAGE_TOKENS or end % PAGE_TOKENS or end > session.kv.length:
            raise StepError("bad_request", f"{first}:{end} are no full pages of the session.")
        pages, table = self._pages_of(session), self._sessions.lend(session, first, end)

        def work() -> memoryview:
            return kv_to_bytes(pages, table, 0, end - first)

        running = self._thread.run(work)
        running.add_done_callback(lambda _: self._sessions.take_back(table))
        await asyncio.wait([running])
        return running.result()

    def rewind(self, session_id: str, length: int) -> None:
        """As `Engine.rewind`."""
        self._sessions.find_idle(session_id).kv.roll_back(length)

    async def take(self, session_id: str, first: int, end: int, data: memoryview | bytes) -> None:
        """As `Engine.import_kv`."""
        session = self._find(session_id, first, end)
        pages, kv = self._pages_of(session), session.kv
        if first != kv.length or end > kv.capacity:
            raise StepError(
                "bad_request",
                f"The session holds {kv.length} tokens of {kv.capacity}: {first}:{end} do not fit.",
            )
        size, needed = memoryview(data).nbytes, kv_bytes(pages, end - first)
        if size != needed:
            raise StepError("bad_request", f"{end - first} tokens take {needed} bytes here, not {size}.")
        copies = self._sessions.reserve(session, first, end)
        table = tuple(kv.table)

        def write() -> None:
            self._forward.copy(copies)
            kv_from_bytes(pages, table, first, end, data)

        await self._run(session, write, adopted=end)

    def _pages_of(self, session: Session) -> Sequence[Pages]:
        blocks = session.kv.blocks
        return self._forward.pages[blocks.start : blocks.end]

    def _find(self, session_id: str, first: int, end: int) -> Session:
        session = self._sessions.find_idle(session_id)
        self._check(first, end)
        return session

    def _check(self, first: int, end: int) -> None:
        if not self.is_possible:
            raise StepError("bad_request", "This model keeps a state that is not handed over.")
        if not 0 <= first < end:
            raise StepError("bad_request", f"{first}:{end} are no positions.")

    async def _run(self, session: Session, work: Callable[[], Given], adopted: int | None = None) -> Given:
        """Have `work` done on the session, which then holds the first `adopted` tokens, if that is given.

        Who stops waiting stops no work: the pages belong to it until it is done.
        """
        session.is_running = True
        running = self._thread.run(work)

        def ended(running: "asyncio.Future[Given]") -> None:
            has_worked = not running.cancelled() and running.exception() is None
            if not self._sessions.rest(session):
                return
            if has_worked and adopted is not None:
                session.kv.adopt(adopted)
            session.kv.roll_back(session.kv.length)  # gives back pages that were not written to

        running.add_done_callback(ended)
        await asyncio.wait([running])
        if session.is_closed:
            raise StepError("unknown_session", "The session was closed.")
        return running.result()


def kv_bytes(pages: Sequence[Pages], tokens: int) -> int:
    """Bytes of the KV of so many tokens on the blocks that keep `pages`."""
    return tokens * sum(_row_values(one) * one.keys.dtype.itemsize for one in pages)


@torch.inference_mode()
def kv_to_bytes(pages: Sequence[Pages], table: Sequence[int], first: int, end: int) -> memoryview:
    """The KV of positions `[first, end)` of the session whose pages are those of `table`."""
    whole = torch.empty(kv_bytes(pages, end - first), dtype=torch.uint8)
    at = 0
    for one in pages:
        for rows in rows_of(one, table, first, end):
            part = whole[at : at + rows.nbytes].view(rows.dtype)
            part.view(rows.shape).copy_(rows)
            at += rows.nbytes
    return whole.numpy().data.cast("B")


@torch.inference_mode()
def kv_from_bytes(
    pages: Sequence[Pages], table: Sequence[int], first: int, end: int, data: memoryview | bytes
) -> None:
    """Write what `kv_to_bytes` gave; `data` is as long as it must be.

    Raises:
        StepError: not all values are numbers; nothing was written then.
    """
    dtype, sizes = pages[0].keys.dtype, [(end - first) * _row_values(one) for one in pages]
    parts = from_wire(data, (sum(sizes),), str(dtype).removeprefix("torch.")).split(sizes)
    if not all(bool(torch.isfinite(part).all()) for part in parts):
        raise StepError("bad_request", "The KV that came holds values that are not numbers.")
    segments = Segments.of([Segment(end - first, first, table)], pages[0].keys.device)
    for one, part in zip(pages, parts, strict=True):
        _, heads, key_dim, _ = one.keys.shape
        value_dim = one.values.shape[3]
        keys, rows = part.to(one.keys.device).split([n * (end - first) * heads for n in (key_dim, value_dim)])
        append(one, keys.view(-1, heads, key_dim), rows.view(-1, heads, value_dim), segments)


def _row_values(pages: Pages) -> int:
    """Values that a block keeps of a token."""
    _, heads, key_dim, _ = pages.keys.shape
    return heads * (key_dim + pages.values.shape[3])
