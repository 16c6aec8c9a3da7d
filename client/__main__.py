"""`python -m swarm.client`: reads the command line; what a command needs is imported when it is chosen."""

import argparse
import importlib
import sys
from collections.abc import Callable
from typing import get_args

from swarm import cli
from swarm.client.options import SessionOptions
from swarm.net.forms import Wire

COMMANDS = {
    "chat": ("swarm.client.chat", "talk with a model"),
    "generate": ("swarm.client.generate", "answer one prompt"),
    "serve": ("swarm.client.http.command", "answer programs over HTTP, as OpenAI's API does"),
    "peers": ("swarm.client.peers_table", "show who serves what"),
    "route": ("swarm.client.route_command", "explain the fastest route"),
}


def parser() -> argparse.ArgumentParser:
    root = cli.Parser(prog="python -m swarm.client", description="Use a model that a swarm serves.")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=cli.Parser)
    for name, (_, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=f"{text[:1].upper()}{text[1:]}.")
        cli.shared_options(command)
        if name == "generate":
            _generate_options(command)
        if name == "serve":
            _serve_options(command)
        if name in ("chat", "generate"):
            _answer_options(command, temperature=0.0 if name == "generate" else 0.5)
        if name in ("chat", "generate", "serve"):
            _session_options(command)
        if name == "peers":
            command.set_defaults(model=None)
        if name == "route":
            _route_options(command)
    return root


def _generate_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "prompt", nargs="?", metavar="PROMPT", help="what to answer; standard input if it is - or left out"
    )
    command.add_argument(
        "--raw", action="store_true", help="continue the prompt as text, without a chat template"
    )
    command.add_argument("--ignore-eos", action="store_true", help="go on where the model would end")


def _answer_options(command: argparse.ArgumentParser, temperature: float) -> None:
    add = command.add_argument_group("answer").add_argument
    add(
        "--max-new-tokens",
        type=int,
        default=256,
        metavar="N",
        help="end after N (default: %(default)s)",
    )
    add(
        "--temperature",
        type=float,
        default=temperature,
        metavar="T",
        help="0: greedy (default: %(default)g)",
    )
    add("--top-k", type=int, metavar="K", help="choose among the K likeliest tokens")
    add("--top-p", type=float, metavar="P", help="choose among the likeliest tokens that make up P")
    add(
        "--min-p",
        type=float,
        metavar="P",
        help="leave out what is less likely than P times the best",
    )
    add("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1, repeat less")
    add("--seed", type=int, metavar="N", help="the same seed samples the same text")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; may be given again")
    add(
        "--no-speculation",
        dest="speculate",
        action="store_false",
        help="never let a step verify several drafted tokens; the answer is the same either way",
    )
    _draft_option(add)


def _draft_option(add: Callable[..., argparse.Action]) -> None:
    add(
        "--draft-model",
        metavar="NAME_OR_PATH",
        help="draft with this small model of the same vocabulary, on this machine",
    )


def _serve_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("API").add_argument
    add("--host", default="127.0.0.1", metavar="HOST", help="where to listen (default: %(default)s)")
    add("--port", type=_port, default=8000, metavar="PORT", help="0 is a free one (default: %(default)s)")
    add("--api-key", action="append", default=[], metavar="KEY", help="a key that may ask; may be repeated")
    add(
        "--api-key-file",
        type=cli.file_path,
        metavar="FILE",
        help="a file with keys that may ask, one a line",
    )
    add(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="a site whose pages may ask, for example https://chat.example; may be repeated",
    )
    add(
        "--max-answers",
        type=cli.count,
        default=64,
        metavar="N",
        help="write so many answers at a time (default: %(default)s)",
    )
    add(
        "--default-tokens",
        type=cli.count,
        default=2048,
        metavar="N",
        help="end a chat's answer after N where a request does not say it (default: %(default)s)",
    )
    add(
        "--patience",
        type=cli.duration,
        default=10.0,
        metavar="S",
        help="refuse a request that finds no servers with room for so long (default: %(default)g seconds)",
    )
    _draft_option(add)


def _session_options(command: argparse.ArgumentParser) -> None:
    defaults = SessionOptions()
    add = command.add_argument_group("session").add_argument
    add(
        "--no-push",
        dest="push",
        action="store_false",
        help="bring every server its input from here, rather than let servers pass it on",
    )
    add(
        "--wire",
        choices=get_args(Wire),
        default=defaults.wire,
        help="how activations travel: as computed, or rounded to 16 or 8 bits (default: %(default)s)",
    )
    add(
        "--journal-memory",
        type=cli.size,
        default=defaults.journal_memory,
        metavar="SIZE",
        help="memory for what is needed when a server is lost (default: 256MiB)",
    )
    add(
        "--journal-disk",
        type=cli.size,
        default=defaults.journal_disk,
        metavar="SIZE",
        help="room for more of it in a temporary file (default: 4GiB)",
    )


def _port(text: str) -> int:
    if not (text.isdecimal() and int(text) < 65536):
        raise argparse.ArgumentTypeError(f"'{text}' is not a port; ports go from 0 to 65535")
    return int(text)


def _route_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("session").add_argument
    add(
        "--prompt-tokens",
        type=cli.count,
        default=512,
        metavar="N",
        help="tokens of the prompt (default: %(default)s)",
    )
    add(
        "--new-tokens",
        type=cli.count,
        default=128,
        metavar="N",
        help="tokens of the answer (default: %(default)s)",
    )


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)

    async def command(args: argparse.Namespace) -> int:
        module, _ = COMMANDS[args.command]
        return await importlib.import_module(module).main(args)

    return cli.run(command, args)


if __name__ == "__main__":
    sys.exit(main())
