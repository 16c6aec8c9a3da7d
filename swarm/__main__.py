"""`swarm`, or `python -m swarm`: one name for all commands, and their completion in shells."""

import argparse
import importlib
import sys
from typing import Any

from swarm import cli
from swarm.version import VERSION

COMMANDS = {
    "server": ("swarm.server.__main__", "serve blocks of a model to a swarm"),
    "client": ("swarm.client.__main__", "use a model that a swarm serves"),
    "health": ("swarm.health.__main__", "show how a swarm is, as a web page"),
    "demo": ("swarm.demo", "a whole swarm on this machine"),
}
SHELLS = ("bash", "zsh", "fish")

DESCRIPTION = """Run language models too big for any one of your machines, together. 'swarm server' is
'python -m swarm.server', and so are the others."""

EXAMPLES = cli.examples(
    ("complete options and commands in bash", 'eval "$(swarm --print-completion bash)"'),
    ("in zsh", 'eval "$(swarm --print-completion zsh)"'),
    ("in fish", "swarm --print-completion fish | source"),
)


def parser() -> cli.Parser:
    """All commands and their options in one."""
    root = cli.Parser(prog="swarm", description=DESCRIPTION, epilog=EXAMPLES)
    root.add_argument("--version", action="version", version=VERSION, help="print the version and leave")
    root.add_argument(
        "--print-completion",
        choices=SHELLS,
        action=_PrintCompletion,
        metavar="SHELL",
        help=f"print what completes this command in a shell: {', '.join(SHELLS)}",
    )
    make: Any = _parser_of  # what is said to be a class need only make parsers
    commands = root.add_subparsers(
        title="commands", dest="command", required=True, metavar="COMMAND", parser_class=make
    )
    for name, (door, text) in COMMANDS.items():
        commands.add_parser(name, help=text, door=door)
    return root


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    if given and given[0] in COMMANDS:
        door, _ = COMMANDS[given[0]]
        code: int = importlib.import_module(door).main(given[1:], f"swarm {given[0]}")
        return code
    root = parser()
    root.parse_args(given)
    root.error("a command comes first")


def _parser_of(*, prog: str, door: str, **_: object) -> Any:
    return importlib.import_module(door).parser(prog)


class _PrintCompletion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *given: Any) -> None:
        _, shell, _ = given
        from shtab import FILE, complete

        _complete_files(parser, FILE)
        print(complete(parser, shell))
        parser.exit()


def _complete_files(parser: argparse.ArgumentParser, files: Any) -> None:
    """Have what is the path of a file completed as one, in all commands."""
    for action in parser._actions:
        if action.type is cli.file_path:
            action.complete = files  # type: ignore[attr-defined]
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_files(command, files)


if __name__ == "__main__":
    sys.exit(main())
