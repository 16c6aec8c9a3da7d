"""The page pool: which page is free, which is used by how many sessions, which is kept for its name.

A full page can be given a name, under which it is found again after its last session has gone, until it is
taken for something else, least recently used first. Numbers only: knows no tensors and no sessions.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

PageName = TypeVar("PageName", bound=Hashable)


class PoolExhausted(Exception):
    """Every page is in use."""


class PagePool(Generic[PageName]):
    """Pages numbered from 0 to `size`. A page is free, used, or kept: named and used by nobody."""

    def __init__(self, size: int):
        self.size = size
        self._uses = [0] * size
        self._free = list(range(size - 1, -1, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._pages: dict[PageName, int] = {}
        self._names: dict[int, PageName] = {}

    @property
    def used(self) -> int:
        return self.size - len(self._free) - len(self._kept)

    @property
    def kept(self) -> int:
        return len(self._kept)

    def take(self) -> int:
        """A page for one user, of unknown content.

        Raises:
            PoolExhausted: all pages are in use.
        """
        if self._free:
            page = self._free.pop()
        elif self._kept:
            page, _ = self._kept.popitem(last=False)
            self.forget(page)
        else:
            raise PoolExhausted
        self._uses[page] = 1
        return page

    def find(self, name: PageName) -> int | None:
        """The page of that name, None where there is none (any more)."""
        return self._pages.get(name)

    def name_of(self, page: int) -> PageName:
        """The name under which a page was found."""
        return self._names[page]

    def share(self, page: int) -> None:
        """Count one more user of a page that is used or kept."""
        self._kept.pop(page, None)
        self._uses[page] += 1

    def release(self, page: int) -> None:
        """Count one user less. After the last one the page is kept if it has a name, else free."""
        self._uses[page] -= 1
        if self._uses[page]:
            return
        if page in self._names:
            self._kept[page] = None
        else:
            self._free.append(page)

    def name(self, page: int, name: PageName) -> None:
        """Let a used page be found as `name`, unless it has a name, or another page has this one."""
        if name not in self._pages and page not in self._names:
            self._pages[name] = page
            self._names[page] = name

    def forget(self, page: int) -> None:
        """Let a page have no name."""
        name = self._names.pop(page, None)
        if name is not None:
            del self._pages[name]

    def forget_all(self) -> None:
        """Free all that is kept, and let no page have a name."""
        for page in list(self._names):
            self.forget(page)
        self._free += self._kept
        self._kept.clear()

    def is_exclusive(self, page: int) -> bool:
        """Whether its one user may write to it: nobody else has it or may find it."""
        return self._uses[page] == 1 and page not in self._names

    def check_integrity(self, tables: Iterable[Iterable[int]]) -> None:
        """
        Raises:
            AssertionError: what the pool counts is not what the users' `tables` hold, or a page is lost.
        """
        uses = [0] * self.size
        for table in tables:
            for page in table:
                uses[page] += 1
        assert uses == self._uses, "pages are used otherwise than counted"
        free, kept = set(self._free), set(self._kept)
        assert len(free) == len(self._free), "a page is free twice"
        assert not free & kept, "a page is both free and kept"
        unused = {page for page in range(self.size) if not uses[page]}
        assert free | kept == unused, "a page is lost, or used though free"
        assert kept <= self._names.keys(), "a page is kept without a name"
        assert not free & self._names.keys(), "a free page has a name"
        assert {name: page for page, name in self._names.items()} == self._pages, "names and pages differ"
