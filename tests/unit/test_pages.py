"""Attention over pages: every way gives what the plain formula gives, and a row the same in any company."""

import random
from collections.abc import Iterator

import pytest
import torch

from swarm.kernels.attention import attend_plainly
from swarm.kernels.linear import LeanLinear, native
from swarm.kernels.pages import PAGE, Pages, Segment, Segments, append, attend_pages, attend_pages_plainly

PAGES = 40
SHAPES = [(3, 3, 64, 64), (2, 2, 8, 8), (1, 1, 24, 16), (1, 4, 72, 64), (2, 1, 33, 17)]
"""KV heads, query heads for each, key dim, value dim."""

OPTIONS = [{}, {"window": 9}, {"window": 70}, {"chunk": 16}, {"softcap": 3.0}, {"sinks": True}]
PARTS = [(1, 0), (1, 70), (13, 0), (5, 60), (40, 31), (33, 200)]
"""Rows and first position of each segment."""

INSTRUCTION_SETS = native.instruction_sets() if native is not None else ()
needs_native = pytest.mark.skipif(
    native is None, reason="the native kernels were not built, or not for this CPU"
)


@pytest.fixture(params=INSTRUCTION_SETS)
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    assert native is not None
    native.use(request.param)
    yield request.param
    native.use(INSTRUCTION_SETS[-1])


def batch(kv_heads: int, key_dim: int, value_dim: int, dtype: torch.dtype = torch.float32):
    """Pages that were full of numbers, with the keys and values of `PARTS` in some of them."""
    torch.manual_seed(0)
    pages = Pages.empty(PAGES, kv_heads, key_dim, value_dim, dtype, "cpu")
    pages.keys.normal_()
    pages.values.normal_()
    free = random.Random(0).sample(range(PAGES), PAGES)
    parts = [
        Segment(rows, first, [free.pop() for _ in range(-(-(rows + first) // PAGE))]) for rows, first in PARTS
    ]
    segments = Segments.of(parts)
    rows = len(segments.positions)
    append(
        pages,
        torch.randn(rows, kv_heads, key_dim, dtype=dtype),
        torch.randn(rows, kv_heads, value_dim, dtype=dtype),
        segments,
    )
    return pages, segments


def settled(options: dict, heads: int) -> dict:
    return {**options, "sinks": torch.randn(heads)} if "sinks" in options else options


@needs_native
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_native_attention_is_the_plain_formula_in_any_company(shape, options, instructions):
    kv_heads, group, key_dim, value_dim = shape
    pages, segments = batch(kv_heads, key_dim, value_dim)
    query = torch.randn(len(segments.positions), kv_heads * group, key_dim)
    options = settled(options, kv_heads * group)
    together = attend_pages(query, pages, segments, scale=0.2, **options)
    expected = attend_pages_plainly(query, pages, segments, scale=0.2, **options)
    assert torch.allclose(together, expected, atol=1e-5)
    row, apart = 0, []
    for part in segments.parts:
        for i in range(part.rows):
            one = Segments.of([Segment(1, part.first + i, part.table)])
            apart.append(attend_pages(query[row : row + 1], pages, one, scale=0.2, **options))
            row += 1
    assert torch.equal(torch.cat(apart), together)


@needs_native
def test_every_instruction_set_and_number_of_threads_gives_the_same_bits():
    assert native is not None
    pages, segments = batch(3, 64, 64)
    query = torch.randn(len(segments.positions), 9, 64)
    layer = LeanLinear(torch.randn(700, 1100), torch.randn(700), torch.float16)
    x, results = torch.randn(100, 1100), []
    before = torch.get_num_threads()
    try:
        for name in INSTRUCTION_SETS:
            native.use(name)
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                results.append((attend_pages(query, pages, segments, scale=0.2, softcap=4.0), layer(x)))
            results.append((results[0][0], torch.cat([layer(row[None]) for row in x])))
    finally:
        torch.set_num_threads(before)
        native.use(INSTRUCTION_SETS[-1])
    assert all(torch.equal(a, results[0][0]) and torch.equal(b, results[0][1]) for a, b in results)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_gathered_pages_give_the_plain_formula_where_there_is_no_kernel(options, dtype):
    pages, segments = batch(2, 24, 16, dtype)
    query = torch.randn(len(segments.positions), 4, 24, dtype=dtype)
    options = settled(options, 4)
    found = attend_pages(query, pages, segments, scale=0.2, **options)
    expected = attend_pages_plainly(query, pages, segments, scale=0.2, **options)
    assert torch.allclose(found, expected, atol=2e-2 if dtype == torch.bfloat16 else 1e-6)


def test_the_plain_way_is_attention_over_each_sequence_alone():
    pages, segments = batch(2, 8, 8)
    query = torch.randn(len(segments.positions), 4, 8)
    found = attend_pages_plainly(query, pages, segments, scale=0.2, chunk=16)
    row = 0
    for part in segments.parts:
        for i in range(part.rows):
            position = part.first + i
            seen = range(position // 16 * 16, position + 1)
            keys = torch.stack([pages.keys[part.table[p // PAGE], :, :, p % PAGE] for p in seen], 1)
            values = torch.stack([pages.values[part.table[p // PAGE], :, p % PAGE] for p in seen], 1)
            alone = attend_plainly(query[row][:, None], keys, values, scale=0.2)
            assert torch.allclose(found[row], alone[:, 0], atol=1e-6)
            row += 1


def test_a_page_is_copied_whole():
    pages, _ = batch(2, 8, 8)
    pages.copy(3, 5)
    assert torch.equal(pages.keys[5], pages.keys[3])
    assert torch.equal(pages.values[5], pages.values[3])
