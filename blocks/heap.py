"""The C heap of this process, which keeps what was freed until it is asked to give it back.

Knows nothing of shards: whoever has just freed much, and will not need it again soon, calls.
"""

import ctypes


def give_back_freed_memory() -> None:
    """Return freed memory to the system where the C library can (glibc); elsewhere do nothing.

    Loading frees many tensors between those that stay, which leaves holes that later small allocations
    would never fill. Takes milliseconds and keeps other threads from allocating meanwhile.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # musl and macOS lack it, Windows has no such library
        return
    trim(0)
