"""What a server was asked to do: its command-line options, checked once, then frozen.

Must not know how any of it is done. Light to import: `--help` waits for this module.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from swarm.cli import count
from swarm.errors import InputError
from swarm.spans import Span

DTYPES = ("auto", "float32", "bfloat16", "float16")
MAX_NAME = 100
JOIN_TIMEOUT = 30.0
"""Seconds within which this peer must have reached the swarm."""


@dataclass(frozen=True)
class ServerConfig:
    """One server. `None` leaves a choice to the machine: all blocks, a fresh identity, what memory allows."""

    model: str
    blocks: Span | None = None
    initial_peers: tuple[str, ...] = ()
    identity: Path | None = None
    dtype: str = "auto"
    device: str = "auto"
    kv_tokens: int | None = None
    threads: int | None = None
    host_maddrs: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0",)
    announce_maddrs: tuple[str, ...] = ()
    public_name: str = ""
    timeout: float = JOIN_TIMEOUT

    def __post_init__(self) -> None:
        """
        Raises:
            InputError: the public name cannot be announced.
        """
        if len(self.public_name) > MAX_NAME or not self.public_name.isprintable():
            raise InputError(
                "The public name cannot be used.",
                f"Give at most {MAX_NAME} printable characters on one line.",
            )


def add_options(parser: argparse.ArgumentParser) -> None:
    """The server's own options, beside those that all commands share."""
    what = parser.add_argument_group("what to serve")
    what.add_argument(
        "--blocks", metavar="A:B", type=_span, help="serve blocks A to B-1; default: all blocks of the model"
    )
    what.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="numbers to compute in; auto keeps 16-bit weights as they are (on a CPU as float16, computing in"
        " float32; on a GPU in the checkpoint's own dtype) and takes float32 otherwise",
    )
    what.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N; default: %(default)s")
    what.add_argument(
        "--kv-tokens",
        metavar="N",
        type=count,
        help="tokens that all sessions together may hold; default: by memory",
    )
    what.add_argument(
        "--threads", metavar="N", type=count, help="CPU threads to compute with; default: all cores"
    )
    where = parser.add_argument_group("where to be reached")
    where.add_argument(
        "--port",
        metavar="PORT",
        type=int,
        help="TCP port to listen on, on all interfaces; default: a free one",
    )
    where.add_argument(
        "--host-maddrs",
        metavar="MADDR",
        nargs="+",
        default=[],
        help="listen on these multiaddrs instead of --port",
    )
    where.add_argument(
        "--announce-maddrs",
        metavar="MADDR",
        nargs="+",
        default=[],
        help="tell others these addresses instead",
    )
    where.add_argument(
        "--public-name", metavar="NAME", default="", help="what people see instead of a peer id"
    )
    parser.add_argument(
        "--exit-with-stdin", action="store_true", help="leave the swarm when standard input is closed"
    )


def config_from(args: argparse.Namespace) -> ServerConfig:
    """
    Raises:
        InputError: an option cannot be used, or two of them contradict each other.
    """
    return ServerConfig(
        model=args.model,
        blocks=args.blocks,
        initial_peers=args.initial_peers,
        identity=args.identity,
        dtype=args.dtype,
        device=args.device,
        kv_tokens=args.kv_tokens,
        threads=args.threads,
        host_maddrs=_host_maddrs(args.port, tuple(args.host_maddrs)),
        announce_maddrs=tuple(args.announce_maddrs),
        public_name=args.public_name,
        timeout=args.timeout,
    )


def _host_maddrs(port: int | None, given: tuple[str, ...]) -> tuple[str, ...]:
    if given and port is not None:
        raise InputError("--port and --host-maddrs both say where to listen.", "Give one of them.")
    if port is not None and not 0 <= port < 65536:
        raise InputError(
            f"--port {port} is not possible.", "Give a port from 1 to 65535, or 0 for a free one."
        )
    return given or (f"/ip4/0.0.0.0/tcp/{port or 0}",)


def _span(text: str) -> Span:
    try:
        return Span.parse(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
