"""Loading a span block by block: what is read ahead meanwhile, and how much of it."""

import threading
from typing import Any

import pytest
import torch

from swarm.blocks import shard
from swarm.blocks.models import resolve
from swarm.blocks.precision import Precision
from swarm.blocks.shard import MAX_IN_FLIGHT, load_span, read_ahead_bytes
from swarm.blocks.storage import LocalFile
from swarm.spans import Span

CPU = torch.device("cpu")
DEADLINE = 10.0
"""Seconds, for what takes milliseconds."""


class Reads:
    """Counts the bytes that have been read of weights files, for whoever waits for some."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.total, self._changed, self._read = 0, threading.Condition(), LocalFile.read_into
        monkeypatch.setattr(LocalFile, "read_into", self._counted())

    def _counted(self) -> Any:
        def read_into(file: LocalFile, view: memoryview, start: int) -> None:
            self._read(file, view, start)
            with self._changed:
                self.total += len(view)
                self._changed.notify_all()

        return read_into

    def wait_for(self, total: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self.total >= total, DEADLINE)


@pytest.mark.parametrize("family", ["Llama", "Qwen3Moe"])
def test_the_next_block_is_read_while_one_is_placed(family, checkpoint_of, monkeypatch):
    model, span = resolve(str(checkpoint_of(family)[0])), Span(1, 4)
    names = model.checkpoint.block_tensors(span)
    sizes = [sum(model.checkpoint.entry(name).nbytes for name in names[block]) for block in span.blocks]
    reads, place, placed, seen = Reads(monkeypatch), shard._place, [], []

    def slowly(*args: Any) -> None:
        ahead = sum(sizes[: len(placed) + 1]) + (0.5 * sizes[len(placed) + 1] if len(placed) < 2 else 0)
        seen.append(reads.wait_for(reads_before + ahead))
        placed.append(len(placed))
        place(*args)

    reads_before = reads.total
    monkeypatch.setattr(shard, "_place", slowly)
    progress: list[float] = []
    load_span(model, span, Precision("float32", torch.float32, None, "float32", "raw"), CPU, progress.append)
    assert seen == [True] * 3
    assert reads.total - reads_before == sum(sizes)
    assert progress == pytest.approx([1 / 3, 2 / 3, 1])


def test_what_is_read_ahead_is_about_a_block_and_bounded():
    assert read_ahead_bytes([100, 300, 200]) == 300
    assert read_ahead_bytes([10] * 100) == 50
    assert read_ahead_bytes([2**40]) == MAX_IN_FLIGHT
    assert read_ahead_bytes([0]) == 1
