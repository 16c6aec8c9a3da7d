"""Importing what takes seconds: off the event loop, and without looking for garbage meanwhile.

Imports make objects by the hundred thousand and hardly any garbage. The interpreter would look for some again
and again as they become more, which is a quarter of the processor time that torch and transformers take.
"""

import asyncio
import gc
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

_changing = Lock()
_under_way = 0
_collects_after = False


@contextmanager
def importing() -> Iterator[None]:
    """Within it, in whatever thread, no garbage is looked for."""
    global _under_way, _collects_after
    with _changing:
        if _under_way == 0:
            _collects_after = gc.isenabled()
            gc.disable()
        _under_way += 1
    try:
        yield
    finally:
        with _changing:
            _under_way -= 1
            if _under_way == 0 and _collects_after:
                gc.enable()


async def imported(module: str) -> Any:
    """The module of that name, imported in a thread."""
    return await asyncio.to_thread(_import, module)


def _import(module: str) -> Any:
    with importing():
        return importlib.import_module(module)
