"""In which numbers a shard is held and computed, chosen once from what was asked and what the machine has."""

import logging
from dataclasses import dataclass

import torch

from swarm.errors import InputError
from swarm.kernels.linear import can_keep_half
from swarm.kernels.quantised import QUANTISATIONS, has_bitsandbytes

logger = logging.getLogger(__name__)

CHOICES = ("auto", "float32", "bfloat16", "float16")
QUANTIZE_CHOICES = ("none", *QUANTISATIONS)


@dataclass(frozen=True)
class WireForm:
    """Activations travel as `wire_dtype` with `codec`, as `swarm.kernels.codecs` has them."""

    wire_dtype: str
    codec: str


@dataclass(frozen=True)
class Precision:
    """How a shard computes.

    `name` is what is announced. Activations are `dtype` and travel as `wire_dtype` with `codec`. Weights
    are `dtype` too, but for the linears on a CPU: those are lean, with weights as `linear_dtype`. Where
    `quantization` is not `none`, linears and experts keep their weights so instead.
    """

    name: str
    dtype: torch.dtype
    linear_dtype: torch.dtype | None
    wire_dtype: str
    codec: str
    quantization: str = "none"

    def wire_form(self, wish: str) -> WireForm:
        """How activations travel: `exact`, as they are computed, `half`, in 16 bits a value, or `int8`."""
        if wish == "int8":
            return WireForm("int8", "blocks")
        if wish == "half" and self.wire_dtype == "float32":
            return WireForm("float16", "scaled")
        return WireForm(self.wire_dtype, self.codec)


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


def choose_precision(
    asked: str, device: torch.device, stored: torch.dtype, quantize: str = "none"
) -> Precision:
    """Decide on the precision of a shard on `device` whose checkpoint is stored as `stored`.

    `auto` keeps what the checkpoint holds: 16-bit weights stay 16-bit (packed for float32 activations on
    a CPU that can, else bfloat16 on CUDA), anything else runs in float32. With `quantize` the dtype is that
    of activations alone.

    Raises:
        InputError: `asked` is not one of `CHOICES` or `quantize` of `QUANTIZE_CHOICES`, this CPU cannot do
            it, or a package is missing.
    """
    if asked not in CHOICES:
        raise InputError(f"'{asked}' is not a dtype.", f"Use one of {', '.join(CHOICES)}.")
    on_cpu = device.type == "cpu"
    if quantize != "none":
        return _quantised(asked, on_cpu, stored, quantize)
    if asked == "auto":
        asked = _closest(stored, can_be_half=not on_cpu or can_keep_half(), on_cpu=on_cpu)
    if asked == "float16" and on_cpu:
        if not can_keep_half():
            raise InputError(
                "This CPU has no fast float16 weights (AVX2 is needed).", "Use --dtype float32 or bfloat16."
            )
        return Precision("float16", torch.float32, torch.float16, "float32", "raw")
    lean = torch.float32 if asked == "float32" and on_cpu else None
    return Precision(asked, getattr(torch, asked), lean, asked, _codec(asked))


def _quantised(asked: str, on_cpu: bool, stored: torch.dtype, quantize: str) -> Precision:
    if quantize not in QUANTIZE_CHOICES:
        raise InputError(f"'{quantize}' is not a quantisation.", f"Use one of {', '.join(QUANTIZE_CHOICES)}.")
    if quantize == "nf4" and not has_bitsandbytes():
        raise InputError(
            "nf4 needs the package bitsandbytes, which is not installed.",
            'Install it with: pip install "swarm-llm[quant]", or use --quantize int8.',
        )
    if asked == "float16" and on_cpu:
        raise InputError(
            f"On a CPU {quantize} weights go with float32 or bfloat16 activations, not float16.",
            "Use --dtype auto, or --quantize none.",
        )
    if on_cpu:
        logger.warning("%s weights save memory, not time: float16 is faster on a CPU", quantize)
    name = asked if asked != "auto" else _closest(stored, can_be_half=not on_cpu, on_cpu=on_cpu)
    return Precision(name, getattr(torch, name), None, name, _codec(name), quantize)


def _closest(stored: torch.dtype, *, can_be_half: bool, on_cpu: bool) -> str:
    """The dtype that keeps what a checkpoint holds, where that can be fast."""
    if stored not in (torch.bfloat16, torch.float16) or not can_be_half:
        return "float32"
    return "float16" if on_cpu or stored == torch.float16 else "bfloat16"


def _codec(name: str) -> str:
    return "scaled" if name == "float16" else "raw"
