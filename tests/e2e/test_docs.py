"""The pages walked through as a reader does: what is marked to run is typed, and prints what they show.

The quick start's servers stay for the other pages. What those have in common with it is not typed again.
Nothing is adapted but addresses and ports.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pages import ROOT, Fence, Page, pages

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

QUICK_START = Page(ROOT / "docs" / "quick-start.md")
OTHERS = [page for page in pages() if page != QUICK_START and any(fence.is_run for fence in page.fences)]

STAYS = re.compile(r"python -m swarm\.(?:server|health|client serve)\b.*\n")
IS_READY = re.compile(r"^(?:Serving\b|Health page: |\S+ answers at )", re.MULTILINE)
LOCAL_ADDRESS = re.compile(r"/ip4/127\.0\.0\.1/tcp/\d+/p2p/\w+")
PORT = re.compile(r"\b(?:8000|8080|9100|31330)\b")
OWN_PORT = {"swarm.client serve": "8000", "swarm.health": "8080"}
"""Where commands listen that are not told."""

OPTIONS = {name for name in os.environ if name.startswith("SWARM_")} - {"SWARM_CACHE"}

TYPED = "What is the capital of France?\n"
"""What the reader says to a command that asks."""

READY_WITHIN = 90.0
DONE_WITHIN = 90.0
LEFT_WITHIN = 45.0

PROGRAM = """\
import ast, asyncio, inspect, pathlib, sys
text = pathlib.Path(sys.argv[1]).read_text()
code = compile(text, sys.argv[1], "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
result = eval(code, {"__name__": "__main__"})
if inspect.iscoroutine(result):
    asyncio.run(result)
"""
"""Runs what may also be typed into a notebook, where one may await at the top level."""


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


class Terminal:
    """A terminal in which a command goes on until Ctrl-C."""

    def __init__(self, command: str, environment: dict[str, str], folder: Path):
        self._shown = folder / f"{time.monotonic_ns()}.log"
        with self._shown.open("w") as log:
            self.process = subprocess.Popen(
                ["bash", "-c", command],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        return self._shown.read_text()

    def wait_for(self, pattern: re.Pattern[str]) -> str:
        """What it shows that matches, as soon as it does."""
        deadline = time.monotonic() + READY_WITHIN
        while (found := pattern.search(self.text)) is None:
            assert self.process.poll() is None, self.text
            assert time.monotonic() < deadline, self.text
            time.sleep(0.1)
        return found[0]

    def interrupt(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Reader:
    """Somebody who types what the pages say."""

    def __init__(self, folder: Path):
        self.terminals: list[Terminal] = []
        self._folder = folder
        self._starting: list[tuple[Terminal, Fence]] = []
        self._ports: defaultdict[str, str] = defaultdict(free_port)
        self._typed: set[str] = set()
        self._environment = {
            **{name: value for name, value in os.environ.items() if name not in OPTIONS},
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }

    def walk(self, page: Page) -> None:
        """Type all that is marked on the page and was not typed before, and see what it prints.

        Commands come first, then all of the page's Python as one program.
        """
        for fence in page.fences:
            if fence.is_run and fence.language == "sh" and self._is_new(fence.text):
                self._type(fence)
        programs = [fence for fence in page.fences if fence.is_run and fence.language == "python"]
        if programs and self._is_new("\n".join(fence.text for fence in programs)):
            self._run(programs)
        self._see_what_started()

    def _is_new(self, text: str) -> bool:
        is_new = text not in self._typed
        self._typed.add(text)
        return is_new

    def _adapted(self, fence: Fence) -> str:
        address = self.terminals[0].wait_for(LOCAL_ADDRESS) if self.terminals else ""
        return self._with_ports(fence.at(address))

    def _with_ports(self, text: str) -> str:
        return PORT.sub(lambda port: self._ports[port[0]], text)

    def _type(self, fence: Fence) -> None:
        text = self._adapted(fence)
        if STAYS.fullmatch(text.replace("\\\n", "")) is None:
            self._see(fence, self._done(["bash", "-euo", "pipefail", "-c", text]))
            return
        for command, port in OWN_PORT.items():
            if command in text and "--port" not in text:
                text = f"{text.rstrip()} --port {self._ports[port]}"
        self.terminals.append(Terminal(text, self._environment, self._folder))
        self._starting.append((self.terminals[-1], fence))

    def _run(self, programs: list[Fence]) -> None:
        file = self._folder / "program.py"
        file.write_text("\n".join(map(self._adapted, programs)))
        printed = self._done([sys.executable, "-c", PROGRAM, str(file)])
        for fence in programs:
            self._see(fence, printed)

    def _done(self, command: list[str]) -> str:
        """What a command prints that ends by itself, once those before it are there."""
        self._see_what_started()
        done = subprocess.run(
            command,
            cwd=self._folder,
            env=self._environment,
            input=TYPED,
            capture_output=True,
            text=True,
            timeout=DONE_WITHIN,
        )
        assert done.returncode == 0, f"{command[-1]}\n{done.stdout}{done.stderr}"
        return done.stdout

    def _see_what_started(self) -> None:
        while self._starting:
            terminal, fence = self._starting.pop(0)
            terminal.wait_for(IS_READY)
            self._see(fence, terminal.text)

    def _see(self, fence: Fence, printed: str) -> None:
        if fence.output is not None:
            shown = self._with_ports(fence.output).strip()
            pattern = ".*".join(map(re.escape, shown.split("…")))
            assert re.search(pattern, printed, re.DOTALL), f"{fence.page}:{fence.line} prints {printed}"


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    reader = Reader(tmp_path_factory.mktemp("reader"))
    yield reader
    for terminal in reader.terminals:
        terminal.end()


def test_the_quick_start(reader: Reader) -> None:
    reader.walk(QUICK_START)


@pytest.mark.parametrize("page", OTHERS, ids=str)
def test_the_other_pages(page: Page, reader: Reader) -> None:
    reader.walk(QUICK_START)
    reader.walk(page)


def test_all_of_it_ends_with_ctrl_c(reader: Reader) -> None:
    reader.walk(QUICK_START)
    for terminal in reader.terminals:
        terminal.interrupt()
    for terminal in reader.terminals:
        assert terminal.process.wait(LEFT_WITHIN) == 0, terminal.text
