"""Starting a command as a shell would, as far as it reads what it was given."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence

import pytest

from swarm import cli
from swarm.server.config import config_from


def parsed(module: str, arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What `python -m MODULE ARGUMENTS` does before it begins.

    Raises:
        SystemExit: it does not understand the arguments, or has done all that they ask for.
        SwarmError: it cannot use them.
    """
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    begun = []
    monkeypatch.setattr(cli, "run", lambda main, args, *_, **__: begun.append(args) or 0)
    main_of(module)()
    if module == "swarm.server":
        config_from(*begun)


def main_of(module: str) -> Callable[[], int]:
    """What `python -m` runs."""
    found = importlib.util.find_spec(module)
    assert found is not None, f"there is no {module}"
    name = f"{module}.__main__" if found.submodule_search_locations else module
    main: Callable[[], int] = importlib.import_module(name).main
    return main
