"""Swarm: run language models too big for any one of your machines, together.

`swarm.connect` joins a swarm from async code, `swarm.connect_sync` from a notebook or a script, and
`swarm.AutoDistributedModelForCausalLM` is a model of transformers over it. All are loaded when first asked
for, so that `import swarm` stays light.
"""

from typing import TYPE_CHECKING, Any

from swarm.errors import InputError, SwarmError
from swarm.version import VERSION as __version__

if TYPE_CHECKING:
    from swarm.client.api import connect, connect_sync
    from swarm.client.model.causal_lm import AutoDistributedModelForCausalLM

__all__ = [
    "AutoDistributedModelForCausalLM",
    "InputError",
    "SwarmError",
    "__version__",
    "connect",
    "connect_sync",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'swarm' has no attribute '{name}'")
    from swarm.importing import importing

    with importing():
        if name == "AutoDistributedModelForCausalLM":
            from swarm.client.model.causal_lm import AutoDistributedModelForCausalLM

            return AutoDistributedModelForCausalLM
        from swarm.client import api
    return getattr(api, name)
