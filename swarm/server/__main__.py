"""`python -m swarm.server`: serve blocks of a model to a swarm."""

import argparse
import shlex
import sys

from swarm import cli
from swarm.importing import importing
from swarm.server.config import JOIN_TIMEOUT, add_options, config_from

PROGRAM = "python -m swarm.server"

DESCRIPTION = """Serve blocks of a model to a swarm. Without --initial-peers a new swarm begins, and the
commands with which others join it are printed. Without --identity each start is a new peer; with it, the
peer keeps its id."""

EXAMPLES = cli.examples(
    ("begin a swarm with the first half of a model", "%(prog)s --blocks 0:15 --port 31337"),
    ("join it with the other half, from another machine", "%(prog)s --blocks 15:30 --initial-peers ADDRESS"),
    (
        "serve a model of one's own, as the same peer each time",
        "%(prog)s --model ./Qwen3-8B --identity peer.key",
    ),
    (
        "serve whichever of two models the swarm needs most",
        "%(prog)s --models ./Qwen3-8B,smollm2-135m --initial-peers ADDRESS",
    ),
    ("keep the options in a file", "%(prog)s --kv-tokens 8192 --print-config > swarm.toml"),
)


def parser(program: str = PROGRAM) -> cli.Parser:
    root = cli.Parser(prog=program, place=cli.Place("server"), description=DESCRIPTION, epilog=EXAMPLES)
    add_options(root)
    cli.shared_options(root, timeout=JOIN_TIMEOUT, may_choose_model=True)
    return root


def main(arguments: list[str] | None = None, program: str = PROGRAM) -> int:
    args = parser(program).parse_args(arguments)
    return cli.run(_main if args.new_swarm_key is None else _make_key, args)


async def _make_key(args: argparse.Namespace) -> int:
    from swarm.net.swarm_key import SwarmKey

    path = args.new_swarm_key
    SwarmKey.generate().save_new(path)
    if args.json:
        cli.emit({"event": "made", "swarm_key": str(path)})
    else:
        print(f"Made the swarm key {path}. Whoever has it is a member: give it only to those, by a safe way.")
        print(f"  python -m swarm.server --swarm-key {shlex.quote(str(path))}")
    return 0


async def _main(args: argparse.Namespace) -> int:
    config = config_from(args)
    with importing():
        if args.no_blocks:
            from swarm.server.bootstrap import keep_joinable as live
        else:
            from swarm.server.startup import serve as live
        from swarm.server.stopping import Stopping

    with Stopping(with_stdin=args.exit_with_stdin) as stopping:
        await live(config, stopping, as_json=args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
