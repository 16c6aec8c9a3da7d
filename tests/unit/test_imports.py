"""The import rules: which room may use which, what only one file may touch, and what nobody may."""

import ast
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

MAY_IMPORT: dict[str, set[str]] = {
    "swarm.kernels": set(),
    "swarm.blocks": {"swarm.kernels"},
    "swarm.net": set(),
    "swarm.dht": {"swarm.net"},
    "swarm.client": {"swarm.dht", "swarm.net", "swarm.blocks", "swarm.kernels"},
    "swarm.client.diagnose": {"swarm.client", "swarm.dht", "swarm.net"},
    "swarm.client.http": {"swarm.client"},
    "swarm.client.model": {"swarm.client", "swarm.blocks"},
    "swarm.server": {"swarm.dht", "swarm.net", "swarm.blocks", "swarm.kernels"},
    "swarm.health": {"swarm.dht", "swarm.net"},
    "swarm.demo": {"swarm.blocks", "swarm.client", "swarm.server"},
    "swarm.__main__": {"swarm.client", "swarm.demo", "swarm.health", "swarm.server"},
    "swarm": {"swarm.client", "swarm.client.model"},  # the library's front door, opened when first asked for
}
LEAVES = {
    "swarm.allowance",
    "swarm.baton",
    "swarm.errors",
    "swarm.fork_server",
    "swarm.forking",
    "swarm.spans",
    "swarm.version",
    "swarm.cache",
    "swarm.cli",
    "swarm.config_text",
    "swarm.configuring",
    "swarm.help_text",
    "swarm.importing",
    "swarm.listening",
    "swarm.option_values",
    "swarm.page_files",
    "swarm.page_keys",
    "swarm.parsing",
    "swarm.processes",
    "swarm.sampling",
}

ONLY_HERE = {
    "hivemind.p2p": {"swarm.net.libp2p", "swarm.net.control"},
    "hivemind.p2p.p2p_daemon_bindings.utils": {"swarm.net.control"},
    "hivemind.utils.multiaddr": {"swarm.net.multiaddrs"},
    "hivemind.dht.node": {"swarm.dht.kademlia"},
    "hivemind.dht.storage": {"swarm.dht.node_storage"},
    "hivemind.dht": {"swarm.dht.kademlia", "swarm.dht.node_storage"},
}
FORBIDDEN = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "tests", "benchmarks"}

HEAVY = {
    "torch",
    "transformers",
    "hivemind",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
    "gguf",
    "numpy",
    "rich",
    "shtab",
    "uvloop",
}
"""Packages that may be imported inside a function, since not everybody who imports the module needs them."""

DOORS = {
    "swarm",
    "swarm.__main__",
    "swarm.client.__main__",
    "swarm.server.__main__",
    "swarm.health.__main__",
    "swarm.demo",
    "swarm.fork_server",
}
"""Where a process starts: these import nothing heavy, and rooms of ours only once they are needed."""

TOO_HEAVY_TO_START = {
    "torch",
    "transformers",
    "hivemind",
    "huggingface_hub",
    "numpy",
    "rich",
    "prompt_toolkit",
}

MODULE_NAME = re.compile(r"swarm\.\w+\.\w+")


@dataclass(frozen=True)
class Import:
    """One import of `target`, or a module's name as text, which is how modules are imported late."""

    module: str
    target: str
    line: int
    in_function: bool = False
    for_types: bool = False
    as_text: bool = False

    def __str__(self) -> str:
        return f"{self.module}, line {self.line}: {self.target}"


def packages() -> dict[str, Path]:
    """The rooms and their folders, as pyproject.toml maps them."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders: dict[str, str] = tool["package-dir"]
    return {name: ROOT / folders.get(name, name.replace(".", "/")) for name in tool["packages"]}


@cache
def sources() -> dict[str, ast.Module]:
    """Every module of the package, parsed."""
    found = {}
    for package, folder in packages().items():
        for file in sorted(folder.glob("*.py")):
            name = package if file.stem == "__init__" else f"{package}.{file.stem}"
            found[name] = ast.parse(file.read_text(), str(file))
    return found


def imports_of(module: str, tree: ast.Module, known: set[str]) -> list[Import]:
    found: list[Import] = []

    def visit(node: ast.AST, in_function: bool, for_types: bool) -> None:
        def add(target: str) -> None:
            found.append(Import(module, target, getattr(node, "lineno", 0), in_function, for_types))

        if isinstance(node, ast.Import):
            for alias in node.names:
                add(alias.name)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}, line {node.lineno}: imports are written in full"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                add(full if full in known else str(node.module))
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and MODULE_NAME.fullmatch(node.value)
        ):
            found.append(Import(module, node.value, node.lineno, as_text=True))
        for field, value in ast.iter_fields(node):
            children = value if isinstance(value, list) else [value]
            for child in children:
                if isinstance(child, ast.AST):
                    typed = (
                        isinstance(node, ast.If)
                        and field == "body"
                        and "TYPE_CHECKING" in ast.dump(node.test)
                    )
                    inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                    visit(child, in_function or inside, for_types or typed)

    visit(tree, False, False)
    return found


@cache
def imports() -> tuple[Import, ...]:
    known = set(sources())
    return tuple(one for module, tree in sources().items() for one in imports_of(module, tree, known))


def room(module: str) -> str:
    """The longest part of a module's name that has rules of its own."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if name in LEAVES or name in MAY_IMPORT:
            return name
    raise AssertionError(f"{module} belongs to no room")


