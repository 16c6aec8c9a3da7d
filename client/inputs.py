"""What goes into the hops of a session, at every position: kept as it travelled, or computed from tokens.

Owns the journals of one session, by block, and beside them the newest results, which the next hop may still
need however little journals may hold. Must not know of hops.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple, TypeAlias

from torch import Tensor

from swarm.client.journal import Journal, JournalStore, RowForm
from swarm.kernels.codecs import from_wire, to_wire
from swarm.net.forms import Codec, Dtype

Embed: TypeAlias = Callable[[Sequence[int]], Awaitable[Tensor]]
"""What tokens embed to, [tokens, hidden]."""

Form: TypeAlias = tuple[Dtype, Codec]


class Wired(NamedTuple):
    """Hidden states of `shape` [tokens, hidden], or token ids [tokens], as they travel."""

    data: memoryview
    shape: tuple[int, ...]
    dtype: Dtype
    codec: Codec

    def first(self, rows: int) -> bytes:
        """The bytes of the first `rows` of hidden states."""
        form = RowForm.of(self.shape[1], self.dtype, self.codec)
        return b"".join(self.data[part] for part in form.parts(0, rows, self.shape[0]))

    def as_form(self, form: Form) -> memoryview:
        """The bytes of hidden states in another form, which may be this one."""
        if (self.dtype, self.codec) == form:
            return self.data
        return to_wire(from_wire(*self), *form)


class Inputs:
    """The inputs of a session of hidden states `width` wide. Block 0 takes what `tokens` embed to.

    Without `embed` no tokens are known: what goes into the first block was put here like all else.
    """

    def __init__(self, store: JournalStore, tokens: Sequence[int], width: int, embed: Embed | None):
        self._store = store
        self._tokens = tokens
        self._width = width
        self._embed = embed
        self._journals: dict[int, Journal] = {}
        self._fresh: dict[tuple[int, int, int], Wired] = {}

    @property
    def bytes(self) -> int:
        """What the journals hold, in memory and on disk."""
        return sum(journal.bytes for journal in self._journals.values())

    def put(self, block: int, start: int, rows: Wired, valid_end: int) -> None:
        """Know what goes into `block` from position `start` on, up to `valid_end`."""
        end = start + rows.shape[0]
        if valid_end <= start:
            return
        if valid_end == end:
            self._fresh[block, start, end] = rows
        if block not in self._journals:
            self._journals[block] = Journal(self._store, self._width, rows.dtype, rows.codec)
        journal = self._journals[block]
        journal.put(start, rows.as_form((journal.dtype, journal.codec)), rows.shape[0])
        if valid_end < end:
            journal.truncate(valid_end)

    def has(self, block: int, start: int, end: int) -> bool:
        """Whether it is known what goes into `block` at these positions."""
        if self._can_embed(block) or (block, start, end) in self._fresh:
            return True
        return block in self._journals and self._journals[block].covers(start, end)

    async def read(self, block: int, start: int, end: int, form: Form) -> memoryview:
        """What goes into `block` at these positions, in that form.

        Raises:
            LookupError: it is not known any more.
        """
        if (fresh := self._fresh.get((block, start, end))) is not None:
            return fresh.as_form(form)
        journal = self._journals.get(block)
        if journal is not None and journal.covers(start, end):
            data = await journal.read(start, end)
            return Wired(data, (end - start, self._width), journal.dtype, journal.codec).as_form(form)
        if block or self._embed is None:
            raise LookupError(f"positions [{start}, {end}) of what goes into block {block} are not known")
        return to_wire(await self._embed(self._tokens[start:end]), *form)

    def used(self, block: int, start: int, end: int) -> None:
        """What goes into `block` at these positions has gone there."""
        self._fresh.pop((block, start, end), None)

    def truncate(self, length: int, first_block: int = 0) -> None:
        """Forget the positions from `length` on, of `first_block` and those after it."""
        self._fresh.clear()
        for block, journal in self._journals.items():
            if block >= first_block:
                journal.truncate(length)

    def next_needed(self, block: int, position: int) -> int:
        """From which position on it is not known what goes into `block`, which needs all from `position` on.

        A journal that lacks rows at its beginning is given up: they come again, with those after them.
        """
        journal = self._journals.get(block)
        if journal is None or journal.start == journal.end:
            return position
        if journal.start > position:
            self.forget(block)
            return position
        return journal.end

    def forget(self, block: int) -> None:
        """Keep nothing of what goes into `block`."""
        if block in self._journals:
            self._journals.pop(block).release()

    def release(self) -> None:
        """Forget everything."""
        self._fresh.clear()
        for block in list(self._journals):
            self.forget(block)

    def _can_embed(self, block: int) -> bool:
        return block == 0 and self._embed is not None
