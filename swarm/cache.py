"""Where this user's files lie that can be made again: models, histories, peers remembered."""

import os
from pathlib import Path


def cache_folder(chosen: Path | None = None) -> Path:
    """`chosen`, SWARM_CACHE, or `swarm` in the user's cache."""
    if chosen is not None:
        return chosen.expanduser()
    if configured := os.environ.get("SWARM_CACHE"):
        return Path(configured).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "swarm"