def breaks_the_table(one: Import) -> bool:
    if one.target.split(".")[0] != "swarm":
        return False
    own, other = room(one.module), room(one.target)
    if other in LEAVES or own == other:
        return False
    return other not in MAY_IMPORT.get(own, set())


def is_at_start(one: Import) -> bool:
    """Whether importing the module runs it."""
    return not (one.in_function or one.for_types or one.as_text)


def says(broken: list[Import]) -> str:
    return "\n".join(str(one) for one in broken)


def test_every_room_has_a_row_in_the_table() -> None:
    rooms = set(packages()) - {"swarm"}
    assert rooms <= set(MAY_IMPORT), f"without rules: {rooms - set(MAY_IMPORT)}"
    top_level = {name for name in sources() if name.count(".") == 1 and name not in rooms}
    assert top_level <= LEAVES | set(MAY_IMPORT), f"without rules: {top_level - LEAVES - set(MAY_IMPORT)}"


def test_rooms_import_only_what_lies_below_them() -> None:
    broken = [one for one in imports() if breaks_the_table(one)]
    assert not broken, says(broken)


@pytest.mark.parametrize(
    ("line", "is_broken"),
    [
        ("import swarm.client.api", True),
        ("from swarm.server import cell", True),
        ("def f():\n    from swarm.dht.records import sign", True),
        ("late('swarm.client.route')", True),
        ("from swarm import cli", False),
        ("from swarm.kernels.codecs import to_wire", False),
        ("import torch", False),
    ],
)
def test_the_table_is_enforced(line: str, is_broken: bool) -> None:
    found = imports_of("swarm.blocks.x", ast.parse(line), {"swarm.server.cell", "swarm.cli"})
    assert [breaks_the_table(one) for one in found] == [is_broken]


def test_modules_import_each_other_in_no_circle() -> None:
    graph: dict[str, set[str]] = {}
    for one in imports():
        if one.target in sources() and is_at_start(one) and one.target != "swarm":
            graph.setdefault(one.module, set()).add(one.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


@pytest.mark.parametrize(("package", "only_modules"), ONLY_HERE.items())
def test_each_part_of_hivemind_is_adapted_in_its_place(package: str, only_modules: set[str]) -> None:
    users = {one.module for one in imports() if one.target == package or one.target.startswith(f"{package}.")}
    assert users == only_modules


def test_nobody_else_imports_hivemind() -> None:
    adapters = set().union(*ONLY_HERE.values())
    broken = [
        one for one in imports() if one.target.split(".")[0] == "hivemind" and one.module not in adapters
    ]
    assert not broken, says(broken)


def test_nobody_unpickles_or_imports_tests() -> None:
    broken = [one for one in imports() if one.target.split(".")[0] in FORBIDDEN]
    assert not broken, says(broken)


def test_nobody_runs_code_that_a_model_brings() -> None:
    for module, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant), f"{module}, line {node.lineno}"
                assert node.value.value is False, f"{module}, line {node.lineno}"
            if isinstance(node, ast.Attribute) and node.attr == "load" and isinstance(node.value, ast.Name):
                assert node.value.id != "torch", f"{module}, line {node.lineno}: torch.load unpickles"


def test_imports_stand_at_the_top_unless_they_are_heavy() -> None:
    broken = [one for one in imports() if one.in_function and not may_be_late(one)]
    assert not broken, says(broken)


def may_be_late(one: Import) -> bool:
    top = one.target.split(".")[0]
    return top in HEAVY or (top == "swarm" and one.module in DOORS)


def test_a_command_starts_without_anything_heavy() -> None:
    code = f"""
import sys, importlib
for module in sys.argv[1:]:
    importlib.import_module(module)
    print(module, *sorted({TOO_HEAVY_TO_START!r} & set(sys.modules)))
"""
    doors = [
        "swarm",
        "swarm.__main__",
        "swarm.cli",
        "swarm.processes",
        "swarm.client.__main__",
        "swarm.server.__main__",
        "swarm.health.__main__",
        "swarm.demo",
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *doors], capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout.splitlines() == doors
