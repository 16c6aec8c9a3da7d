"""The programs that paged_triton starts on the GPU: what each does with its tile. Knows of no tensor's owner.

A tile is some rows of one segment with `FOLD` of the `GROUP` query heads of a KV head, folded to `QUERIES`
rows of a matrix product. Names in capitals are known when a program is compiled. Keys come as `KEYS` dims
and the `REST`, both powers of two; what is beyond `KEY_DIM` is masked. Scores, the softmax and the sums are
float32, and scores are in units of log2.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
NOTHING = tl.constexpr(-1e30)
"""The score of what has no weight; finite, so that differences of two stay numbers."""


@triton.jit(do_not_specialize=["table_width", "rows", "segments", "halvings"])
def append_rows(
    keys: tl.tensor,
    values: tl.tensor,
    new_keys: tl.tensor,
    new_values: tl.tensor,
    starts: tl.tensor,
    firsts: tl.tensor,
    tables: tl.tensor,
    table_width: tl.tensor,
    rows: tl.tensor,
    segments: tl.tensor,
    halvings: tl.tensor,
    key_strides: tl.tuple,
    value_strides: tl.tuple,
    new_key_strides: tl.tuple,
    new_value_strides: tl.tuple,
    PAGE: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    there = row < rows
    low = tl.zeros((ROWS,), tl.int32)
    high = low + segments
    for _ in range(halvings):  # the last segment that starts at the row or before it
        middle = (low + high) // 2
        before = tl.load(starts + middle) <= row
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    position = tl.load(firsts + low) + row - tl.load(starts + low)
    page = tl.load(tables + low * table_width + position // PAGE, mask=there, other=0)
    page, token = page.to(tl.int64), position % PAGE

    dim = tl.arange(0, KEYS)
    mask = (dim < KEY_DIM)[:, None] & there[None, :]
    source = row[None, :] * new_key_strides[0] + head * new_key_strides[1] + dim[:, None] * new_key_strides[2]
    target = page * key_strides[0] + head * key_strides[1] + token * key_strides[3]
    key = tl.load(new_keys + source, mask=mask)
    tl.store(keys + target[None, :] + dim[:, None] * key_strides[2], key, mask=mask)

    dim = tl.arange(0, VALUES)
    mask = there[:, None] & (dim < VALUE_DIM)[None, :]
    source = row[:, None] * new_value_strides[0] + head * new_value_strides[1] + dim * new_value_strides[2]
    target = page * value_strides[0] + head * value_strides[1] + token * value_strides[2]
    value = tl.load(new_values + source, mask=mask)
    tl.store(values + target[:, None] + dim[None, :] * value_strides[3], value, mask=mask)


@triton.jit
def _find_tile(
    at: tl.tensor, starts: tl.tensor, segments: tl.tensor, LEAST: tl.constexpr, ROWS: tl.constexpr
) -> tl.tensor:
    """The segment of tile `at`, the rows in it, and the first of them that is the tile's.

    Segments of few rows are a tile each. Others begin at tile `start // ROWS + segment`, which leaves
    them room for all their rows; some tiles stay without rows.
    """
    low = at
    if LEAST > 1:
        low = 0
        high = segments
        while high - low > 1:
            middle = (low + high) // 2
            if tl.load(starts + middle) // ROWS + middle <= at:
                low = middle
            else:
                high = middle
    start = tl.load(starts + low)
    rows = tl.load(starts + low + 1) - start
    first = 0 if LEAST == 1 else (at - start // ROWS - low) * ROWS
    return low, start, rows, first


@triton.jit
def _find_slot(start: tl.tensor, row: tl.tensor, LEAST: tl.constexpr, ROWS: tl.constexpr) -> tl.tensor:
    """Where the parts of `row` of the segment that begins at row `start` of the batch are put down."""
    if LEAST == 1:
        return tl.program_id(0) * ROWS + row
    return start + row


@triton.jit
def _find_heads(each: tl.tensor, GROUP: tl.constexpr, FOLD: tl.constexpr) -> tl.tensor:
    """The KV head of this program, the query head of `each` row of its product, and whether there is one."""
    FOLDS: tl.constexpr = (GROUP + FOLD - 1) // FOLD
    kv_head = tl.program_id(1) // FOLDS
    inside = tl.program_id(1) % FOLDS * FOLD + each % FOLD
    return kv_head, kv_head * GROUP + inside, inside < GROUP


@triton.jit
def _load_masked(
    at: tl.tensor, dim: tl.tensor, mask: tl.tensor, strides: tl.tuple, DIM: tl.constexpr
) -> tl.tensor:
    """Rows [rows, dims] of a tensor whose dims are its third."""
    return tl.load(
        at[:, None] + dim[None, :] * strides[2], mask=mask[:, None] & (dim < DIM)[None, :], other=0.0
    )


@triton.jit
def _load_keys(
    at: tl.tensor, column: tl.tensor, dim: tl.tensor, strides: tl.tuple, ALL: tl.constexpr, DIM: tl.constexpr
) -> tl.tensor:
    """Keys [dims, positions]; whether `ALL` these dims are there is known beforehand."""
    at += dim[:, None] * strides[2] + column[None, :]
    if ALL:
        return tl.load(at)
    return tl.load(at, mask=(dim < DIM)[:, None], other=0.0)


@triton.jit
def _tanh(x: tl.tensor) -> tl.tensor:
    """Near 0 by its series, where the difference of exponentials would lose digits."""
    square = x * x
    series = 1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    return tl.where(square < 0.0625, x * series, 2 * tl.sigmoid(2 * x) - 1)


@triton.jit
def _begin_sums(
    sinks: tl.tensor, head: tl.tensor, part: tl.tensor, there: tl.tensor, QUERIES: tl.constexpr
) -> tl.tensor:
    """The highest score and the sum of weights before any position; the first part counts the sinks."""
    highest = tl.full((QUERIES,), NOTHING, tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + head, mask=there, other=0.0).to(tl.float32) * LOG2E
        sink = tl.where(part == 0, sink, float("-inf"))
        highest = tl.maximum(sink, NOTHING)
        total = tl.exp2(sink - highest)
    return highest, total


@triton.jit
def _lowest(position: tl.tensor, window: tl.tensor, chunk: tl.tensor) -> tl.tensor:
    """The first position that the query at `position` sees."""
    lowest = position * 0
    if window is not None:
        lowest = tl.maximum(lowest, position - window + 1)
    if chunk is not None:
        lowest = tl.maximum(lowest, position // chunk * chunk)
    return lowest


@triton.jit(do_not_specialize=["table_width", "segments", "most", "parts"])
def attend_tile(
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    out: tl.tensor,
    weights: tl.tensor,
    starts: tl.tensor,
    firsts: tl.tensor,
    tables: tl.tensor,
    table_width: tl.tensor,
    segments: tl.tensor,
    most: tl.tensor,
    parts: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    chunk: tl.tensor,
    softcap: tl.tensor,
    sinks: tl.tensor,
    query_strides: tl.tuple,
    key_strides: tl.tuple,
    value_strides: tl.tuple,
    out_strides: tl.tuple,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEYS: tl.constexpr,
    REST: tl.constexpr,
    VALUES: tl.constexpr,
    PAGE: tl.constexpr,
    PAGES: tl.constexpr,
    GROUP: tl.constexpr,
    FOLD: tl.constexpr,
    QUERIES: tl.constexpr,
    LEAST: tl.constexpr,
) -> None:
    """One tile over one part of its pages, for a segment of `LEAST` to `most` rows.

    Without `weights` there is one part, and `out` is the result; else `out` are the part's sums, normalised,
    [slots, heads, parts, VALUE_DIM], and `weights` [slots, heads, parts] in log2 what they count for.
    """
    ROWS: tl.constexpr = QUERIES // FOLD
    FOLDS: tl.constexpr = (GROUP + FOLD - 1) // FOLD
    part = tl.program_id(2)
    segment, start, rows, tile = _find_tile(tl.program_id(0), starts, segments, LEAST, ROWS)
    if (rows < LEAST) | (rows > most) | (tile >= rows):
        return
    each = tl.arange(0, QUERIES)
    row = tile + each // FOLD
    kv_head, head, is_head = _find_heads(each, GROUP, FOLD)
    there = (each < ROWS * FOLD) & (row < rows) & is_head
    key_dim = tl.arange(0, KEYS)
    value_dim = tl.arange(0, VALUES)
    query_at = query + (start + row) * query_strides[0] + head * query_strides[1]
    asked = _load_masked(query_at, key_dim, there, query_strides, KEY_DIM)
    if REST:
        rest_dim = KEYS + tl.arange(0, REST)
        asked_rest = _load_masked(query_at, rest_dim, there, query_strides, KEY_DIM)

    first = tl.load(firsts + segment)
    length = first + tl.minimum(rows, tile + ROWS)
    position = first + row
    lowest = _lowest(position, window, chunk)
    begin = _lowest(first + tile, window, chunk) // PAGE
    end = tl.cdiv(length, PAGE)
    part_pages = tl.cdiv(end - begin, parts * PAGES) * PAGES
    begin += part * part_pages
    end = tl.minimum(end, begin + part_pages)

    highest, total = _begin_sums(sinks, head, part, there, QUERIES)
    summed = tl.zeros((QUERIES, VALUES), tl.float32)
    keys_at = keys + kv_head * key_strides[1]
    values_at = values + kv_head * value_strides[1] + value_dim[None, :]
    ahead = tl.arange(0, PAGES * PAGE)
    token = ahead % PAGE
    pages_at = tables + segment * table_width + ahead // PAGE
    page = tl.load(pages_at + begin, mask=begin + ahead // PAGE < end, other=0).to(tl.int64)
    for at in range(begin, end, PAGES):
        seen = at * PAGE + ahead
        column = tl.multiple_of(tl.max_contiguous(page * key_strides[0] + token, PAGE), PAGE)
        key = _load_keys(keys_at, column, key_dim, key_strides, KEY_DIM >= KEYS, KEY_DIM)
        scores = tl.dot(asked, key, input_precision="ieee")
        if REST:
            rest = _load_keys(keys_at, column, rest_dim, key_strides, KEY_DIM == KEYS + REST, KEY_DIM)
            scores = tl.dot(asked_rest, rest, scores, input_precision="ieee")
        scores *= scale
        if softcap is not None:
            scores = softcap * _tanh(scores / softcap)
        visible = (seen[None, :] <= position[:, None]) & (seen[None, :] >= lowest[:, None])
        scores = tl.where(visible, scores, float("-inf"))

        higher = tl.maximum(highest, tl.max(scores, 1))
        share = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(highest - higher)
        total = total * fade + tl.sum(share, 1)
        highest = higher

        line = page * value_strides[0] + token * value_strides[2]
        written = (seen < length)[:, None] & (value_dim < VALUE_DIM)[None, :]
        value = tl.load(values_at + line[:, None], mask=written, other=0.0)
        following = at + PAGES
        page = tl.load(pages_at + following, mask=following + ahead // PAGE < end, other=0).to(tl.int64)
        summed = tl.dot(share.to(value.dtype), value, summed * fade[:, None], input_precision="ieee")

    total = tl.maximum(total, 1e-37)
    result = summed / total[:, None]
    kept = there[:, None] & (value_dim < VALUE_DIM)[None, :]
    if weights is None:
        out_at = out + (start + row)[:, None] * out_strides[0] + head[:, None] * out_strides[1]
        tl.store(out_at + value_dim[None, :] * out_strides[2], result.to(out.dtype.element_ty), mask=kept)
    else:
        slot = _find_slot(start, row, LEAST, ROWS)
        sums_at = (slot * (tl.num_programs(1) // FOLDS * GROUP) + head) * parts + part
        tl.store(out + sums_at[:, None] * VALUE_DIM + value_dim[None, :], result, mask=kept)
        tl.store(weights + sums_at, highest + tl.log2(total), mask=there)


@triton.jit(do_not_specialize=["segments", "most", "parts"])
def combine_parts(
    sums: tl.tensor,
    weights: tl.tensor,
    out: tl.tensor,
    starts: tl.tensor,
    segments: tl.tensor,
    most: tl.tensor,
    parts: tl.tensor,
    out_strides: tl.tuple,
    VALUE_DIM: tl.constexpr,
    VALUES: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    FOLD: tl.constexpr,
    QUERIES: tl.constexpr,
    LEAST: tl.constexpr,
) -> None:
    """One row and head of a tile: the sums of its parts, at most `PARTS`, by their weights."""
    ROWS: tl.constexpr = QUERIES // FOLD
    FOLDS: tl.constexpr = (GROUP + FOLD - 1) // FOLD
    each = tl.program_id(2)
    _, start, rows, tile = _find_tile(tl.program_id(0), starts, segments, LEAST, ROWS)
    row = tile + each // FOLD
    _, head, is_head = _find_heads(each, GROUP, FOLD)
    if (rows < LEAST) | (rows > most) | (row >= rows) | (is_head == 0):
        return
    part = tl.arange(0, PARTS)
    value_dim = tl.arange(0, VALUES)
    slot = _find_slot(start, row, LEAST, ROWS)
    sums_at = (slot * (tl.num_programs(1) // FOLDS * GROUP) + head) * parts + part
    weight = tl.load(weights + sums_at, mask=part < parts, other=float("-inf"))
    share = tl.exp2(weight - tl.max(weight, 0))
    inside = value_dim < VALUE_DIM
    summed = tl.load(
        sums + sums_at[:, None] * VALUE_DIM + value_dim[None, :],
        mask=(part < parts)[:, None] & inside[None, :],
        other=0.0,
    )
    result = tl.sum(summed * share[:, None], 0) / tl.sum(share, 0)
    out_at = out + (start + row) * out_strides[0] + head * out_strides[1]
    tl.store(out_at + value_dim * out_strides[2], result.to(out.dtype.element_ty), mask=inside)
