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
_is_for_good = False


@contextmanager
def importing_for_good() -> Iterator[None]:
    """For a process of ours: in what there is once imports end no garbage is ever looked for.

    Nor in anything afterwards, as the interpreter would when it ends, for seconds.
    """
    global _is_for_good
    _is_for_good = True
    try:
        yield
    finally:
        _is_for_good = False
        gc.freeze()


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
            if _under_way == 0 and _is_for_good:
                gc.freeze()
            if _under_way == 0 and _collects_after:
                gc.enable()


async def imported(module: str) -> Any:
    """The module of that name, imported in a thread."""
    return await asyncio.to_thread(_import, module)


def _import(module: str) -> Any:
    with importing():
        return importlib.import_module(module)
