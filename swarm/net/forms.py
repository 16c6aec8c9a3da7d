"""In which form tensors travel: their numbers, how those are packed, and how many bytes that takes."""

from math import prod
from typing import Literal, TypeAlias

Dtype: TypeAlias = Literal["uint32", "float32", "bfloat16", "float16", "int8"]
Codec: TypeAlias = Literal["raw", "scaled", "blocks"]
Wire: TypeAlias = Literal["exact", "half", "int8"]
"""How activations travel: as they are computed, or rounded to 16 bits a value, or to 8 in blocks of 32."""

FORMS: frozenset[tuple[Dtype, Codec]] = frozenset(
    {
        ("float32", "raw"),
        ("bfloat16", "raw"),
        ("float16", "raw"),
        ("float16", "scaled"),
        ("int8", "blocks"),
    }
)
"""In which activations can travel."""

ITEM_BYTES: dict[str, int] = {"uint32": 4, "float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
BLOCK_VALUES = 32
"""Values of a token that share one float16 scale in the codec `blocks`."""


def tensor_bytes(shape: tuple[int, ...], dtype: Dtype, codec: Codec) -> int:
    """Bytes of a tensor on the wire. Scales come before the values, those of all tokens together.

    `scaled` has one float32 a token, `blocks` one float16 for every `BLOCK_VALUES` values of a token.
    """
    values = prod(shape) * ITEM_BYTES[dtype]
    if codec == "scaled":
        return values + 4 * shape[0]
    if codec == "blocks":
        return values + 2 * shape[0] * -(-shape[-1] // BLOCK_VALUES)
    return values
