"""`python -m swarm.client`: reads the command line; what a command needs is imported when it is chosen."""

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import get_args

from swarm import cli
from swarm.client.options import PUBLIC_AUDIT_RATE, SessionOptions
from swarm.client.peer_ids import given_peers
from swarm.errors import InputError
from swarm.importing import imported
from swarm.net.forms import Wire

PROGRAM = "python -m swarm.client"

COMMANDS = {
    "chat": ("swarm.client.chat", "talk with a model"),
    "generate": ("swarm.client.generate", "answer one prompt"),
    "serve": ("swarm.client.http.command", "answer programs over HTTP, as OpenAI's API does"),
    "peers": ("swarm.client.peers_table", "show who serves what"),
    "route": ("swarm.client.route_command", "explain the fastest route"),
    "diagnose": ("swarm.client.diagnose.command", "say what is wrong with this machine's connection"),
    "invite": ("swarm.client.invite", "make an invitation, by which others join the swarm"),
    "audit": ("swarm.client.audit_command", "check evidence of wrong results by the model's weights"),
}

EXAMPLES = {
    "chat": (
        ("talk with the default model", "%(prog)s --initial-peers ADDRESS"),
        ("talk with another one, more freely", "%(prog)s --model Qwen/Qwen3-8B --temperature 0.9"),
    ),
    "generate": (
        ("answer a question", "%(prog)s --initial-peers ADDRESS 'What is a swarm?'"),
        (
            "continue a text, sampled the same way each time",
            "%(prog)s --raw --temperature 0.8 --seed 1 < story.txt",
        ),
        ("print the answer, its route and its speed as JSON", "%(prog)s --json 'What is a swarm?'"),
    ),
    "serve": (
        ("answer programs on this machine", "%(prog)s --initial-peers ADDRESS"),
        ("answer others who have a key", "%(prog)s --host 0.0.0.0 --api-key-file keys.txt"),
    ),
    "peers": (
        ("list all servers of a swarm", "%(prog)s --initial-peers ADDRESS"),
        ("list those of one model, as JSON", "%(prog)s --model smollm2-135m --json"),
    ),
    "route": (
        ("explain the route of a chat", "%(prog)s --initial-peers ADDRESS"),
        ("explain that of a long document", "%(prog)s --prompt-tokens 8000 --new-tokens 200"),
    ),
    "diagnose": (
        ("find out why a swarm cannot be joined", "%(prog)s --initial-peers ADDRESS"),
        (
            "find out whether others reach a server on this machine",
            "%(prog)s --initial-peers ADDRESS --port 31337",
        ),
    ),
    "invite": (
        (
            "let others join a private swarm",
            "%(prog)s --initial-peers ADDRESS --swarm-key swarm.key",
        ),
    ),
    "audit": (("check that a peer gave wrong results", "%(prog)s --model smollm2-135m evidence.bin"),),
}
"""What each command may be used for, with a command line for it."""


def parser(program: str = PROGRAM) -> cli.Parser:
    root = cli.Parser(
        prog=program,
        description=f"Use a model that a swarm serves. '{program} COMMAND --help' tells a command's options.",
        epilog=cli.examples(*_first_examples()),
    )
    commands = root.add_subparsers(
        title="commands", dest="command", required=True, metavar="COMMAND", parser_class=cli.Parser
    )
    for name, (_, text) in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=text,
            description=f"{text[:1].upper()}{text[1:]}.",
            epilog=cli.examples(*EXAMPLES[name]),
            place=cli.Place(f"client.{name}", siblings=tuple(COMMANDS)),
        )
        if name in ("chat", "generate"):
            _answer_options(command, temperature=0.0 if name == "generate" else 0.5)
        if name == "generate":
            _prompt_options(command)
        if name == "serve":
            _serve_options(command)
        if name in ("chat", "generate", "serve"):
            _session_options(command)
            _audit_options(command)
        if name in ("chat", "generate", "serve", "route"):
            _privacy_options(command)
        if name == "route":
            _route_options(command)
        if name == "diagnose":
            _diagnose_options(command)
        cli.shared_options(
            command,
            model=None if name in ("peers", "diagnose") else cli.DEFAULT_MODEL,
            joins=name != "audit",
            names_model=name != "invite",
        )
        if name == "audit":
            command.add_argument(
                "evidence", type=cli.file_path, metavar="EVIDENCE", help="a file that an audit wrote"
            )
    return root


def _first_examples() -> Iterator[tuple[str, str]]:
    """One for each command, as the command above them shows them."""
    for name, ((purpose, line), *_) in EXAMPLES.items():
        yield purpose, line.replace("%(prog)s", f"%(prog)s {name}")


def _prompt_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "prompt", nargs="?", metavar="PROMPT", help="what to answer; standard input if it is - or left out"
    )
    add = command.add_argument_group("prompt").add_argument
    add("--raw", action="store_true", help="continue the prompt as text, without a chat template")
    add("--ignore-eos", action="store_true", help="go on where the model would end")


