"""`python -m swarm.health`: the page that shows how a swarm is."""

import argparse
import sys

from swarm import cli

DESCRIPTION = """Show how a swarm is, as a web page that keeps itself fresh: which models can be run, who
serves which blocks, and where one more server helps most. It joins the swarm and serves nothing to it."""

JOIN_TIMEOUT = 30.0
LEAST_PERIOD = 0.2


def parser() -> argparse.ArgumentParser:
    root = cli.Parser(prog="python -m swarm.health", description=DESCRIPTION)
    add = root.add_argument_group("page").add_argument
    add("--host", default="127.0.0.1", metavar="HOST", help="where to listen (default: %(default)s)")
    add("--port", type=_port, default=8080, metavar="PORT", help="0 is a free one (default: %(default)s)")
    add(
        "--history",
        metavar="FILE",
        help="keep the last day in FILE; 'none' keeps nothing (default: a file in the cache folder)",
    )
    add(
        "--period",
        type=_period,
        default=5.0,
        metavar="S",
        help="read the records so often (default: every %(default)g seconds)",
    )
    cli.shared_options(root, timeout=JOIN_TIMEOUT, names_model=False)
    return root


def _port(text: str) -> int:
    if not (text.isdecimal() and int(text) < 65536):
        raise argparse.ArgumentTypeError(f"'{text}' is not a port; ports go from 0 to 65535")
    return int(text)


def _period(text: str) -> float:
    seconds = cli.duration(text)
    if seconds < LEAST_PERIOD:
        raise argparse.ArgumentTypeError(f"'{text}' is too often; {LEAST_PERIOD:g} seconds are the least")
    return seconds


def main(arguments: list[str] | None = None) -> int:
    return cli.run(_main, parser().parse_args(arguments))


async def _main(args: argparse.Namespace) -> int:
    from swarm.health import command

    return await command.main(args)


if __name__ == "__main__":
    sys.exit(main())
