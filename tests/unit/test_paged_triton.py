"""The Triton kernels against the plain formula: on CUDA where there is one, else by Triton's interpreter.

Without Triton these are skipped; `pip install triton` on Linux is enough to run them, no GPU is needed. What
the interpreter cannot show, that the compiler takes the programs too, is checked for GPUs that are not here.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from swarm.kernels.pages import PAGE, Pages, Segment, Segments, attend_pages_plainly

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

with pytest.MonkeyPatch.context() as environment:
    if DEVICE == "cpu":
        environment.setenv("TRITON_INTERPRET", "1")  # read when Triton is imported, and when it runs
    triton = pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    from swarm.kernels import paged_triton
    from swarm.kernels.paged_triton import append, attend_pages, key_dims, parts_for, tilings

TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Largest difference to float32 by the formula, for values of about 1."""

Rows = Sequence[tuple[int, int]]
"""Rows of each segment, and the position of the first."""


class Case:
    """Segments whose pages lie in random order among others, and hold NaN wherever nothing was appended."""

    def __init__(
        self,
        rows: Rows,
        heads: int = 6,
        kv_heads: int = 2,
        key_dim: int = 32,
        value_dim: int = 32,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ):
        self.rng = torch.Generator().manual_seed(seed)
        needed = [-(-(count + first) // PAGE) for count, first in rows]
        order = torch.randperm(sum(needed) + 2, generator=self.rng).tolist()
        parts = [
            Segment(count, first, [order.pop() for _ in range(pages)])
            for (count, first), pages in zip(rows, needed, strict=True)
        ]
        self.segments = Segments.of(parts, DEVICE)
        self.everything = Segments.of([Segment(part.length, 0, part.table) for part in parts], DEVICE)
        self.pages = Pages.empty(sum(needed) + 2, kv_heads, key_dim, value_dim, dtype, DEVICE)
        self.pages.keys.fill_(float("nan"))
        self.pages.values.fill_(float("nan"))
        length = sum(part.length for part in parts)
        self.keys = self.random(length, kv_heads, key_dim, dtype=dtype)
        self.values = self.random(length, kv_heads, value_dim, dtype=dtype)
        self.query = self.random(sum(count for count, _ in rows), heads, key_dim, dtype=dtype)
        self.options = {"scale": key_dim**-0.5}

    def random(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=self.rng).to(DEVICE, dtype)

    def append(self) -> None:
        append(self.pages.keys, self.pages.values, self.keys, self.values, self.everything)

    def error(self, **options: object) -> float:
        """Of the kernels, against the formula in float32."""
        self.append()
        got = attend_pages(
            self.query, self.pages.keys, self.pages.values, self.segments, **self.options, **options
        )
        assert got.dtype == self.query.dtype
        wide = Pages(self.pages.keys.float(), self.pages.values.float())
        want = attend_pages_plainly(self.query.float(), wide, self.segments, **self.options, **options)
        assert got.shape == want.shape
        return float((got.float() - want).abs().max())


@pytest.fixture(autouse=True)
def interpreting(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture(params=[1, 9], ids=["whole", "in parts"])
def processors(request, monkeypatch) -> int:
    """With many processors the pages of a tile are read in parts."""
    monkeypatch.setattr(paged_triton, "_processors", lambda device: request.param)
    return request.param


DECODE = [(1, 0), (1, 31), (1, 32), (1, 300)]
PREFILL = [(50, 0), (33, 64)]
MIXED = [(1, 290), (40, 130), (1, 0), (5, 31), (3, 0), (6, 7)]


@pytest.mark.parametrize("rows", [DECODE, PREFILL, MIXED], ids=["decode", "prefill", "mixed"])
@pytest.mark.parametrize(
    "options",
    [{}, {"window": 1}, {"window": 40}, {"chunk": 48}, {"softcap": 3.0}, {"window": 70, "softcap": 0.5}],
    ids=str,
)
def test_attention_is_the_plain_formula(processors, rows, options):
    assert Case(rows).error(**options) < TOLERANCE[torch.float32]


def test_sinks_take_weight_once(processors):
    case = Case(MIXED)
    sinks = case.random(6)
    assert case.error(sinks=sinks) < TOLERANCE[torch.float32]
    assert case.error(sinks=sinks, window=33, softcap=2.0) < TOLERANCE[torch.float32]
    sinks[0] = float("-inf")
    assert case.error(sinks=sinks) < TOLERANCE[torch.float32]
    swallowed = attend_pages(
        case.query,
        case.pages.keys,
        case.pages.values,
        case.segments,
        scale=0.3,
        sinks=torch.full_like(sinks, 60.0),
    )
    assert swallowed.abs().max() < 1e-6


@pytest.mark.parametrize(
    ("heads", "kv_heads", "key_dim", "value_dim"),
    [(4, 4, 16, 16), (7, 1, 8, 8), (9, 3, 64, 64), (2, 1, 80, 72), (4, 4, 192, 128), (20, 1, 40, 24)],
)
def test_heads_of_many_shapes(processors, heads, kv_heads, key_dim, value_dim):
    case = Case([(1, 130), (20, 40), (2, 0)], heads, kv_heads, key_dim, value_dim)
    assert case.error() < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_loses_only_its_rounding(processors, dtype):
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 as whole numbers")
    assert Case(MIXED, dtype=dtype).error() < TOLERANCE[dtype]
    assert Case([(1, 70), (5, 20)], 32, 1, 576, 512, dtype=dtype).error() < TOLERANCE[dtype]


@pytest.mark.parametrize("seed", range(12))
def test_attention_of_any_batch(monkeypatch, seed):
    rng = random.Random(seed)
    monkeypatch.setattr(paged_triton, "_processors", lambda device: rng.choice([1, 2, 5]))
    rows = [(rng.randint(1, 24), rng.randint(0, 140)) for _ in range(rng.randint(1, 5))]
    heads = rng.choice([(1, 1), (6, 2), (5, 1), (18, 1)])
    dims = rng.choice([(16, 16), (24, 32), (32, 8)])
    case = Case(rows, *heads, *dims, seed=seed)
    error = case.error(
        window=rng.choice([None, rng.randint(1, 150)]),
        chunk=rng.choice([None, rng.randint(1, 150)]),
        softcap=rng.choice([None, rng.uniform(0.1, 50)]),
        sinks=rng.choice([None, case.random(heads[0])]),
    )
    assert error < TOLERANCE[torch.float32]


def test_a_row_does_not_depend_on_who_shares_the_batch():
    case = Case(MIXED)
    case.append()
    keys, values = case.pages.keys, case.pages.values
    together = attend_pages(case.query, keys, values, case.segments, scale=0.2)
    for part, rows, out in zip(
        case.segments.parts,
        case.query.split([n for n, _ in MIXED]),
        together.split([n for n, _ in MIXED]),
        strict=True,
    ):
        alone = attend_pages(rows, keys, values, Segments.of([part], DEVICE), scale=0.2)
        assert torch.allclose(alone, out, atol=1e-6)


def test_append_writes_the_rows_and_nothing_else():
    case = Case([(70, 0), (1, 0), (32, 0), (5, 0)], key_dim=24, value_dim=40)
    case.append()
    page, slot = case.everything.slots
    assert torch.equal(case.pages.keys[page, :, :, slot], case.keys)
    assert torch.equal(case.pages.values[page, :, slot], case.values)
    assert int(case.pages.keys.isfinite().sum()) == case.keys.numel()
    assert int(case.pages.values.isfinite().sum()) == case.values.numel()


def test_rows_as_transformers_lays_them_out():
    case = Case([(6, 0), (1, 0)])
    keys, values, query = (
        rows.transpose(0, 1).contiguous().transpose(0, 1) for rows in (case.keys, case.values, case.query)
    )
    assert not keys.is_contiguous()
    case.keys, case.values, case.query = keys, values, query
    assert case.error() < TOLERANCE[torch.float32]


def test_pages_are_shared_out_only_where_tiles_do_not_fill_the_gpu():
    assert parts_for(tiles=8, most_pages=256, processors=132) == 33
    assert parts_for(tiles=512, most_pages=256, processors=132) == 1
    assert parts_for(tiles=8, most_pages=3, processors=132) == 1
    assert parts_for(tiles=1, most_pages=10_000, processors=132) == paged_triton.MOST_PARTS


@pytest.mark.parametrize("dim", [8, 16, 64, 72, 80, 96, 128, 192, 256, 576])
def test_key_dims_are_two_powers_of_two_that_hold_them(dim):
    whole, rest = key_dims(dim)
    assert whole + rest >= dim
    assert all(part == 0 or (part >= 16 and part & (part - 1) == 0) for part in (whole, rest))
    assert whole + rest < 2 * max(dim, 16)
    for tiling in tilings(dim, dim, torch.bfloat16):
        assert tiling.queries >= paged_triton.MOST_HEADS


@pytest.mark.timeout(300)
def test_the_compiler_takes_the_programs_and_they_fit_every_gpu_since_ampere(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.compile_triton"],
        cwd=Path(__file__).parents[2],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 2 * 4 * 4
    assert max(line["shared"] for line in lines) <= 99 * 2**10
