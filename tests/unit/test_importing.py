"""Imports look for no garbage, and leave the collector as they found it."""

import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Barrier, Thread

import pytest

from swarm.importing import imported, importing, importing_for_good


@pytest.fixture(autouse=True)
def collecting() -> Iterator[None]:
    gc.enable()
    yield
    gc.enable()


def test_the_collector_rests_until_the_last_import_has_ended() -> None:
    both_import, one_has_ended = Barrier(2), Barrier(2)

    def work() -> None:
        with importing():
            both_import.wait(10)
            one_has_ended.wait(10)

    other = Thread(target=work)
    with importing():
        other.start()
        both_import.wait(10)
    assert not gc.isenabled()
    one_has_ended.wait(10)
    other.join(10)
    assert gc.isenabled()


def test_a_collector_that_was_switched_off_stays_so() -> None:
    gc.disable()
    with importing():
        pass
    assert not gc.isenabled()


async def test_a_module_is_imported_without_collecting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "module_that_looks.py").write_text("import gc\n\ncollects = gc.isenabled()\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        module = await imported("module_that_looks")
    finally:
        sys.modules.pop("module_that_looks", None)
    assert not module.collects
    assert gc.isenabled()


async def test_the_collector_goes_on_after_an_import_that_failed() -> None:
    with pytest.raises(ModuleNotFoundError):
        await imported("swarm.no_such_module")
    assert gc.isenabled()


def test_a_command_never_looks_through_what_it_has_imported() -> None:
    gc.unfreeze()
    with importing_for_good():
        with importing():
            kept = [[] for _ in range(1000)]
        assert gc.get_freeze_count() > len(kept)
    gc.unfreeze()
    with importing():
        pass
    assert gc.get_freeze_count() == 0, "it ends with the command"
