"""A server whose results are a tenth noise, and which says it is fast: `python -m tests.lying_server`."""

import sys
from typing import Any

from benchmarks.liars import Noisy
from swarm.blocks.engine import Engine
from swarm.server.__main__ import main

load = Engine.load


async def lying(*args: Any, **kwargs: Any) -> Any:
    return Noisy(await load(*args, **kwargs))


Engine.load = lying  # type: ignore[method-assign,assignment]

if __name__ == "__main__":
    sys.exit(main())
