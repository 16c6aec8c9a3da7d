"""What a server was asked to do: its command-line options, checked once, then frozen.

Must not know how any of it is done. Light to import: `--help` waits for this module.
"""

import argparse
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from swarm.cli import count, duration, file_path, number, port, size
from swarm.errors import InputError
from swarm.spans import Span

DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("none", "int8", "nf4")
MAX_KV_OVERCOMMIT = 100.0
MAX_NAME = 100
MAX_MODELS = 16
"""Models that a server may choose from; the records of each are read again and again."""

JOIN_TIMEOUT = 30.0
"""Seconds within which this peer must have reached the swarm."""


@dataclass(frozen=True)
class ServerConfig:
    """One server. `None` leaves a choice to the machine: a fresh identity, what memory allows, whether it
    `relays`, and of blocks those that the swarm needs most, `num_blocks` of them. Where there are `models`,
    it serves whichever of them the swarm needs most, instead of `model`.

    `memory_limit` and `max_vram` are in bytes, times in seconds. Without `evict_after` blocks stay loaded,
    without a `metrics_port` there are no metrics, without a `shortcut_port` no shortcuts.
    """

    model: str
    models: tuple[str, ...] = ()
    blocks: Span | None = None
    num_blocks: int | None = None
    initial_peers: tuple[str, ...] = ()
    identity: Path | None = None
    swarm_key: Path | None = None
    allow_peers: Path | None = None
    block_peers: Path | None = None
    remembers: bool = True
    shows_invitation: bool = False
    dtype: str = "auto"
    quantize: str = "none"
    device: str = "auto"
    memory_limit: int | None = None
    max_vram: int | None = None
    kv_tokens: int | None = None
    kv_overcommit: float = 1.0
    prefix_cache: bool = True
    threads: int | None = None
    evict_after: float | None = None
    metrics_port: int | None = None
    host_maddrs: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0",)
    announce_maddrs: tuple[str, ...] = ()
    relays: bool | None = None
    shortcut_port: int | None = 0
    public_name: str = ""
    timeout: float = JOIN_TIMEOUT

    def __post_init__(self) -> None:
        """
        Raises:
            InputError: the public name cannot be announced, the overcommitment is none, the blocks are given
                twice, or not to be had of the models, or a model is named twice.
        """
        _check_models(self.models, self.blocks)
        if self.blocks is not None and self.num_blocks is not None:
            raise InputError(
                "--blocks and --num-blocks both say how many blocks to serve.",
                "Give --blocks A:B for certain ones, or --num-blocks N for those that the swarm needs most.",
            )
        if not 1 <= self.kv_overcommit <= MAX_KV_OVERCOMMIT:
            raise InputError(
                f"An overcommitment of {self.kv_overcommit:g} is not possible.",
                f"Give a number from 1 to {MAX_KV_OVERCOMMIT:g}: 1 promises only what there is memory for.",
            )
        if len(self.public_name) > MAX_NAME or not self.public_name.isprintable():
            raise InputError(
                "The public name cannot be used.",
                f"Give at most {MAX_NAME} printable characters on one line.",
            )


def _check_models(models: tuple[str, ...], blocks: Span | None) -> None:
    if models and blocks is not None:
        raise InputError(
            "--blocks names blocks of one model, and --models leaves the model to the swarm.",
            "Give --num-blocks N to bound how many blocks of any of them are served.",
        )
    if len(set(models)) < len(models):
        raise InputError("--models names a model twice.", "Name each one once.")
    if len(models) > MAX_MODELS:
        raise InputError(f"--models names {len(models)} models.", f"Name {MAX_MODELS} at most.")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The server's own options, beside those that all commands share."""
    _what_options(parser.add_argument_group("what to serve"))
    _resource_options(parser.add_argument_group("what it may take"))
    _where_options(parser.add_argument_group("where to be reached"))


