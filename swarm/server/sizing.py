"""How many blocks a server holds where nobody said which: as many as its memory allows.

The sums are done where blocks are loaded, by libraries that take seconds to import. Here is what can be told
without them: that a model is so small that all of it fits.
"""

from pathlib import Path

import psutil

from swarm.blocks.models import Model
from swarm.server.config import ServerConfig

GROWTH = 8
"""How many times what it takes in a file a weight may take in memory: four bits there, 32 here."""

KV_TOKENS = 8192
VALUE_BYTES = 4
SHARE = 0.5
"""The part of the free memory that a model which clearly fits takes at most, with KV for so many tokens."""

GPU = Path("/dev/nvidiactl")


def clearly_fits(model: Model, config: ServerConfig) -> bool:
    """Whether all blocks fit beyond doubt, as this machine is now."""
    if config.memory_limit is not None or (config.device != "cpu" and GPU.exists()):
        return False
    paths = [model.checkpoint.storage.path(file) for file in model.checkpoint.files]
    if not all(path is not None and path.exists() for path in paths):
        return False
    weights = sum(path.stat().st_size for path in paths if path is not None)
    kv = model.num_blocks * (config.kv_tokens or KV_TOKENS) * 2 * model.hidden_size * VALUE_BYTES
    return weights * GROWTH + kv <= psutil.virtual_memory().available * SHARE
