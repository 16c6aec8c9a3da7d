"""`python -m swarm.server`: serve blocks of a model to a swarm."""

import argparse
import sys

from swarm import cli
from swarm.server.config import JOIN_TIMEOUT, add_options, config_from

DESCRIPTION = """Serve blocks of a model to a swarm. Without --initial-peers a new swarm begins, and the
commands with which others join it are printed. Without --identity each start is a new peer; with it, the
peer keeps its id."""


def main() -> int:
    parser = cli.Parser(prog="python -m swarm.server", description=DESCRIPTION)
    add_options(parser)
    cli.shared_options(parser, timeout=JOIN_TIMEOUT)
    return cli.run(_main, parser.parse_args())


async def _main(args: argparse.Namespace) -> int:
    from swarm.server.startup import serve
    from swarm.server.stopping import Stopping

    with Stopping(with_stdin=args.exit_with_stdin) as stopping:
        await serve(config_from(args), stopping, as_json=args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