def _what_options(what: argparse._ArgumentGroup) -> None:
    what.add_argument(
        "--blocks",
        metavar="A:B",
        type=_blocks,
        help="serve blocks A to B-1, and no others ever (default: auto, those that the swarm needs most, and"
        " others when it needs them more)",
    )
    what.add_argument(
        "--num-blocks",
        metavar="N",
        type=count,
        help="how many blocks to serve where they are chosen (default: as many as the memory allows)",
    )
    what.add_argument(
        "--no-blocks",
        action="store_true",
        help="serve no blocks and load no model: only keep the swarm joinable",
    )
    what.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="numbers to compute in; auto keeps 16-bit weights as they are (on a CPU as float16, computing in"
        " float32; on a GPU in the checkpoint's own dtype) and takes float32 else (default: %(default)s)",
    )
    what.add_argument(
        "--quantize",
        choices=QUANTIZATIONS,
        default="none",
        help="keep the weights in 8 or 4 bits, less exact, to save memory; several times slower on a CPU."
        " nf4 needs the package bitsandbytes (default: %(default)s)",
    )
    what.add_argument(
        "--device",
        default="auto",
        metavar="DEVICE",
        help="what to compute on: auto, cpu, cuda or cuda:N (default: %(default)s)",
    )
    what.add_argument(
        "--no-prefix-cache",
        dest="prefix_cache",
        action="store_false",
        help="do not keep the KV pages of ended sessions for others that begin alike",
    )


def _resource_options(takes: argparse._ArgumentGroup) -> None:
    takes.add_argument(
        "--memory-limit",
        metavar="SIZE",
        type=size,
        help="main memory that weights, KV and work space may take together, for example 4GiB or 900MiB"
        " (default: what is free)",
    )
    takes.add_argument(
        "--max-vram-mb",
        metavar="N",
        type=count,
        help="the same for the GPU's memory, in MiB (default: what is free)",
    )
    takes.add_argument(
        "--kv-tokens",
        metavar="N",
        type=count,
        help="tokens that all sessions together may hold (default: what memory is left beside the weights)",
    )
    takes.add_argument(
        "--kv-overcommit",
        metavar="X",
        type=number,
        default=1.0,
        help="promise sessions X times the tokens that there is memory for, since most end early; a step may"
        " then have to wait for others to end (default: %(default)g)",
    )
    takes.add_argument(
        "--threads",
        metavar="N",
        type=count,
        help="CPU threads to compute with. Servers that load earlier do not make room for later ones: give"
        " each its share where several start together (default: the cores of this machine divided by the"
        " servers that run on it when this one loads its blocks)",
    )
    takes.add_argument(
        "--evict-after",
        metavar="TIME",
        type=duration,
        help="give the memory back after that time without a session, for example 30s, 10m or 2h, and load"
        " again for the next one; the signal SIGUSR1 asks for it at any time (default: never)",
    )


def _where_options(where: argparse._ArgumentGroup) -> None:
    listening = where.add_mutually_exclusive_group()
    listening.add_argument(
        "--port",
        metavar="PORT",
        type=port,
        help="TCP port to listen on, on all interfaces; 0 takes a free one (default: 0)",
    )
    listening.add_argument(
        "--host-maddrs",
        metavar="MADDR",
        nargs="+",
        default=[],
        help="listen on these multiaddrs instead of --port, for example /ip4/192.0.2.7/tcp/31337",
    )
    where.add_argument(
        "--announce-maddrs",
        metavar="MADDR",
        nargs="+",
        default=[],
        help="tell others these addresses instead of those that it listens on, for example where a router"
        " forwards a port (default: those)",
    )
    where.add_argument(
        "--public-ip",
        metavar="IP",
        help="tell others this IP address, from which a router forwards --port here (default: those of this"
        " machine)",
    )
    shortcuts = where.add_mutually_exclusive_group()
    shortcuts.add_argument(
        "--shortcut-port",
        metavar="PORT",
        type=port,
        default=0,
        help="TCP port at which sessions go on past the libp2p daemons, from process to process, where it can"
        " be reached; 0 takes a free one (default: %(default)s)",
    )
    shortcuts.add_argument(
        "--no-shortcuts",
        action="store_true",
        help="let all streams go through the libp2p daemons, which is slower",
    )
    relaying = where.add_mutually_exclusive_group()
    relaying.add_argument(
        "--relay",
        action="store_true",
        help="relay for servers that cannot be reached, though this one has no address of the internet"
        " (default: where it has one)",
    )
    relaying.add_argument(
        "--no-relay",
        action="store_true",
        help="neither relay for others nor be reached through relays (default: use one where others cannot"
        " connect to this server)",
    )
    where.add_argument(
        "--new-swarm-key",
        metavar="FILE",
        type=file_path,
        help="only make the key of a private swarm, in a new FILE for --swarm-key (default: none)",
    )
    where.add_argument(
        "--print-invitation",
        action="store_true",
        help="print an invitation beside the addresses; of a private swarm it has the key in it",
    )
    where.add_argument(
        "--public-name",
        metavar="NAME",
        default="",
        help="what people see instead of a peer id, up to 100 characters",
    )
    where.add_argument(
        "--metrics-port",
        metavar="PORT",
        type=port,
        help="answer /metrics for Prometheus, /shard and /healthz on this TCP port of 127.0.0.1; 0 takes a"
        " free one (default: none)",
    )
    where.add_argument(
        "--exit-with-stdin", action="store_true", help="leave the swarm when standard input is closed"
    )


