"""Compile the Triton programs for GPUs that are not here, and print what each takes, a JSON line each.

    python -m tests.compile_triton

Triton's interpreter runs programs that its compiler refuses, so this is checked on its own; and on its own
in a process, since one that interprets does not compile.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from swarm.kernels.paged_triton import APPENDED, MOST_HEADS, MOST_PARTS, Tiling, key_dims, tilings
from swarm.kernels.triton_programs import append_rows, attend_tile, combine_parts

CAPABILITIES = (80, 90)
DTYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
SHAPES = (
    (torch.bfloat16, 4, 128, 128, {}),
    (torch.bfloat16, 5, 80, 80, {"sinks": "*bf16", "window": "i32", "chunk": "i32", "softcap": "fp32"}),
    (torch.bfloat16, 128, 576, 512, {}),
    (torch.float32, 4, 128, 128, {}),
)
"""dtype, query heads of a KV head, dims of keys and values, and the types of what is there of the options."""

OPTIONS = ("window", "chunk", "softcap", "sinks")
KV_HEADS = 8


def compiled(program: Any, values: dict[str, Any], capability: int, **options: Any) -> int:
    """Compile `program` and return the bytes of shared memory it takes.

    `values` are the types of its arguments, the strides of tensors as tuples, and what is known beforehand.
    """
    signature: dict[str, Any] = {}
    known: dict[tuple[int, ...], Any] = {}
    aligned: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, name in enumerate(program.arg_names):
        value = values[name]
        if isinstance(value, tuple):
            known |= {(index, at): 1 for at, stride in enumerate(value) if stride == 1}
            aligned |= {
                (index, at): [["tt.divisibility", 16]] for at, stride in enumerate(value) if stride % 16 == 0
            }
            signature[name] = tuple("constexpr" if stride == 1 else "i32" for stride in value)
        elif isinstance(value, str):
            signature[name] = value
            if value.startswith("*"):
                aligned[index,] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            known[index,] = value
    source = ASTSource(program, signature, known, aligned)
    target = GPUTarget("cuda", capability, 32)
    made = triton.compile(source, target=target, options={"enable_fp_fusion": True, **options})
    return int(made.metadata.shared)


def programs(
    dtype: torch.dtype, group: int, key_dim: int, value_dim: int, options: dict[str, str]
) -> Iterator[tuple[str, Any, dict[str, Any], dict[str, int]]]:
    """Name, program, values and Triton's options of everything that attention on such heads starts."""
    pointer, heads, fold = DTYPES[dtype], group * KV_HEADS, min(group, MOST_HEADS)
    numbers = ("table_width", "rows", "segments", "halvings", "most", "parts")
    padded = -(-value_dim // 16) * 16
    known = {
        **dict.fromkeys(("query", "keys", "values", "new_keys", "new_values"), pointer),
        **dict.fromkeys(("starts", "firsts", "tables"), "*i32"),
        **dict.fromkeys(numbers, "i32"),
        **dict.fromkeys(OPTIONS),
        **options,
        "scale": "fp32",
        "query_strides": (heads * key_dim, key_dim, 1),
        "new_key_strides": (KV_HEADS * key_dim, key_dim, 1),
        "new_value_strides": (KV_HEADS * value_dim, value_dim, 1),
        "key_strides": (KV_HEADS * key_dim * 32, key_dim * 32, 32, 1),
        "value_strides": (KV_HEADS * 32 * padded, 32 * padded, padded, 1),
        "out_strides": (heads * value_dim, value_dim, 1),
        "PAGE": 32,
        "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim,
        "GROUP": group,
        "FOLD": fold,
        "VALUES": max(16, triton.next_power_of_2(value_dim)),
    }
    appended = {**known, "ROWS": APPENDED, "KEYS": triton.next_power_of_2(key_dim)}
    yield "append", append_rows, appended, {}
    whole, rest = key_dims(key_dim)
    few, many = tilings(key_dim, value_dim, dtype)

    def tile(tiling: Tiling, least: int) -> dict[str, Any]:
        sizes = {"PAGES": tiling.pages, "QUERIES": tiling.queries, "KEYS": whole, "REST": rest}
        return {**known, **sizes, "LEAST": least, "PARTS": MOST_PARTS}

    parted = {**tile(few, 1), "out": "*fp32", "weights": "*fp32"}
    yield "few rows in parts", attend_tile, parted, launched(few)
    yield "combine", combine_parts, {**parted, "out": pointer, "sums": "*fp32"}, {}
    whole_tile = {**tile(many, few.queries // fold + 1), "out": pointer, "weights": None}
    yield "many rows", attend_tile, whole_tile, launched(many)


def launched(tiling: Tiling) -> dict[str, int]:
    return {"num_warps": tiling.warps, "num_stages": tiling.stages}


def main() -> None:
    for capability in CAPABILITIES:
        for *shape, options in SHAPES:
            for name, program, values, how in programs(*shape, options):
                shared = compiled(program, values, capability, **how)
                line = {"capability": capability, "shape": str(shape), "program": name, "shared": shared}
                sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
