"""One iteration in the compute thread: bytes to tensors, all rows through the span at once, tensors to bytes.

What it is given it changes in no way but by filling in results and times; pages and sessions are the
engine's. Knows no event loop.
"""

import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from swarm.blocks.errors import StepError
from swarm.blocks.kv import PageCopy
from swarm.blocks.loading import LoadedSpan
from swarm.blocks.steps import PendingStep, StepResult
from swarm.kernels.codecs import from_wire, to_wire
from swarm.kernels.pages import Segment
from swarm.spans import Span


@dataclass(eq=False)
class Piece:
    """What an iteration does for one step: some rows, where their KV belongs, and what is copied before.

    `output` is what they gave, [rows, hidden], and `token` the likeliest after them, if that was asked for.
    """

    step: PendingStep
    segment: Segment
    copies: Sequence[PageCopy]
    output: Tensor | None = None
    token: int = -1

    @property
    def blocks(self) -> Span:
        return self.step.session.kv.blocks

    @property
    def is_last(self) -> bool:
        return self.step.done + self.segment.rows == self.step.tokens


class Compute:
    """Runs iterations of a loaded span."""

    def __init__(self, loaded: LoadedSpan):
        self._forward = loaded.forward
        self._embedding = loaded.embedding
        self._logits = loaded.logits
        self._wire = loaded.precision.wire_dtype, loaded.precision.codec
        self._hidden_size = loaded.hidden_size

    def run(self, pieces: Sequence[Piece]) -> None:
        """Give each piece its output, and each step that is done with it its result.

        Raises:
            StepError: a piece's session cannot go back to where it begins, or the model gave no numbers.
        """
        for piece in pieces:
            self._deserialise(piece.step)
            self._forward.copy(piece.copies)
        for blocks, group in groupby(sorted(pieces, key=_by_blocks), key=_by_blocks):
            self._run_together(Span(*blocks), list(group))
        done = [piece for piece in pieces if piece.is_last]
        self._choose([piece for piece in done if piece.step.wants_token])
        for piece in done:
            self._serialise(piece)

    def _deserialise(self, step: PendingStep) -> None:
        started = time.perf_counter()
        step.times.queue += started - step.since
        if step.hidden is None:
            step.hidden = self._hidden(step)
        step.times.deserialise += time.perf_counter() - started

    def _hidden(self, step: PendingStep) -> Tensor:
        if not isinstance(step.data, list):
            return from_wire(step.data, (step.tokens, self._hidden_size), *self._wire)
        assert self._embedding is not None
        return self._embedding(torch.tensor(step.data))

    def _run_together(self, blocks: Span, pieces: Sequence[Piece]) -> None:
        started = time.perf_counter()
        rows = [_rows_of(piece) for piece in pieces]
        parts = [piece.segment for piece in pieces]
        hidden = rows[0] if len(rows) == 1 else torch.cat(rows)
        output = self._forward.run(hidden, blocks, parts).cpu()  # one copy, which waits for the device
        outputs = output.split([part.rows for part in parts])
        ended = time.perf_counter()
        for piece, output in zip(pieces, outputs, strict=True):
            piece.output = output
            piece.step.times.forward += ended - started
            piece.step.since = ended

    def _choose(self, pieces: Sequence[Piece]) -> None:
        """The likeliest token after each piece's last row, by the head, all at once."""
        if not pieces:
            return
        started = time.perf_counter()
        assert self._logits is not None
        logits = self._logits(torch.cat([_output_of(piece)[-1:] for piece in pieces])).numpy()
        tokens = logits.argmax(-1)
        if not np.isfinite(logits[range(len(pieces)), tokens]).all():
            raise StepError("internal", "The model gave values that are not numbers.")
        ended = time.perf_counter()
        for piece, token in zip(pieces, tokens.tolist(), strict=True):
            piece.token = token
            piece.step.times.forward += ended - started

    def _serialise(self, piece: Piece) -> None:
        started, step = time.perf_counter(), piece.step
        shape: tuple[int, ...]
        if step.wants_token:
            data, shape, form = memoryview(struct.pack("<I", piece.token)), (1,), ("uint32", "raw")
        else:
            parts = [*step.outputs, _output_of(piece)]
            data = to_wire(torch.cat(parts) if len(parts) > 1 else parts[0], *self._wire)
            shape, form = (step.tokens, self._hidden_size), self._wire
        step.times.serialise += time.perf_counter() - started
        step.finished = StepResult(
            data=data,
            shape=shape,
            dtype=form[0],
            codec=form[1],
            queue_ms=1000 * step.times.queue,
            deserialise_ms=1000 * step.times.deserialise,
            forward_ms=1000 * step.times.forward,
            serialise_ms=1000 * step.times.serialise,
        )


def _by_blocks(piece: Piece) -> tuple[int, int]:
    return piece.blocks.start, piece.blocks.end


def _output_of(piece: Piece) -> Tensor:
    assert piece.output is not None
    return piece.output


def _rows_of(piece: Piece) -> Tensor:
    step = piece.step
    assert step.hidden is not None
    return step.hidden[step.done : step.done + piece.segment.rows]