def _answer_options(command: argparse.ArgumentParser, temperature: float) -> None:
    add = command.add_argument_group("answer").add_argument
    add(
        "--max-new-tokens",
        type=cli.whole_number,
        default=256,
        metavar="N",
        help="end after N tokens (default: %(default)s)",
    )
    add(
        "--temperature",
        type=cli.number,
        default=temperature,
        metavar="T",
        help="0 always takes the likeliest token, 1 samples as the model says (default: %(default)g)",
    )
    add(
        "--top-k",
        type=cli.whole_number,
        metavar="K",
        help="choose among the K likeliest tokens (default: all)",
    )
    add(
        "--top-p",
        type=cli.number,
        metavar="P",
        help="choose among the likeliest tokens that together make up P, 0 to 1 (default: all)",
    )
    add(
        "--min-p",
        type=cli.number,
        metavar="P",
        help="leave out tokens less likely than P times the likeliest, 0 to 1 (default: none)",
    )
    add(
        "--repetition-penalty",
        type=cli.number,
        default=1.0,
        metavar="R",
        help="above 1, repeat less (default: %(default)g)",
    )
    add(
        "--seed",
        type=cli.whole_number,
        metavar="N",
        help="the same seed samples the same text (default: another one each time)",
    )
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before TEXT; may be given several times",
    )
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
        metavar="NAME",
        help="draft with this small model of the same vocabulary, on this machine (default: none)",
    )


def _serve_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("API").add_argument
    add(
        "--host",
        default="127.0.0.1",
        metavar="HOST",
        help="the address to listen on; 0.0.0.0 is all of this machine's (default: %(default)s)",
    )
    add(
        "--port",
        type=cli.port,
        default=8000,
        metavar="PORT",
        help="the TCP port to listen on; 0 takes a free one (default: %(default)s)",
    )
    add(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="a key that may ask, which other users of this machine can see here; may be given several times"
        " (default: anybody may ask)",
    )
    add(
        "--api-key-file",
        type=cli.file_path,
        metavar="FILE",
        help="a file with keys that may ask, one a line (default: none)",
    )
    add(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="a site whose pages may ask, for example https://chat.example; may be given several times",
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
        help="end a chat's answer after N tokens where a request does not say it (default: %(default)s)",
    )
    add(
        "--patience",
        type=cli.duration,
        default=10.0,
        metavar="TIME",
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
        "--standby",
        action="store_true",
        help="have every server copy what it holds of a session to another one, which goes on if it is lost",
    )
    add(
        "--journal-memory",
        type=cli.room,
        default=defaults.journal_memory,
        metavar="SIZE",
        help="memory for what is needed when a server is lost, for all sessions (default: 256MiB)",
    )
    add(
        "--journal-disk",
        type=cli.room,
        default=defaults.journal_disk,
        metavar="SIZE",
        help="room for more of it in a temporary file; 0 writes nothing to disk (default: 4GiB)",
    )


def _audit_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("audits").add_argument
    add(
        "--audit-rate",
        type=_rate,
        metavar="F",
        help="have other servers compute this fraction of all sessions once more and compare"
        f" (default: {PUBLIC_AUDIT_RATE:g}, and 0 in private swarms)",
    )
    add(
        "--evidence-folder",
        type=cli.file_path,
        metavar="FOLDER",
        help="keep evidence of wrong results here, from which the text can be told (default: keep none)",
    )


def _privacy_options(command: argparse.ArgumentParser) -> None:
    defaults = SessionOptions()
    add = command.add_argument_group("privacy").add_argument
    add(
        "--trust-first-last",
        type=_peers,
        metavar="PEERS",
        help="let these peers alone run the first and the last blocks: ids by commas apart, or a file"
        " (default: any)",
    )
    add(
        "--trust-depth",
        type=cli.count,
        default=defaults.trust_depth,
        metavar="N",
        help="so many blocks at each end are meant by that (default: %(default)s)",
    )
    add(
        "--max-share",
        type=_share,
        default=defaults.max_share,
        metavar="F",
        help="let no peer run more than this fraction of all blocks (default: %(default)g)",
    )


def _peers(text: str) -> tuple[str, ...]:
    try:
        return given_peers(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(f"{error.message.rstrip('.')}: {error.hint}") from error


def _share(text: str) -> float:
    share = _rate(text)
    if not share:
        raise argparse.ArgumentTypeError("a share of 0 lets no peer run anything")
    return share


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = -1.0
    if not 0 <= rate <= 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a fraction between 0 and 1, such as 0.5")
    return rate


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


def _diagnose_options(command: argparse.ArgumentParser) -> None:
    command.add_argument_group("this machine").add_argument(
        "--port",
        type=cli.port,
        metavar="PORT",
        help="the TCP port that others are to reach, whether a server of yours listens on it now or not; that"
        " they cannot is then a problem (default: a free one)",
    )


def main(arguments: list[str] | None = None, program: str = PROGRAM) -> int:
    args = parser(program).parse_args(arguments)

    async def command(args: argparse.Namespace) -> int:
        module, _ = COMMANDS[args.command]
        return await (await imported(module)).main(args)

    return cli.run(command, args)


if __name__ == "__main__":
    sys.exit(main())
