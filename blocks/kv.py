"""One session's KV memory: its page table in the pool, how many tokens it holds, and its pages' names.

Pages come as the session grows and go as it is rolled back. A page that others use, or may find by its
name, is copied before it is written to. Numbers only, like the pool: the tensors are the engine's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from swarm.blocks.pool import PagePool, PoolExhausted
from swarm.page_keys import PAGE_TOKENS, page_keys, split_keys
from swarm.spans import Span

EVERYBODY = ""
"""The owner of pages whose tokens this server saw itself: whoever names the same tokens may have them."""


@dataclass(frozen=True)
class PageName:
    """Under which key whom a page may be found by, and for which blocks. `tokens` are its own, where seen."""

    owner: str
    blocks: Span
    key: bytes
    tokens: tuple[int, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class PageCopy:
    """Page `target` must be given what `source` holds before the step runs."""

    source: int
    target: int


def pages_of(tokens: int) -> int:
    """Pages that so many tokens take."""
    return -(-tokens // PAGE_TOKENS)


class SessionKV:
    """A session of at most `capacity` tokens on `blocks`, numbered as in the span's model."""

    def __init__(self, pool: PagePool[PageName], blocks: Span, capacity: int, client: str = ""):
        self.blocks = blocks
        self.capacity = capacity
        self.client = client
        self.length = 0
        self.table: list[int] = []
        self._pool = pool
        self._owner = client
        self._keys: list[bytes] = []
        self._tokens: list[int] = []
        self._is_nameable = True

    def attach(self, keys: bytes, owner: str) -> int:
        """Begin with the pages that are still there of those that `keys` name; how many tokens they hold."""
        self._owner = owner
        for key in split_keys(keys)[: self.capacity // PAGE_TOKENS]:
            page = self._pool.find(PageName(owner, self.blocks, key))
            if page is None:
                break
            self._pool.share(page)
            self.table.append(page)
            self._keys.append(key)
            self._tokens += self._pool.name_of(page).tokens
        self.length = PAGE_TOKENS * len(self.table)
        return self.length

    def expect(self, seq_pos: int, ids: Sequence[int] | None, keys: bytes) -> None:
        """Know the names of the pages that a step from `seq_pos` on fills.

        They follow from the token `ids`, if this server sees them, else from the client's own `keys`. After
        steps of both kinds, or one that was not named, nothing can be named any more.
        """
        if not self._is_nameable:
            return
        owner, whole = self.client if ids is None else EVERYBODY, seq_pos // PAGE_TOKENS
        if seq_pos == 0:
            self._owner = owner
        del self._keys[whole:], self._tokens[seq_pos:]
        if owner != self._owner or len(self._keys) < whole:
            return
        if ids is not None:
            if len(self._tokens) < seq_pos:
                return
            self._tokens += ids
            parent = self._keys[-1] if self._keys else b""
            keys = page_keys(self._tokens[whole * PAGE_TOKENS :], parent=parent)
        self._keys += split_keys(keys)

    def reserve(self, first: int, end: int) -> list[PageCopy]:
        """Forget every position from `first` on and have pages to write to up to `end`.

        Raises:
            PoolExhausted: there are none; the session ends at `first` then.
        """
        self.roll_back(first)
        copies = []
        try:
            if first % PAGE_TOKENS and not self._pool.is_exclusive(self.table[-1]):
                copies += self._have_own_page()
            while len(self.table) < pages_of(end):
                self.table.append(self._pool.take())
        except PoolExhausted:
            self.roll_back(first)
            raise
        return copies

    def grow(self, end: int) -> None:
        """Count what was written up to `end`, and name the pages that are full."""
        first, self.length = self.length // PAGE_TOKENS, end
        for index in range(first, min(end // PAGE_TOKENS, len(self._keys))):
            tokens = self._tokens[index * PAGE_TOKENS : (index + 1) * PAGE_TOKENS]
            self._pool.name(
                self.table[index], PageName(self._owner, self.blocks, self._keys[index], tuple(tokens))
            )

    def adopt(self, end: int) -> None:
        """Count what others computed up to `end`. Nobody shall find it: no page is named from then on."""
        self._is_nameable = False
        self._keys.clear()
        self._tokens.clear()
        self.length = end

    def roll_back(self, length: int) -> None:
        """Forget every position from `length` on; if the session is shorter, what it has pages for alone."""
        self.length = min(self.length, length)
        while len(self.table) > pages_of(self.length):
            self._pool.release(self.table.pop())

    def _have_own_page(self) -> list[PageCopy]:
        """Write to the last page without disturbing who else has it or may find it."""
        shared = self.table[-1]
        try:
            self.table[-1] = self._pool.take()
        except PoolExhausted:
            self._pool.forget(shared)
            if not self._pool.is_exclusive(shared):
                raise
            return []
        self._pool.release(shared)
        return [PageCopy(shared, self.table[-1])]
