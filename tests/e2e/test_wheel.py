"""The wheel: it holds exactly the tree's files, and its commands run from anywhere."""

import os
import resource
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
STARTS = 3
HELP_COSTS = 0.5
"""Seconds of processor time that `--help` takes at most; the best of `STARTS`: the first one reads files."""

BUILT = ("__pycache__", "*.so")
"""What building leaves in the tree, and what is never packed from there."""

COMPILED = "native"
"""The folder of C sources, which the wheel carries compiled."""

COMMANDS = [
    ["swarm.demo"],
    ["swarm.server"],
    ["swarm.health"],
    ["swarm.client"],
    ["swarm.client", "chat"],
    ["swarm.client", "generate"],
    ["swarm.client", "peers"],
]


def folders() -> dict[str, Path]:
    """Each folder of the package, as it is called in the wheel, and where it lies in the tree."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    mapped = {name: ROOT / folder for name, folder in tool["package-dir"].items()}
    return {"swarm": ROOT / "swarm"} | {name.replace(".", "/"): folder for name, folder in mapped.items()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tree, so that nothing built earlier gets into it."""
    copy, target = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for file in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    for folder in folders().values():
        shutil.copytree(folder, copy / folder.name, ignore=shutil.ignore_patterns(*BUILT))
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(target), str(copy)],
        check=True,
        capture_output=True,
        timeout=100,
    )
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel, which borrows the dependencies of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    site_packages = next(folder.glob("lib/python*/site-packages"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site_packages)
    borrowed = f"import sys; sys.path.append({sysconfig.get_path('purelib')!r})\n"
    (site_packages / "borrowed.pth").write_text(borrowed)
    return folder / "bin" / "python"


def test_the_wheel_holds_the_files_of_the_tree(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name and not is_built(name)}
    in_tree = {
        f"{name}/{file.relative_to(folder)}"
        for name, folder in folders().items()
        for file in folder.rglob("*")
        if file.is_file() and COMPILED not in file.parts and not is_built(file)
    }
    assert packed == in_tree


def is_built(file: Path | str) -> bool:
    return any(fnmatch(part, pattern) for part in Path(file).parts for pattern in BUILT)


@pytest.mark.skipif(shutil.which("cc") is None, reason="without a compiler the wheel has no native kernels")
def test_the_wheel_holds_the_native_kernels(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (native,) = [name for name in archive.namelist() if name.endswith(".so")]
    assert native.startswith("swarm/kernels/_native.")


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
        licences = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
    assert "License-Expression: Apache-2.0" in text
    assert len(licences) == 1


def run(python: Path, arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [str(python), *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )


def test_the_package_comes_from_the_wheel(python: Path, tmp_path: Path) -> None:
    code = "import swarm, swarm.client, swarm.kernels; print(swarm.__file__, swarm.client.__file__)"
    done = run(python, ["-c", code], tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(file.startswith(str(python.parents[1])) for file in done.stdout.split())


def test_folders_named_like_rooms_shadow_nothing(python: Path, tmp_path: Path) -> None:
    for name in ("client", "kernels", "blocks", "dht"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('imported by mistake')")
    done = run(
        python, ["-c", "import swarm.client.__main__, swarm.server.__main__, swarm.blocks.models"], tmp_path
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_answers_at_once(command: list[str], python: Path, tmp_path: Path) -> None:
    seconds = []
    for _ in range(STARTS):
        before = processor_seconds()
        done = run(python, ["-m", *command, "--help"], tmp_path)
        seconds.append(processor_seconds() - before)
        assert done.returncode == 0, done.stderr
        assert f"usage: python -m {' '.join(command)}" in done.stdout
    assert min(seconds) < HELP_COSTS


def processor_seconds() -> float:
    """What the processes that were started here and have ended took."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("module", ["swarm.demo", "swarm.server", "swarm.health", "swarm.client"])
def test_a_wrong_option_is_refused(module: str, python: Path, tmp_path: Path) -> None:
    done = run(python, ["-m", module, "--no-such-option"], tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["error", "hint"]
