"""hivemind without what only its training needs: importing any part of it would import torch, for seconds.

`import hivemind.p2p` first runs what `hivemind` and `hivemind.utils` say of themselves, and that imports all
of hivemind. Here these packages are there, and what they say of themselves is run when somebody asks them for
something; what the network needs of them is there at once. Nothing of hivemind is changed by this. To be
imported before hivemind is; does nothing where that has happened already.
"""

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

PACKAGES = ("hivemind", "hivemind.dht", "hivemind.utils")
"""Those whose `__init__` imports what needs torch."""

PROVIDED = {
    "hivemind.utils.logging": ("get_logger",),
    "hivemind.utils.serializer": ("MSGPackSerializer", "SerializerBase"),
    "hivemind.utils.timed_storage": (
        "DHTExpiration",
        "MAX_DHT_TIME_DISCREPANCY_SECONDS",
        "TimedStorage",
        "ValueWithExpiration",
        "get_dht_time",
    ),
}
"""What hivemind's network and DHT take from `hivemind.utils`, by the module that has it."""

ASKED_FOR = ("__all__", "__version__")


class _Postponed(ModuleType):
    """A package whose own code runs when it is first asked for a name that it does not have."""

    def __getattr__(self, name: str) -> Any:
        inner = sys.modules.get(f"{self.__name__}.{name}")
        if inner is not None:  # it is being imported
            return inner
        if name.startswith("__") and name not in ASKED_FOR:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        self.__class__ = ModuleType  # type: ignore[assignment]
        assert self.__spec__ is not None
        assert self.__spec__.loader is not None
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


def _postpone(name: str) -> ModuleType | None:
    spec = importlib.util.find_spec(name)
    if spec is None:
        return None
    module = importlib.util.module_from_spec(spec)
    module.__class__ = _Postponed
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)
    return module


def _slim() -> None:
    if "hivemind" in sys.modules:
        return
    packages = {name: _postpone(name) for name in PACKAGES}
    for source, names in PROVIDED.items():
        module = importlib.import_module(source)
        for name in names:
            setattr(packages["hivemind.utils"], name, getattr(module, name))


_slim()
