"""Giving freed memory back: what it saves, and that it harms nobody who cannot."""

import ctypes
import platform

import psutil
import pytest

from swarm.blocks.heap import give_back_freed_memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives freed memory back")
def test_holes_between_what_stays_are_given_back():
    process = psutil.Process()
    pieces = [bytes([1]) * 100_000 for _ in range(600)]
    del pieces[::2], pieces[::2]
    before = process.memory_info().rss
    give_back_freed_memory()
    assert before - process.memory_info().rss > 30_000_000
    assert all(piece == bytes([1]) * 100_000 for piece in pieces)


@pytest.mark.parametrize("failure", [AttributeError, OSError, TypeError])
def test_a_c_library_that_cannot_is_left_alone(monkeypatch, failure):
    def library(name):
        raise failure

    monkeypatch.setattr(ctypes, "CDLL", library)
    give_back_freed_memory()
