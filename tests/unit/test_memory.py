"""What a shard will take: planned from numbers, refused with numbers, and as much as loading then takes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swarm.blocks import memory
from swarm.blocks.architecture import load_config
from swarm.blocks.families import KVShape
from swarm.blocks.memory import (
    FREE_KV_FRACTION,
    MARGIN_BYTES,
    MAX_FREE_KV_TOKENS,
    BlockBytes,
    MemoryPlan,
    Room,
    compute_bytes,
    loading_bytes,
    plan,
    plan_memory,
    size,
)
from swarm.blocks.models import resolve
from swarm.blocks.precision import Precision, choose_precision
from swarm.blocks.shard import MAX_IN_FLIGHT, load_span
from swarm.errors import InputError
from swarm.page_keys import PAGE_TOKENS
from swarm.spans import Span

GIB, MIB = 2**30, 2**20
CPU = torch.device("cpu")
BLOCK = BlockBytes(stored=200 * MIB, staged=210 * MIB, placed=100 * MIB, kv_token=1024)


def make(blocks, free, *, compute=0, kv_tokens=None, kv_fraction=1.0, max_kv_tokens=None) -> MemoryPlan:
    room = Room(free, "--memory-limit 3.0 GiB", kv_fraction, max_kv_tokens)
    return plan(blocks, compute, room, kv_tokens, "Blocks 0:9 of X", "float16")


def test_what_is_left_becomes_whole_pages_of_kv():
    work = loading_bytes([BLOCK] * 10) + MARGIN_BYTES
    found = make([BLOCK] * 10, 1000 * MIB + work + 70 * 10 * 1024)

    assert found == MemoryPlan(1000 * MIB, work, 10 * 1024, 64)
    assert found.total_bytes == 1000 * MIB + work + 64 * 10 * 1024


def test_without_a_limit_a_fraction_becomes_kv_and_no_more_than_enough():
    work = loading_bytes([BLOCK]) + MARGIN_BYTES
    free = 100 * MIB + work + 400 * MIB

    assert make([BLOCK], free, kv_fraction=0.25).kv_tokens == 100 * MIB // 1024
    assert make([BLOCK], free, kv_fraction=0.25, max_kv_tokens=1000).kv_tokens == 992


def test_work_space_serves_loading_and_then_batches():
    loading = loading_bytes([BLOCK])

    assert make([BLOCK], GIB, compute=loading - 1).work_bytes == loading + MARGIN_BYTES
    assert make([BLOCK], GIB, compute=loading + 1).work_bytes == loading + 1 + MARGIN_BYTES


def test_loading_reads_ahead_of_one_block_but_not_far():
    assert loading_bytes([BLOCK] * 10) == (210 + 200) * MIB
    assert loading_bytes([BLOCK, replace(BLOCK, stored=400 * MIB, staged=410 * MIB)]) == (410 + 400) * MIB
    assert loading_bytes([BLOCK] * 1000) == 210 * MIB + MAX_IN_FLIGHT


def test_the_tokens_asked_for_are_kept_though_memory_comes_in_pages():
    fixed = 100 * MIB + loading_bytes([BLOCK]) + MARGIN_BYTES

    found = make([BLOCK], fixed + 2 * PAGE_TOKENS * 1024, kv_tokens=33, max_kv_tokens=1, kv_fraction=0.01)
    assert (found.kv_tokens, found.kv_bytes) == (33, 2 * PAGE_TOKENS * 1024)
    with pytest.raises(InputError):
        make([BLOCK], fixed + 2 * PAGE_TOKENS * 1024 - 1, kv_tokens=33)


def test_blocks_that_keep_nothing_take_as_many_tokens_as_they_like():
    assert make([replace(BLOCK, kv_token=0)], GIB).kv_tokens == MAX_FREE_KV_TOKENS


def test_a_span_that_does_not_fit_is_refused_with_the_numbers_and_with_what_would():
    with pytest.raises(InputError) as refused:
        make([BLOCK] * 20, 1610 * MIB)
    assert refused.value.message == (
        "Blocks 0:9 of X take 2.0 GiB as float16, 506 MiB work space, and 640 KiB for 32 tokens: "
        "that does not fit --memory-limit 3.0 GiB."
    )
    assert "The first 11 of them fit" in refused.value.hint
    make([BLOCK] * 11, 1610 * MIB)


def test_blocks_of_different_sizes_are_counted_one_by_one():
    small, large = replace(BLOCK, placed=10 * MIB), replace(BLOCK, placed=GIB)

    with pytest.raises(InputError, match="does not fit") as refused:
        make([small, small, small, large], GIB)
    assert "The first 3 of them fit" in refused.value.hint


@pytest.mark.parametrize("free", [-GIB, 0, 200 * MIB])
def test_not_even_one_block_fits(free):
    with pytest.raises(InputError) as refused:
        make([BLOCK] * 3, free)
    assert "Not one of its blocks fits" in refused.value.hint


def test_one_page_of_kv_must_fit():
    fixed = 100 * MIB + loading_bytes([BLOCK]) + MARGIN_BYTES

    assert make([BLOCK], fixed + PAGE_TOKENS * 1024).kv_tokens == PAGE_TOKENS
    with pytest.raises(InputError, match="for 32 tokens"):
        make([BLOCK], fixed + PAGE_TOKENS * 1024 - 1)


def test_too_many_tokens_asked_for_are_told_how_many_fit():
    fixed = 100 * MIB + loading_bytes([BLOCK]) + MARGIN_BYTES

    with pytest.raises(InputError, match=r"and 1\.0 GiB for 1048576 tokens") as refused:
        make([BLOCK], fixed + 100 * 1024, kv_tokens=2**20)
    assert "--kv-tokens 96 or less" in refused.value.hint


@given(
    count=st.integers(1, 40),
    placed=st.integers(1, GIB),
    stored=st.integers(1, GIB),
    kv_token=st.integers(1, 2**20),
    free=st.integers(0, 64 * GIB),
    kv_tokens=st.none() | st.integers(1, 2**20),
)
def test_a_plan_keeps_to_its_room_and_refuses_only_what_does_not_fit(
    count, placed, stored, kv_token, free, kv_tokens
):
    blocks = [BlockBytes(stored, stored, placed, kv_token)] * count
    try:
        found = make(blocks, free, kv_tokens=kv_tokens)
    except InputError:
        least = (kv_tokens or 1) + -(kv_tokens or 1) % PAGE_TOKENS
        work = loading_bytes(blocks) + MARGIN_BYTES
        assert count * placed + work + count * least * kv_token > free
    else:
        assert found.total_bytes <= free
        assert kv_tokens in (None, found.kv_tokens)
        assert kv_tokens or found.total_bytes + PAGE_TOKENS * count * kv_token > free


class Config:
    hidden_size, intermediate_size, num_attention_heads = 10, 100, 4


def test_work_space_grows_with_rows_and_with_the_widest_part():
    shapes = [KVShape(2, 8, 8)]
    base = compute_bytes(Config, shapes, 1, 4)

    assert compute_bytes(Config, shapes, 7, 4) == 7 * base
    assert compute_bytes(Config, shapes, 1, 2) < base
    assert compute_bytes(Config, [*shapes, KVShape(2, 16, 8)], 1, 4) > base
    experts = type("Experts", (Config,), {"num_experts_per_tok": 8, "moe_intermediate_size": 50})
    assert compute_bytes(experts, shapes, 1, 4) - base == 4 * 4 * (8 * 50 - 100)


@pytest.mark.parametrize(
    ("count", "text"),
    [(3 * GIB + GIB // 10, "3.1 GiB"), (600 * MIB, "600 MiB"), (5000, "5 KiB"), (0, "0 KiB")],
)
def test_sizes_are_read_by_people(count, text):
    assert size(count) == text


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "nf4"])
@pytest.mark.parametrize("family", ["Llama", "Mixtral", "Qwen3Next"])
def test_weights_are_planned_as_they_then_lie_in_memory(checkpoint_of, tmp_path, family, dtype):
    model, span = resolve(str(checkpoint_of(family)[0]), cache_dir=tmp_path), Span(1, 4)
    precision = precision_of(dtype)
    planned = planned_for(model, span, precision, kv_tokens=64).weight_bytes

    loaded = load_span(model, span, precision, CPU)
    tensors = {t.data_ptr(): t.nbytes for t in (*loaded.layers.parameters(), *loaded.layers.buffers())}
    tables = 64 * len(tensors) if dtype == "nf4" else 0  # of the sixteen values, with each weight
    assert planned <= sum(tensors.values()) <= planned + tables


def precision_of(dtype: str) -> Precision:
    if dtype == "nf4":
        pytest.importorskip("bitsandbytes")
    quantised = dtype in ("int8", "nf4")
    return choose_precision(
        "float32" if quantised else dtype, CPU, torch.float32, dtype if quantised else "none"
    )


def planned_for(model, span, precision, **options) -> MemoryPlan:
    given = {"kv_tokens": None, "memory_limit": None, "max_vram": None, "device": CPU, "max_rows": 256}
    return plan_memory(model, span, precision, load_config(str(model.path)), **(given | options))


@pytest.fixture
def model(checkpoint_of, tmp_path):
    return resolve(str(checkpoint_of("Llama")[0]), cache_dir=tmp_path)


def test_what_the_process_takes_already_counts(model, monkeypatch):
    precision = choose_precision("float32", CPU, torch.float32)
    free, taken = 8 * GIB, 400 * MIB
    monkeypatch.setattr(memory, "_available", lambda: free)
    monkeypatch.setattr(memory, "_taken", lambda: taken)

    def plan_for(**options) -> MemoryPlan:
        return planned_for(model, Span(0, 6), precision, **options)

    unlimited, limited = plan_for(), plan_for(memory_limit=GIB)
    assert unlimited.kv_tokens == MAX_FREE_KV_TOKENS
    assert limited.kv_token_bytes == 6 * 2 * (8 + 16) * 4  # values are padded to 16
    assert taken + limited.total_bytes <= GIB < taken + limited.total_bytes + 32 * limited.kv_token_bytes
    assert plan_for(memory_limit=100 * GIB).total_bytes <= free
    with pytest.raises(InputError, match=r"--memory-limit 500 MiB, of which 400 MiB are taken already"):
        plan_for(memory_limit=500 * MIB, kv_tokens=2**20)
    free = 300 * MIB
    assert plan_for().kv_tokens < MAX_FREE_KV_TOKENS
    with pytest.raises(InputError, match="the 300 MiB of memory that are free"):
        plan_for(memory_limit=GIB, kv_tokens=2**20)


def test_a_gpu_has_room_of_its_own(model, monkeypatch):
    precision = choose_precision("float32", CPU, torch.float32)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * GIB, 8 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 100 * MIB)
    monkeypatch.setattr(memory, "_available", lambda: GIB)
    monkeypatch.setattr(memory, "_taken", lambda: 400 * MIB)

    def plan_for(**options) -> MemoryPlan:
        return planned_for(model, Span(0, 6), precision, device=torch.device("cuda"), **options)

    assert 100 * MIB + plan_for(max_vram=2 * GIB).total_bytes == pytest.approx(2 * GIB, rel=1e-4)
    assert plan_for(max_vram=16 * GIB).total_bytes == pytest.approx(4 * GIB, rel=1e-4)
    assert plan_for().kv_bytes <= 4 * GIB * FREE_KV_FRACTION
    with pytest.raises(InputError, match="--max-vram-mb 150"):
        plan_for(max_vram=150 * MIB)
    with pytest.raises(InputError, match=r"take \d+ MiB work space: .* --memory-limit 450 MiB"):
        plan_for(memory_limit=450 * MIB)
