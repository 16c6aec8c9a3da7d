"""Checkpoints whose weights are stored quantised: which formats are read, and their tensors made plain.

Each tensor becomes what the format says it stands for, whatever it is then computed in, so that such a
checkpoint runs wherever a plain one does. Knows nothing of models. torch is imported when tensors are made
plain, so that a server can tell an unreadable format before it pays for that import.
"""

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from swarm.errors import InputError

if TYPE_CHECKING:
    import torch

Tensors = dict[str, "torch.Tensor"]

MXFP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""What the sixteen 4-bit codes stand for (E2M1). Source: OCP Microscaling Formats, section 5.3.3."""

SCALE_BIAS = 127
"""A byte of an E8M0 scale is the power of two plus this."""


def stored_format(config: Mapping[str, Any]) -> str | None:
    """The format that a raw config says the weights are stored in; None where they are plain.

    Raises:
        InputError: they are stored in a format that is not read here.
    """
    quantised = config.get("quantization_config")
    if quantised is None:
        return None
    method = quantised.get("quant_method") if isinstance(quantised, Mapping) else None
    if method not in FORMATS:
        raise InputError(
            f"The weights are stored quantised as '{method}', which is not read here.",
            f"Choose a checkpoint that is not quantised, or in one of these formats: {', '.join(FORMATS)}.",
        )
    return str(method)


def make_plain(
    tensors: Tensors, format_name: str | None, config: Mapping[str, Any], dtype: "torch.dtype"
) -> Tensors:
    """The tensors of a block, stored as `format_name`, with the names and values of a plain checkpoint.

    Those that were quantised come as `dtype`. Empties `tensors` on the way, to hold little twice. `config`
    is the raw one.

    Raises:
        InputError: a tensor lacks what it takes to read it, or does not fit it.
    """
    if format_name is None:
        return tensors
    try:
        return FORMATS[format_name](tensors, config["quantization_config"], dtype)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise InputError(
            f"The {format_name} weights of this checkpoint cannot be read: {str(error).splitlines()[0]}",
            "The config.json and the weights are not of the same model: get both again.",
        ) from error


def _fp8(tensors: Tensors, quantised: Mapping[str, Any], dtype: "torch.dtype") -> Tensors:
    """8-bit floats in tiles that share a scale, as DeepSeek-V3 has them: `weight` and `weight_scale_inv`."""
    plain: Tensors = {}
    for name in sorted(tensors):
        if name.endswith("_scale_inv") or name not in tensors:
            continue
        value = tensors.pop(name)
        if value.element_size() == 1:
            scales = tensors.pop(f"{name}_scale_inv").float()
            value = _tiled(value, scales, quantised.get("weight_block_size")).to(dtype)
        plain[name] = value
    return plain


def _tiled(value: "torch.Tensor", scales: "torch.Tensor", tile: Any) -> "torch.Tensor":
    """[..., rows, columns] times the scale of the tile that a value lies in; tiles at the edge may be cut."""
    wide = value.float()
    if scales.numel() == 1:
        return wide.mul_(scales.reshape(()))
    height, width = tile
    rows = scales.repeat_interleave(height, dim=-2)[..., : value.shape[-2], :]
    return wide.mul_(rows.repeat_interleave(width, dim=-1)[..., : value.shape[-1]])


def _mxfp4(tensors: Tensors, quantised: Mapping[str, Any], dtype: "torch.dtype") -> Tensors:
    """4-bit floats, 32 to a power of two, as GPT-OSS stores its experts: `x_blocks` and `x_scales`."""
    plain: Tensors = {}
    for name in sorted(tensors):
        if name.endswith("_scales") or name not in tensors:
            continue
        value = tensors.pop(name)
        if name.endswith("_blocks"):
            name = name.removesuffix("_blocks")
            value = _experts(value, tensors.pop(f"{name}_scales"), dtype)
        plain[name] = value
    return plain


def _experts(packed: "torch.Tensor", scales: "torch.Tensor", dtype: "torch.dtype") -> "torch.Tensor":
    """[experts, rows, groups, 16] bytes and a scale a group to [experts, columns, rows]."""
    import torch

    values = torch.tensor(MXFP4_VALUES)
    experts, rows, groups, count = packed.shape
    out = torch.empty(experts, groups * count * 2, rows, dtype=dtype)
    for expert in range(experts):
        pairs = torch.stack((packed[expert] & 15, packed[expert] >> 4), -1).flatten(-2)
        powers = torch.ldexp(torch.ones(()), scales[expert].int() - SCALE_BIAS)[..., None]
        out[expert] = (values[pairs.int()] * powers).flatten(1).T
    return out


def _bitsandbytes(tensors: Tensors, quantised: Mapping[str, Any], dtype: "torch.dtype") -> Tensors:
    """As bitsandbytes saves: 4-bit codes with their state, or 8-bit integers with the largest of a row."""
    plain: Tensors = {}
    for name in sorted(tensors):
        if ".weight." in name or name.endswith((".SCB", ".weight_format")):
            continue
        value = tensors.pop(name)
        largest = tensors.get(f"{name.removesuffix('weight')}SCB")
        state = next((other for other in tensors if other.startswith(f"{name}.quant_state.")), None)
        if state is not None:
            value = _codes(value, name, tensors, json.loads(bytes(tensors[state].tolist()))).to(dtype)
        elif largest is not None and name.endswith(".weight"):
            value = value.float().mul_(largest.float()[:, None] / 127).to(dtype)
        plain[name] = value
    tensors.clear()
    return plain


def _codes(packed: "torch.Tensor", name: str, tensors: Tensors, state: Mapping[str, Any]) -> "torch.Tensor":
    """Two codes a byte, the first in the high bits; the scales may be codes themselves."""
    import torch

    scales = tensors[f"{name}.absmax"]
    if "nested_blocksize" in state:
        nested = tensors[f"{name}.nested_quant_map"][scales.int()].view(-1)
        outer = tensors[f"{name}.nested_absmax"].repeat_interleave(state["nested_blocksize"])
        scales = nested * outer[: len(nested)] + state["nested_offset"]
    codes = torch.stack((packed.flatten() >> 4, packed.flatten() & 15), -1).flatten()
    values = tensors[f"{name}.quant_map"].float()[codes.int()]
    values *= scales.float().repeat_interleave(state["blocksize"])[: len(values)]
    return values[: torch.Size(state["shape"]).numel()].view(state["shape"])


FORMATS: Mapping[str, Callable[[Tensors, Mapping[str, Any], "torch.dtype"], Tensors]] = {
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "bitsandbytes": _bitsandbytes,
}
