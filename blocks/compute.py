"""One iteration in the compute thread: bytes to tensors, all rows through the span at once, tensors to bytes.

What it is given it changes in no way but by filling in results and times; pages and sessions are the
engine's. Knows no event loop.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import isfinite

import torch
from torch import Tensor

from swarm.blocks.choosing import choose
from swarm.blocks.errors import StepError
from swarm.blocks.kv import PageCopy
from swarm.blocks.loading import LoadedSpan
from swarm.blocks.precision import WireForm
from swarm.blocks.steps import PendingStep, StepResult
from swarm.kernels.codecs import from_wire, to_wire
from swarm.kernels.pages import Segment
from swarm.sampling import Sampling
from swarm.spans import Span

HEAD_ROWS = 64
"""Rows that the head takes at once: their logits are as wide as the vocabulary."""

TOKENS_FORM = WireForm("uint32", "raw")


@dataclass(eq=False)
class Piece:
    """What an iteration does for one step: some rows, where their KV belongs, and what is copied before.

    `output` is for its last `asked` rows: hidden states [asked, hidden], or the likeliest tokens [asked].
    """

    step: PendingStep
    segment: Segment
    copies: Sequence[PageCopy]
    output: Tensor | None = None

    @property
    def blocks(self) -> Span:
        return self.step.session.kv.blocks

    @property
    def end(self) -> int:
        """How many rows of its step have been run with these."""
        return self.segment.length - self.step.seq_pos

    @property
    def asked(self) -> int:
        """How many of its rows, the last ones, are answered for."""
        return max(0, min(self.segment.rows, self.end - self.step.tokens + self.step.asked))

    @property
    def is_last(self) -> bool:
        return self.end == self.step.tokens

    @property
    def tokens_asked(self) -> int:
        """After how many of its rows, the last ones, the head is to choose a token."""
        if self.step.wants_tokens:
            return self.asked
        return int(self.step.sampling is not None and self.is_last)


class Compute:
    """Runs iterations of a loaded span."""

    def __init__(self, loaded: LoadedSpan):
        self._forward = loaded.forward
        self._embedding = loaded.embedding
        self._logits = loaded.logits
        self._hidden_size = loaded.hidden_size

    def run(self, pieces: Sequence[Piece]) -> None:
        """Give each piece its output, and each step that is done with it its result.

        Raises:
            StepError: a piece's session cannot go back to where it begins, or the model gave no numbers.
        """
        for piece in pieces:  # before anything can fail: the pages count as the session's own
            self._forward.copy(piece.copies)
        for piece in pieces:
            self._deserialise(piece.step)
        for blocks, group in groupby(sorted(pieces, key=_by_blocks), key=_by_blocks):
            self._run_together(Span(*blocks), list(group))
        self._choose([piece for piece in pieces if piece.tokens_asked])
        for piece in pieces:
            if piece.is_last:
                self._serialise(piece)

    def _deserialise(self, step: PendingStep) -> None:
        started = time.perf_counter()
        step.times.queue += started - step.since
        if step.hidden is None:
            step.hidden = self._hidden(step)
        step.times.deserialise += time.perf_counter() - started

    def _hidden(self, step: PendingStep) -> Tensor:
        if not isinstance(step.data, list):
            wire = step.session.wire
            return from_wire(step.data, (step.tokens, self._hidden_size), wire.wire_dtype, wire.codec)
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
            piece.output = _end_of(output, piece.asked)
            piece.step.times.forward += ended - started
            piece.step.since = ended

    def _choose(self, pieces: Sequence[Piece]) -> None:
        """The tokens that are asked for, by the head, which takes the rows of all pieces together."""
        if not pieces:
            return
        started = time.perf_counter()
        assert self._logits is not None
        rows = torch.cat([_output_of(piece)[-piece.tokens_asked :] for piece in pieces])
        logits = (row for some in rows.split(HEAD_ROWS) for row in self._logits(some))
        for piece in pieces:
            step = piece.step
            if step.wants_tokens:
                likeliest = [_likeliest(next(logits)) for _ in range(piece.asked)]
                piece.output = torch.tensor(likeliest, dtype=torch.int32)
            elif step.sampling is not None:
                step.token = _sampled(next(logits), step.sampling, piece.segment.length)
        ended = time.perf_counter()
        for piece in pieces:
            piece.step.times.forward += ended - started

    def _serialise(self, piece: Piece) -> None:
        started, step = time.perf_counter(), piece.step
        parts = [*step.outputs, _output_of(piece)]
        answer = torch.cat(parts) if len(parts) > 1 else parts[0]
        form = TOKENS_FORM if step.wants_tokens else step.session.wire
        data = to_wire(answer, form.wire_dtype, form.codec)
        step.times.serialise += time.perf_counter() - started
        step.finished = StepResult(
            data=data,
            shape=tuple(answer.shape),
            dtype=form.wire_dtype,
            codec=form.codec,
            queue_ms=1000 * step.times.queue,
            deserialise_ms=1000 * step.times.deserialise,
            forward_ms=1000 * step.times.forward,
            serialise_ms=1000 * step.times.serialise,
            token=step.token,
        )


def _by_blocks(piece: Piece) -> tuple[int, int]:
    return piece.blocks.start, piece.blocks.end


def _output_of(piece: Piece) -> Tensor:
    assert piece.output is not None
    return piece.output


def _end_of(output: Tensor, rows: int) -> Tensor:
    """The last `rows`, without the memory of the others."""
    return output if rows == len(output) else output[len(output) - rows :].clone()


def _likeliest(logits: Tensor) -> int:
    """The token for logits [vocabulary].

    Raises:
        StepError: they are not numbers.
    """
    values = logits.numpy()
    token = int(values.argmax())
    if not isfinite(values[token]):
        raise StepError("internal", "The model gave values that are not numbers.")
    return token


def _sampled(logits: Tensor, sampling: Sampling, position: int) -> int:
    """The token at `position`, for logits [vocabulary].

    Raises:
        StepError: they are not numbers.
    """
    _likeliest(logits)  # that there are numbers
    return choose(logits, sampling, position)


def _rows_of(piece: Piece) -> Tensor:
    step = piece.step
    assert step.hidden is not None
    return step.hidden[step.done : step.done + piece.segment.rows]
