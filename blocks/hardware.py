"""What this machine computes with, as a text: machines of the same text compute about equally fast.

Light to import.
"""

import os
import platform
from pathlib import Path

CPU = Path("/proc/cpuinfo")
GPUS = Path("/proc/driver/nvidia/gpus")


def hardware(cpu: Path = CPU, gpus: Path = GPUS) -> str:
    """The processor, its cores, and the GPUs by the names that they give themselves."""
    models = [_value(gpu / "information", "Model") for gpu in sorted(gpus.glob("*"))]
    name = _value(cpu, "model name") or platform.processor() or platform.machine()
    return ", ".join([f"{name} x {os.cpu_count()}", *filter(None, models)])


def _value(file: Path, key: str) -> str:
    """The first value of `key` in a file of lines `key: value`; empty where there is none."""
    try:
        lines = file.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in pairs if name.strip() == key), "")
