"""The commands as a person meets them: the chat's lines and Ctrl-C, generate, peers, and light `--help`."""

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
from rich.console import Console

from swarm import cli
from swarm.client import chat as chat_room
from swarm.client.__main__ import main
from swarm.client.chat import run_chat
from swarm.client.generate import answer, read_prompt
from swarm.client.lines import LEAVE_HINT, terminal_lines
from swarm.client.peers import report_peers
from swarm.client.peers_table import table
from swarm.client.route import NoRoute
from swarm.client.terminal import SCREEN, waiting_reporter
from swarm.errors import InputError, SwarmError
from swarm.spans import Span
from tests.toy_swarm import scripted, toy_swarm

THREE = {"a": Span(0, 2), "b": Span(2, 4), "c": Span(4, 6)}
HI = len("u:hi\na:")


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


async def test_chat_answers_lines_and_commands(monkeypatch: Any, capsys: Any) -> None:
    typed(monkeypatch, "/route", "hi", "", "/route", "/help", "/nope", "/reset", "hi", "/quit", "never")
    async with toy_swarm(THREE) as toy:
        assert await run_chat(toy.swarm, {"max_new_tokens": 4}) == 0
        text = bytes(toy.ends.expected(list(b"u:hi\na:"), 4)).decode()
        assert len(toy["a"].opened) == 2
        assert len(toy["a"].closed) == 2
    out = capsys.readouterr().out
    assert out.count(text) == 2
    assert out.count("a [0:2] → b [2:4] → c [4:6] · ") == 2
    assert "b [2:4]: 2.0 ms computing, 1.0 ms in the queue" in out
    assert "/reset  forget" in out
    assert "There is no command /nope" in out
    assert "\x1b" not in out


async def test_chat_ends_with_its_input(monkeypatch: Any, capsys: Any) -> None:
    typed(monkeypatch)
    async with toy_swarm(THREE) as toy:
        assert await run_chat(toy.swarm) == 0
    assert capsys.readouterr().out == ""


async def test_chat_with_json_writes_one_line_an_answer(monkeypatch: Any, capsys: Any) -> None:
    typed(monkeypatch, "hi", "more", "/reset")
    async with toy_swarm(THREE) as toy:
        assert await run_chat(toy.swarm, {"max_new_tokens": 2}, as_json=True) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["usage"]["prompt_tokens"] for line in lines] == [HI, HI + 2 + len("\nu:more\na:")]


async def test_a_lost_server_is_not_seen_in_the_chat(monkeypatch: Any, capsys: Any) -> None:
    typed(monkeypatch, "hi", "hi", "hi")
    async with toy_swarm({**THREE, "spare": Span(2, 4)}) as toy:
        doomed = toy[toy.swarm.route().hops[1].announcement.name]

        async def die(steps: int) -> None:
            if steps == 6:
                doomed.kill()

        doomed.before_step = die
        assert await run_chat(toy.swarm, {"max_new_tokens": 4}) == 0
    out, err = capsys.readouterr()
    assert "error: " not in err
    assert out.count("tokens/s") == 3


async def test_a_failed_answer_is_an_error_and_the_chat_stays_open(monkeypatch: Any, capsys: Any) -> None:
    typed(monkeypatch, "hi", "hi", "hi")
    async with toy_swarm(THREE, timeout=0.2) as toy:

        async def die(steps: int) -> None:
            if steps == 2:
                toy["b"].kill()

        toy["b"].before_step = die
        assert await run_chat(toy.swarm, {"max_new_tokens": 4}) == 1
    out, err = capsys.readouterr()
    assert err.count("error: ") == 3
    assert "blocks 2 to 3" in err
    assert "hint: " in err
    assert "tokens/s" not in out


async def test_failed_last_answer_of_a_pipe_is_exit_code_one(monkeypatch: Any, capsys: Any) -> None:
    typed(monkeypatch, "hi")
    async with toy_swarm(THREE, announced=["a", "c"], timeout=0.1) as toy:
        assert await run_chat(toy.swarm, as_json=True) == 1
    out, err = capsys.readouterr()
    assert "No server serves blocks 2 to 3 of toy." in err
    assert json.loads(out)["event"] == "error"


async def test_ctrl_c_stops_the_answer_and_not_the_chat(monkeypatch: Any, capsys: Any) -> None:
    typed(monkeypatch, "hi", "hi", "/quit")
    before = signal.getsignal(signal.SIGINT)
    async with toy_swarm(THREE) as toy:

        async def interrupt(steps: int) -> None:
            if steps == 4:
                os.kill(os.getpid(), signal.SIGINT)
                await asyncio.sleep(0.01)

        toy["b"].before_step = interrupt
        assert await run_chat(toy.swarm, {"max_new_tokens": 30}) == 0
        assert len(toy["b"].opened) == 1
    assert signal.getsignal(signal.SIGINT) == before
    first, _, second, _ = capsys.readouterr().out.splitlines()
    assert 3 <= len(first) < 10
    assert len(second) == 30


async def test_ctrl_c_gives_up_a_step_that_hangs(monkeypatch: Any, capsys: Any) -> None:
    typed(monkeypatch, "hi", "/quit")
    monkeypatch.setattr(chat_room, "STOP_GRACE", 0.05)
    async with toy_swarm(THREE) as toy:

        async def hang(steps: int) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(60)

        toy["b"].before_step = hang
        started = time.monotonic()
        assert await run_chat(toy.swarm) == 0
        assert time.monotonic() - started < 5
    assert "The answer was given up." in capsys.readouterr().out