def config_from(args: argparse.Namespace) -> ServerConfig:
    """
    Raises:
        InputError: an option cannot be used, or two of them contradict each other.
    """
    if args.no_blocks and args.blocks is not None:
        raise InputError("--blocks and --no-blocks contradict each other.", "Give one of them.")
    if args.no_blocks and args.models:
        raise InputError("--models and --no-blocks contradict each other.", "Give one of them.")
    return ServerConfig(
        model=args.model,
        models=args.models,
        blocks=args.blocks,
        num_blocks=args.num_blocks,
        initial_peers=args.initial_peers,
        identity=args.identity,
        swarm_key=args.swarm_key,
        allow_peers=args.allow_peers,
        block_peers=args.block_peers,
        remembers=args.remembers,
        shows_invitation=args.print_invitation,
        dtype=args.dtype,
        quantize=args.quantize,
        device=args.device,
        memory_limit=args.memory_limit,
        max_vram=_max_vram(args.max_vram_mb, args.device),
        kv_tokens=args.kv_tokens,
        kv_overcommit=args.kv_overcommit,
        prefix_cache=args.prefix_cache,
        threads=args.threads,
        evict_after=args.evict_after,
        metrics_port=args.metrics_port,
        host_maddrs=_host_maddrs(args.port, tuple(args.host_maddrs)),
        announce_maddrs=_announced(args.public_ip, args.port, tuple(args.announce_maddrs)),
        relays=False if args.no_relay else args.relay or None,
        shortcut_port=None if args.no_shortcuts else _shortcut_port(args.shortcut_port, args.port),
        public_name=args.public_name,
        timeout=args.timeout,
    )


def _max_vram(mebibytes: int | None, device: str) -> int | None:
    if mebibytes is not None and device == "cpu":
        raise InputError(
            "--max-vram-mb bounds the memory of a GPU, and --device cpu uses none.",
            "Bound main memory with --memory-limit.",
        )
    return None if mebibytes is None else mebibytes * 2**20


def _host_maddrs(port: int | None, given: tuple[str, ...]) -> tuple[str, ...]:
    if given and port is not None:
        raise InputError("--port and --host-maddrs both say where to listen.", "Give one of them.")
    return given or (f"/ip4/0.0.0.0/tcp/{port or 0}",)


def _announced(public_ip: str | None, port: int | None, given: tuple[str, ...]) -> tuple[str, ...]:
    if public_ip is None:
        return given
    if given:
        raise InputError(
            "--public-ip and --announce-maddrs both say what to tell others.", "Give one of them."
        )
    if not port:
        raise InputError(
            "--public-ip takes a port that stays the same.",
            "Give the port that the router forwards, too: --port 31330 --public-ip IP.",
        )
    try:
        ip = ip_address(public_ip)
    except ValueError:
        raise InputError(f"'{public_ip}' is not an IP address.", "It looks like 203.0.113.5.") from None
    return (f"/ip{ip.version}/{ip}/tcp/{port}",)


def _shortcut_port(given: int, main: int | None) -> int:
    if given and given == main:
        raise InputError(f"--port and --shortcut-port are both {main}.", "Give two ports.")
    return given


def _blocks(text: str) -> Span | None:
    if text == "auto":
        return None
    try:
        return Span.parse(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
