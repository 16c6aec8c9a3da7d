"""In which numbers a shard is held and computed, chosen once from what was asked and what the machine has."""

from dataclasses import dataclass

import torch

from swarm.errors import InputError
from swarm.kernels.linear import can_keep_half

CHOICES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Precision:
    """How a shard computes.

    `name` is what is announced. Activations are `dtype` and travel as `wire_dtype` with `codec`. Weights
    are `dtype` too, but for the linears on a CPU: those are lean, with weights as `linear_dtype`.
    """

    name: str
    dtype: torch.dtype
    linear_dtype: torch.dtype | None
    wire_dtype: str
    codec: str


def choose_device(asked: str) -> torch.device:
    """`auto` takes CUDA where there is one.

    Raises:
        InputError: the device is unknown or not there.
    """
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise InputError(f"'{asked}' is not a device.", "Use auto, cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"This machine has no device {asked}.", "Use --device cpu, or auto.")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"The device {asked} is not supported.", "Use auto, cpu, cuda or cuda:N.")
    return device


def choose_precision(asked: str, device: torch.device, stored: torch.dtype) -> Precision:
    """Decide on the precision of a shard on `device` whose checkpoint is stored as `stored`.

    `auto` keeps what the checkpoint holds: 16-bit weights stay 16-bit (packed for float32 activations on
    a CPU that can, else bfloat16 on CUDA), anything else runs in float32.

    Raises:
        InputError: `asked` is not one of `CHOICES`, or this CPU cannot do it.
    """
    if asked not in CHOICES:
        raise InputError(f"'{asked}' is not a dtype.", f"Use one of {', '.join(CHOICES)}.")
    on_cpu = device.type == "cpu"
    if asked == "auto":
        is_small = stored in (torch.bfloat16, torch.float16)
        if on_cpu:
            asked = "float16" if is_small and can_keep_half() else "float32"
        else:
            asked = ("float16" if stored == torch.float16 else "bfloat16") if is_small else "float32"
    if asked == "float16" and on_cpu:
        if not can_keep_half():
            raise InputError(
                "This CPU has no fast float16 weights (AVX2 is needed).", "Use --dtype float32 or bfloat16."
            )
        return Precision("float16", torch.float32, torch.float16, "float32", "raw")
    if asked == "float16":
        return Precision("float16", torch.float16, None, "float16", "scaled")
    lean = torch.float32 if asked == "float32" and on_cpu else None
    return Precision(asked, getattr(torch, asked), lean, asked, "raw")
