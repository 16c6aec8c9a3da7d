"""The sessions of an engine: which are open, what KV memory they were promised, and what they hold.

Refuses what does not fit, and lets a session that was closed keep its pages for as long as something still
runs on them. All state belongs to the event loop. Knows nothing of how steps are run.
"""

from collections.abc import Iterable, Iterator, Sequence

from swarm.blocks.errors import NoCapacity, StepError
from swarm.blocks.kv import EVERYBODY, PageCopy, PageName, SessionKV, pages_of
from swarm.blocks.loading import LoadedSpan
from swarm.blocks.pool import PagePool, PoolExhausted
from swarm.blocks.steps import EngineStats, Session
from swarm.page_keys import KEY_BYTES, PAGE_TOKENS
from swarm.spans import Span

RETRY_AFTER = 5.0
"""Seconds after which a full server may have room again."""


class Sessions:
    """The sessions on a loaded span, by their ids. What happens to them is counted in `counted`."""

    def __init__(
        self, loaded: LoadedSpan, counted: EngineStats, *, overcommit: float = 1.0, prefix_cache: bool = True
    ):
        self.keeps_prefixes = prefix_cache and loaded.keeps_pages
        self._loaded = loaded
        self._counted = counted
        self._pool: PagePool[PageName] = PagePool(loaded.pages)
        self._promisable = int(loaded.pages * overcommit)
        self._open: dict[str, Session] = {}
        self._leaving: set[Session] = set()
        self._lent: list[tuple[int, ...]] = []

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Session]:
        """The open ones."""
        return iter(self._open.values())

    @property
    def ids(self) -> list[str]:
        return list(self._open)

    @property
    def pages_used(self) -> int:
        return self._pool.used

    @property
    def pages_kept(self) -> int:
        return self._pool.kept

    @property
    def tokens_left(self) -> int:
        """Tokens that no session was promised."""
        return max(0, self._promisable - self._promised) * PAGE_TOKENS

    def open(
        self,
        session_id: str,
        span: Span,
        max_tokens: int,
        *,
        client: str,
        page_keys: bytes,
        is_bulk: bool,
        wire: str,
    ) -> int:
        """As `Engine.open_session`, which has the meaning of everything."""
        if not self._loaded.span.covers(span):
            raise StepError("bad_request", f"This server serves blocks {self._loaded.span}, not {span}.")
        if session_id in self._open:
            raise StepError("bad_request", "This session is open already.")
        self._check_room(max_tokens)
        blocks = Span(span.start - self._loaded.span.start, span.end - self._loaded.span.start)
        kv = SessionKV(self._pool, blocks, max_tokens, client)
        state = self._loaded.forward.new_state(blocks, max_tokens)
        form = self._loaded.precision.wire_form(wire)
        self._open[session_id] = Session(kv, is_bulk, form, state=state)
        self._counted.admitted += 1
        return self._attach(kv, page_keys) if self.keeps_prefixes else 0

    def close(self, session_id: str) -> Session | None:
        """Forget a session; its pages go back now, or once nothing runs on them any more."""
        session = self._open.pop(session_id, None)
        if session is None:
            return None
        session.is_closed = True
        if session.is_running:
            self._leaving.add(session)
        else:
            session.kv.roll_back(0)
        return session

    def find(self, session_id: str) -> Session:
        """
        Raises:
            StepError: there is no such session.
        """
        session = self._open.get(session_id)
        if session is None:
            raise StepError("unknown_session", "This server has no such session.")
        return session

    def find_idle(self, session_id: str) -> Session:
        """
        Raises:
            StepError: there is no such session, or something runs on it, given up or not: its pages are used.
        """
        session = self.find(session_id)
        if session.step is not None or session.is_running:
            raise StepError("bad_request", "The last step of this session is still running.")
        return session

    def reserve(self, session: Session, first: int, end: int) -> Sequence[PageCopy]:
        """Let the session end at `first` and have pages to write to up to `end`; what is copied before.

        Raises:
            NoCapacity: more was promised than there is, and it is used up for the moment.
        """
        try:
            return session.kv.reserve(first, end)
        except PoolExhausted as full:
            message = "This server promised more tokens than it has; all are in use."
            raise NoCapacity(message, RETRY_AFTER) from full

    def lend(self, session: Session, first: int, end: int) -> tuple[int, ...]:
        """The full pages of positions `[first, end)`, which stay as they are until `take_back`.

        Raises:
            NoCapacity: steps may need all pages that there are, should the session leave these meanwhile.
        """
        table = tuple(session.kv.table[first // PAGE_TOKENS : end // PAGE_TOKENS])
        if self._pool.size - self._pool.used < len(table):
            raise NoCapacity("This server has no pages to spare for copying.", RETRY_AFTER)
        for page in table:
            self._pool.share(page)
        self._lent.append(table)
        return table

    def take_back(self, table: tuple[int, ...]) -> None:
        """Pages that `lend` gave are not read any more."""
        self._lent.remove(table)
        for page in table:
            self._pool.release(page)

    def rest(self, session: Session) -> bool:
        """Nothing runs on the session any more. Whether it is still open; if not, its pages go back."""
        session.is_running = False
        if session.is_closed:
            self._leaving.discard(session)
            session.kv.roll_back(0)
        return not session.is_closed

    def check_integrity(self) -> None:
        """
        Raises:
            AssertionError: a page is lost, or counted otherwise than the sessions use it.
        """
        held = [*self._open.values(), *self._leaving]
        tables: Iterable[Sequence[int]] = (*(session.kv.table for session in held), *self._lent)
        self._pool.check_integrity(tables)
        assert all(
            len(session.kv.table) == pages_of(session.kv.length)
            for session in held
            if not (session.step or session.is_running)
        )

    @property
    def _promised(self) -> int:
        held = (*self._open.values(), *self._leaving)
        return sum(pages_of(session.kv.capacity) for session in held)

    def _attach(self, kv: SessionKV, page_keys: bytes) -> int:
        sees_tokens = self._loaded.embedding is not None and kv.blocks.start == 0
        held = kv.attach(page_keys, EVERYBODY if sees_tokens else kv.client)
        self._counted.prefix_tokens_asked += len(page_keys) // KEY_BYTES * PAGE_TOKENS
        self._counted.prefix_tokens_held += held
        return held

    def _check_room(self, max_tokens: int) -> None:
        fault: NoCapacity | None = None
        if pages_of(max_tokens) > self._pool.size:
            most = self._pool.size * PAGE_TOKENS
            fault = NoCapacity(f"This server holds {most} tokens at most, not {max_tokens}.", None)
        elif pages_of(max_tokens) > self._promisable - self._promised:
            left = f"This server has room for {self.tokens_left} more tokens, not {max_tokens}."
            fault = NoCapacity(left, RETRY_AFTER)
        if fault is not None:
            self._counted.refused += 1
            raise fault
