"""README.md and the pages of docs/: what they tell to type can be typed, and what they point to is there."""

import ast
import contextlib
import importlib.util
import io
import json
import re
import subprocess
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from swarm.errors import SwarmError
from tests.commands import parsed
from tests.pages import ADDRESS, ROOT, Command, Fence, Page, commands_in, logical_lines, pages

FENCES = [fence for page in pages() for fence in page.fences]
COMMANDS = [command for page in pages() for command in page.commands]

MODULES = ("swarm.client", "swarm.demo", "swarm.health", "swarm.server")
OPTION = re.compile(r"--[a-z][a-z-]*")
FILE = re.compile(r"[\w.-]+(?:/[\w.-]+)+\.(?:c|json|md|py|service|toml|ya?ml)|[\w.-]+(?:/[\w.-]+)*/")
MODULE = re.compile(r"python -m ((?:benchmarks|swarm)\.\w+)|`(benchmarks\.\w+)`")
VARIABLE = re.compile(r"\bSWARM(?:_[A-Z]+)+\b")
TARGET = re.compile(r"\bmake ([a-z]\w*)")


def named(one: object) -> str:
    return str(one) if not isinstance(one, Fence) else f"{one.page}:{one.line}"


def fences(*languages: str) -> Any:
    found = [fence for fence in FENCES if fence.language in languages]
    return pytest.mark.parametrize("fence", found, ids=named)


@pytest.mark.parametrize("command", COMMANDS, ids=named)
def test_commands_are_understood(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "swarm.toml").touch()
    monkeypatch.chdir(tmp_path)
    try:
        parsed(command.module, command.arguments, monkeypatch)
    except (SystemExit, SwarmError) as left:
        if not isinstance(left, SystemExit) or left.code:
            pytest.fail(f"{command}\n{capsys.readouterr().err or left}")


@pytest.mark.parametrize(
    "shell",
    [
        "python -m swarm.server --no-such-option",
        "python -m swarm.client --initial-peers ADDRESS",
        "python -m swarm.client route --model a b",
        "python -m swarm.client generate Hello --initial-peers here",
        "A=1 .venv/bin/python -m swarm.health \\\n  --port eighty | tee log",
        "python -m swarm.server --port 1 --host-maddrs /ip4/127.0.0.1/tcp/0",
    ],
)
def test_mistakes_would_be_found(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ((_, module, arguments),) = commands_in(shell)
    with pytest.raises((SystemExit, SwarmError)):
        parsed(module, arguments, monkeypatch)


def test_commands_are_found_in_a_script() -> None:
    script = "X=1  # python -m swarm.demo\ncd x && python -m swarm.client chat \\\n --initial-peers ADDRESS &"
    assert list(commands_in(script)) == [(1, "swarm.client", ("chat", "--initial-peers", ADDRESS))]
    assert [line for line, _ in logical_lines("a\\\nb\nc")] == [0, 2]


@cache
def options() -> frozenset[str]:
    """Every option that any command has, by its own help."""
    asked = [(module, ()) for module in MODULES]
    asked += [("swarm.client", (name,)) for name in importlib.import_module("swarm.client.__main__").COMMANDS]
    text = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(text):
        for module, command in asked:
            with contextlib.suppress(SystemExit):
                parsed(module, (*command, "--help"), patch)
    return frozenset(OPTION.findall(text.getvalue()))


@pytest.mark.parametrize("page", pages(), ids=named)
def test_options_exist(page: Page) -> None:
    spans = [(line, code) for line, code in page.code if code.startswith(("--", "python -m swarm."))]
    missing = [
        (line, option) for line, code in spans for option in OPTION.findall(code) if option not in options()
    ]
    assert not missing, missing


@pytest.mark.parametrize("page", pages(), ids=named)
def test_links_lead_somewhere(page: Page) -> None:
    by_path = {other.path: other for other in pages()}
    for line, target in page.links:
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (page.path.parent / name).resolve() if name else page.path
        assert path.exists(), f"{page}:{line} leads to {target}, which is not there"
        if anchor:
            assert anchor in by_path[path].anchors, (
                f"{page}:{line} leads to {target}, which has no such heading"
            )


@pytest.mark.parametrize("page", pages(), ids=named)
def test_files_that_are_named_exist(page: Page) -> None:
    rooms = {path.name for path in ROOT.iterdir() if path.is_dir()}
    named_files = [(line, code) for line, code in page.code if FILE.fullmatch(code)]
    missing = [
        (line, code)
        for line, code in named_files
        if code.split("/")[0] in rooms and not (ROOT / code).exists()
    ]
    assert not missing, missing


@pytest.mark.parametrize("page", pages(), ids=named)
def test_variables_are_those_of_options(page: Page) -> None:
    names = set(VARIABLE.findall(page.text)) - {"SWARM_CACHE"}
    assert {f"--{name.removeprefix('SWARM_').lower().replace('_', '-')}" for name in names} <= options()


@pytest.mark.parametrize("page", pages(), ids=named)
def test_modules_and_targets_that_are_named_exist(page: Page) -> None:
    for match in MODULE.finditer(page.text):
        assert importlib.util.find_spec(match[1] or match[2]) is not None, match[0]
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    typed = [fence.text for fence in page.fences if fence.language == "sh"] + [code for _, code in page.code]
    assert {target for text in typed for target in TARGET.findall(text)} <= targets


def test_every_fence_says_its_language() -> None:
    assert not [named(fence) for fence in FENCES if not fence.language]


def test_every_page_is_in_the_index() -> None:
    index = next(page for page in pages() if page.path == ROOT / "docs" / "README.md")
    listed = {(index.path.parent / target).resolve() for _, target in index.links}
    assert {page.path for page in pages()} - listed - {index.path, ROOT / "README.md"} == set()


@fences("sh")
def test_shell_is_shell(fence: Fence) -> None:
    done = subprocess.run(["bash", "-n"], input=fence.text, capture_output=True, text=True, timeout=10)
    assert done.returncode == 0, done.stderr


@fences("python")
def test_python_compiles(fence: Fence) -> None:
    compile(fence.text, named(fence), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@fences("json", "toml", "yaml")
def test_data_can_be_read(fence: Fence) -> None:
    read: dict[str, Callable[[str], Any]] = {
        "json": json.loads,
        "toml": tomllib.loads,
        "yaml": lambda text: list(yaml.safe_load_all(text)),
    }
    assert read[fence.language](fence.text)


def test_what_runs_is_shell_or_python() -> None:
    assert not [named(fence) for fence in FENCES if fence.is_run and fence.language not in ("sh", "python")]
