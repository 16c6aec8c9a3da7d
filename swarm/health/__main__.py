"""`python -m swarm.health`: the page that shows how a swarm is."""

import argparse
import sys

from swarm import cli

DESCRIPTION = """Show how a swarm is, as a web page that keeps itself fresh: which models can be run, who
serves which blocks, and where one more server helps most. It joins the swarm and serves nothing to it."""

EXAMPLES = cli.examples(
    ("show a swarm in this machine's browser", "%(prog)s --initial-peers ADDRESS"),
    (
        "show it to everybody in the network, on port 80",
        "%(prog)s --initial-peers ADDRESS --host 0.0.0.0 --port 80",
    ),
)

PROGRAM = "python -m swarm.health"
JOIN_TIMEOUT = 30.0
LEAST_PERIOD = 0.2


def parser(program: str = PROGRAM) -> cli.Parser:
    root = cli.Parser(prog=program, place=cli.Place("health"), description=DESCRIPTION, epilog=EXAMPLES)
    add = root.add_argument_group("page").add_argument
    add(
        "--host",
        default="127.0.0.1",
        metavar="HOST",
        help="the address to listen on; 0.0.0.0 is all of this machine's (default: %(default)s)",
    )
    add(
        "--port",
        type=cli.port,
        default=8080,
        metavar="PORT",
        help="the TCP port to listen on; 0 takes a free one (default: %(default)s)",
    )
    add(
        "--history",
        metavar="FILE",
        help="keep the last day in FILE; 'none' keeps nothing (default: a file in the cache folder)",
    )
    add(
        "--period",
        type=_period,
        default=5.0,
        metavar="TIME",
        help="read the swarm's records so often (default: every %(default)g seconds)",
    )
    cli.shared_options(root, timeout=JOIN_TIMEOUT, names_model=False)
    return root


def _period(text: str) -> float:
    seconds = cli.duration(text)
    if seconds < LEAST_PERIOD:
        raise argparse.ArgumentTypeError(f"'{text}' is too often; {LEAST_PERIOD:g} seconds are the least")
    return seconds


def main(arguments: list[str] | None = None, program: str = PROGRAM) -> int:
    return cli.run(_main, parser(program).parse_args(arguments))


async def _main(args: argparse.Namespace) -> int:
    from swarm.health import command

    return await command.main(args)


if __name__ == "__main__":
    sys.exit(main())
