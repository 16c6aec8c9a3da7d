"""The values of options: read from what people write, and written as people would.

A text that means nothing is refused with what it should look like. Knows no option.
"""

import argparse
import math
import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

PEERS_VARIABLE = "SWARM_INITIAL_PEERS"

ADDRESS_START = re.compile(r"/(ip4|ip6|dns|dns4|dns6|dnsaddr)/|swarm1\w{40,}\Z")
INVITATION_START = "swarm1"
"""How every invitation begins, its version included."""

_DURATION_UNITS = {"": 1.0, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_SIZE_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def addresses(text: str) -> tuple[str, ...]:
    """Peer addresses separated by spaces or commas, each naming the peer it leads to; or invitations.

    What an invitation holds is checked where it is used: it is a secret, and not to be repeated in an error.
    """
    found = tuple(part for part in re.split(r"[\s,]+", text) if part)
    for address in found:
        is_address = ADDRESS_START.match(address) and "/p2p/" in address
        if not is_address and not is_invitation(address):
            raise argparse.ArgumentTypeError(
                f"'{address}' is not the address of a peer; it looks like /ip4/192.0.2.1/tcp/4001/p2p/PEER"
            )
    return found


def is_invitation(value: object) -> bool:
    """Whether it is meant to be an invitation."""
    return isinstance(value, str) and value.startswith(INVITATION_START)


def names(text: str) -> tuple[str, ...]:
    """Names with commas between them."""
    found = tuple(name.strip() for name in text.split(","))
    if not all(found):
        raise argparse.ArgumentTypeError(f"'{text}' is no list of names; write it like one,another")
    return found


def file_path(text: str) -> Path:
    return Path(text).expanduser()


def duration(text: str) -> float:
    """Seconds from `"30"`, `"1.5s"`, `"200ms"`, `"2m"` or `"1h"`; more than zero."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|)", text.strip())
    seconds = float(match[1]) * _DURATION_UNITS[match[2]] if match else 0.0
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is not a time; write it like 30, 90s or 2m")
    return seconds


def size(text: str) -> int:
    """Bytes from `"512MB"` (powers of 1000), `"2GiB"` (powers of 1024) or a plain number; more than zero."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt]?)(i?)b?)", text.strip().lower())
    if match and match[3] and not match[2]:
        match = None
    scale = (1024 if match[3] else 1000) ** _SIZE_UNITS[match[2]] if match else 0
    found = Decimal(match[1]) * scale if match else Decimal(0)
    if not 1 <= found < 2**63:
        raise argparse.ArgumentTypeError(f"'{text}' is not a size; write it like 512MB or 2GiB")
    return int(found)


def room(text: str) -> int:
    """Bytes as `size` reads them, or 0 for none."""
    return 0 if text.strip() == "0" else size(text)


def count(text: str) -> int:
    """A whole number of at least one."""
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)


def whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number") from None


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number") from None


def port(text: str) -> int:
    """A TCP port, or 0 for a free one."""
    if not (text.isdecimal() and int(text) < 65536):
        raise argparse.ArgumentTypeError(f"'{text}' is not a port; ports go from 0 to 65535")
    return int(text)


TEXTS: tuple[Callable[[str], Any] | None, ...] = (None, str, file_path, addresses, names)
"""The readers whose values are texts; all others read numbers too."""


def spelled(value: object, read: Callable[[str], Any] | None) -> bool | int | float | str:
    """`value` in the shortest form that `read` reads as the same value."""
    if read in (size, room) and isinstance(value, int):
        return _spelled_size(value)
    if read is duration and isinstance(value, float):
        return _spelled_duration(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, bool | int | float) else str(value)


def _spelled_size(count: int) -> int | str:
    for unit in ("TiB", "GiB", "MiB", "KiB", "TB", "GB", "MB", "KB"):
        if count >= size(f"1{unit}") and count % size(f"1{unit}") == 0:
            return f"{count // size(f'1{unit}')}{unit}"
    return count


def _spelled_duration(seconds: float) -> str:
    for unit in ("h", "m", "s"):
        whole = round(seconds / _DURATION_UNITS[unit])
        if whole > 0 and whole * _DURATION_UNITS[unit] == seconds:
            return f"{whole}{unit}"
    return f"{Decimal(repr(seconds)):f}"
