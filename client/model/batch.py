"""A batch of sequences that grow together, column by column, each of its rows in a session of its own.

Owns which columns are padding: no server ever sees those. Blocks while the rows run, all at the same time.
Must not know what is done with the results.
"""

import weakref
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from swarm.client.blocking import BlockingSwarm
from swarm.client.concurrently import concurrently
from swarm.client.model.rows import HiddenRow, Row, TokenRow
from swarm.errors import InputError, SwarmError
from swarm.spans import Span

MAX_BATCH = 32
"""Rows of a batch: servers take so many sessions of one client."""


class Part(NamedTuple):
    """What a row is given, of which the results of the last `wanted` are asked for."""

    row: Row
    given: Tensor
    wanted: int


class Batch:
    """Rows on the servers of the blocks `span`, with `room` tokens each: as many as come first.

    They are of tokens, or of hidden states if that is what comes first. `shown` [batch, columns] tells which
    of their columns are no padding.
    """

    def __init__(self, swarm: BlockingSwarm, span: Span, room: int):
        self.shown = torch.zeros(0, 0, dtype=torch.bool)
        self.takes_hidden = False
        self._swarm = swarm
        self._span = span
        self._room = room
        self._rows: list[Row] = []
        self._is_closed = False
        weakref.finalize(self, _let_go, swarm, self._rows).atexit = False

    @property
    def columns(self) -> int:
        return self.shown.shape[1]

    @property
    def lengths(self) -> list[int]:
        """How many tokens each row has."""
        return [row.position for row in self._rows]

    def require_open(self) -> None:
        """
        Raises:
            SwarmError: it is closed.
        """
        if self._is_closed:
            raise SwarmError("This session is closed.", "Begin a new one.")

    def run(self, given: Tensor, shown: Tensor, keep: int) -> Tensor:
        """Bring the next columns through the blocks: ids [batch, columns] or states [batch, columns, hidden].

        Those for which `shown` [batch, columns] is False are padding.

        Returns:
            Hidden states [batch, keep, hidden] of the last `keep` columns, or of all if 0; zeros for padding.

        Raises:
            InputError: the rows, or what is in them, do not fit what came before or the model.
            SwarmError: servers were lost for which there are no others, or the session has ended. Rows of
                tokens then stay where they were.
        """
        given, kept = given.detach().cpu(), shown[:, -keep:]
        self._check(given, shown)
        rows = self._rows_for(given)
        values = self._embedded(given) if self.takes_hidden else given
        results = self._run(
            Part(row, new[seen], int(wanted.sum()))
            for row, new, seen, wanted in zip(rows, values, shown, kept, strict=True)
        )
        self.shown = torch.cat([self.shown, shown], dim=1)
        states = torch.zeros(*kept.shape, self._swarm.swarm.model.hidden_size, dtype=results.dtype)
        states[kept] = results
        return states

    def rewind(self, columns: int) -> None:
        """Forget the columns from number `columns` on."""
        self.shown = self.shown[:, :columns]
        for row, shown in zip(self._rows, self.shown, strict=True):
            row.rewind(int(shown.sum()))

    def close(self) -> None:
        """Free what servers hold. Safe to call again."""
        self._is_closed = True
        if self._swarm.thread.is_alive:
            self._swarm.thread.run(_close(self._rows))

    def _check(self, given: Tensor, shown: Tensor) -> None:
        """
        Raises:
            InputError: the model cannot take that.
        """
        model = self._swarm.swarm.model
        if given.ndim == 3:
            if given.shape[2] != model.hidden_size:
                raise InputError(
                    f"Hidden states of {given.shape[2]} values were given.",
                    f"{model.name} has {model.hidden_size}: [batch, tokens, {model.hidden_size}].",
                )
            return
        unknown = [token for token in given[shown].tolist() if not 0 <= token < model.vocab_size]
        if unknown:
            raise InputError(
                f"There is no token {unknown[0]}: {model.name} has those from 0 to {model.vocab_size - 1}.",
                "The tokenizer may be another model's.",
            )

    def _rows_for(self, given: Tensor) -> list[Row]:
        """The rows, made where these are the first columns.

        Raises:
            InputError: what is given does not fit them.
        """
        batch = given.shape[0]
        if not self._rows:
            self._make_rows(batch, takes_hidden=given.ndim == 3)
        if batch != len(self._rows):
            raise InputError(
                f"This session has {len(self._rows)} rows, not {batch}.",
                "Its first step settles how many; begin another session.",
            )
        if given.ndim == 3 and not self.takes_hidden:
            raise InputError("This session was given tokens.", "Begin another one for hidden states.")
        return self._rows

    def _make_rows(self, batch: int, *, takes_hidden: bool) -> None:
        if not 1 <= batch <= MAX_BATCH:
            raise InputError(f"The batch has {batch} rows.", f"A session has 1 to {MAX_BATCH}.")
        swarm, span, room = self._swarm.swarm, self._span, self._room
        self.takes_hidden = takes_hidden
        self.shown = torch.zeros(batch, 0, dtype=torch.bool)
        self._rows += [
            HiddenRow(swarm, span, room) if takes_hidden else TokenRow(swarm, room) for _ in range(batch)
        ]

    def _embedded(self, given: Tensor) -> Tensor:
        if given.ndim == 3:
            return given
        return self._swarm.swarm.ends.embed(given.flatten()).view(*given.shape, -1)

    def _run(self, parts: Iterable[Part]) -> Tensor:
        """The results of all rows, one behind the other."""
        before = self.lengths
        try:
            return self._swarm.thread.run(_results(list(parts), self._swarm.swarm.model.hidden_size))
        except BaseException:
            if not self.takes_hidden:
                for row, length in zip(self._rows, before, strict=True):
                    row.rewind(length)
            raise


def _let_go(swarm: BlockingSwarm, rows: list[Row]) -> None:
    """Free what a batch held that nobody has any more, without waiting."""
    swarm.thread.start(_close(rows))


async def _results(parts: list[Part], hidden_size: int) -> Tensor:
    filled = [part for part in parts if len(part.given)]
    results = await concurrently(*(part.row.run(part.given, part.wanted) for part in filled))
    return torch.cat(results or [torch.zeros(0, hidden_size)])


async def _close(rows: list[Row]) -> None:
    await concurrently(*(row.close() for row in rows))