async def test_model_output_cannot_command_the_terminal(monkeypatch: Any, capsys: Any) -> None:
    typed(monkeypatch, "hi")
    async with toy_swarm(THREE, next_token=scripted(HI, b"a\x1b[2Jb\x07\xc2\x9bc")) as toy:
        await run_chat(toy.swarm)
    assert capsys.readouterr().out.startswith("a[2Jbc\n")


class Prompts:
    """A prompt session whose user does what the test says."""

    def __init__(self, *acts: Any):
        self._acts = iter(acts)

    async def prompt_async(self, message: str) -> str:
        act = next(self._acts)
        if isinstance(act, str):
            return act
        raise act


async def test_terminal_ctrl_c_clears_and_twice_leaves(capsys: Any) -> None:
    prompts: Any = Prompts(
        "one", KeyboardInterrupt(), "two", KeyboardInterrupt(), KeyboardInterrupt(), "never"
    )
    assert [line async for line in terminal_lines(prompts)] == ["one", "two"]
    assert capsys.readouterr().out.count(LEAVE_HINT) == 2


async def test_terminal_ctrl_d_leaves() -> None:
    prompts: Any = Prompts("one", EOFError(), "never")
    assert [line async for line in terminal_lines(prompts)] == ["one"]


async def test_generate_streams_text_or_writes_one_line(capsys: Any) -> None:
    async with toy_swarm(THREE) as toy:
        shown = await answer(toy.swarm, "hi", {"max_new_tokens": 5}, raw=True)
        assert capsys.readouterr().out == shown.text + "\n"
        await answer(toy.swarm, "hi", {"max_new_tokens": 5}, raw=True, as_json=True)
        out = capsys.readouterr().out
        assert out.count("\n") == 1
        assert json.loads(out)["token_ids"] == list(shown.token_ids)


def test_prompt_comes_from_the_argument_or_standard_input(monkeypatch: Any) -> None:
    assert read_prompt("hi") == "hi"
    typed(monkeypatch, "from", "a pipe")
    assert read_prompt(None) == "from\na pipe"
    typed(monkeypatch, "dash")
    assert read_prompt("-") == "dash"
    typed(monkeypatch)
    with pytest.raises(InputError, match="empty"):
        read_prompt(None)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    with pytest.raises(InputError, match="no prompt"):
        read_prompt(None)


async def test_peers_of_all_models_as_table_and_json() -> None:
    async with toy_swarm(THREE) as toy:
        await toy.announce("b", state="joining", progress=0.5)
        transport, store = toy.swarm._transport, toy.swarm.directory._store
        reports = await report_peers(transport, store)
        assert [report.span for report in reports] == list(THREE.values())
        assert await report_peers(transport, store, "other") == []
        assert len(await report_peers(transport, store, "toy")) == 3
    console = Console(file=io.StringIO(), width=140)
    console.print(table(reports))
    drawn = console.file.getvalue()  # type: ignore[attr-defined]
    assert "joining 50%" in drawn
    assert drawn.count(" ms") == 3
    assert json.loads(json.dumps(reports[1].as_json()))["state"] == "joining"


def test_waiting_is_said_once_for_each_reason(capsys: Any) -> None:
    report = waiting_reporter()
    for missing in (Span(0, 1), Span(0, 1), Span(1, 2)):
        report(NoRoute(f"blocks {missing} are missing", "", [missing]))
    assert capsys.readouterr().err.count("Waiting.") == 2


def test_a_notice_does_not_run_into_an_answer(capsys: Any, monkeypatch: Any) -> None:
    report = waiting_reporter()
    SCREEN.write("Once upon")
    report(SwarmError("Nobody is there."))  # the answer goes to a file
    assert capsys.readouterr().out == "Once upon"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    report(SwarmError("Nobody comes."))
    report(SwarmError("Nobody ever comes."))
    SCREEN.write(" a time")
    SCREEN.end_line()
    said = capsys.readouterr()
    assert said.out == "\n a time\n"
    assert said.err == "Waiting. Nobody comes.\nWaiting. Nobody ever comes.\n"


def test_help_is_light() -> None:
    code = """
import sys
from swarm.client.__main__ import main
for command in ([], ["chat"], ["generate"], ["peers"]):
    try: main([*command, "--help"])
    except SystemExit as end: assert end.code == 0
heavy = {"torch", "transformers", "hivemind", "rich", "msgspec"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") == 4


def test_the_exit_code_is_that_of_the_process() -> None:
    command = [sys.executable, "-m", "swarm.client", "serve"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "error: " in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "hi", "--temperature", "-1"], "error: temperature is -1.0."),
        (["generate", "hi", "--top-k", "many"], "error: "),
        (["generate", "hi"], "error: There is no peer to join by."),
        (
            ["generate", "--initial-peers", "/ip4/127.0.0.1/tcp/1/p2p/nobody", "-"],
            "error: The prompt is empty.",
        ),
        (["serve"], "error: "),
        ([], "error: "),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_two(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    monkeypatch.delenv("SWARM_INITIAL_PEERS", raising=False)
    monkeypatch.setattr(cli, "configure_logging", lambda verbose: None)
    typed(monkeypatch)
    try:
        code: object = main(arguments)
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert code == 2, err
    assert said in err
    assert "hint: " in err
    assert "Traceback" not in err
    assert out == ""
