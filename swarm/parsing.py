"""Reading a command line: its options, those that every command shares, and what is set elsewhere than there.

Imports nothing heavy, so that `--help` answers at once, and knows no room.
"""

import argparse
import os
import stat
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from swarm.config_text import as_toml
from swarm.configuring import PREFIX, ConfigFile, Kind, Place, Setting, Settled, Source, read_file, settle
from swarm.errors import InputError
from swarm.help_text import HelpText
from swarm.option_values import ADDRESS_START, addresses, duration, file_path, names

DEFAULT_MODEL = "smollm2-135m"
PEERS_OPTION = "--initial-peers"
CONFIG_VARIABLE = f"{PREFIX}CONFIG"

EXIT_USAGE = 2

NOT_SETTINGS = ("help", "config", "print_config")


class Parser(argparse.ArgumentParser):
    """An argument parser that answers a mistake with one sentence, a hint and exit code 2.

    With a `place`, options that are not on the command line are looked for in the environment and in the
    file that `--config` names. The addresses after `--initial-peers` end where something else begins, so
    that a prompt may follow.
    """

    def __init__(self, *, place: Place | None = None, **more: Any):
        super().__init__(formatter_class=HelpText, add_help=place is None, **more)
        self.place = place

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        given = _join_addresses(sys.argv[1:] if args is None else args)
        if self.place is None:
            return super().parse_known_args(given, namespace)
        settings = settings_of(self)
        said, unknown = super().parse_known_args(given, _nothing_given(setting.dest for setting in settings))
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        try:
            file = _config_file(said)
            settled = settle(settings, vars(said), os.environ, file, self.place)
        except InputError as error:
            self.exit(EXIT_USAGE, f"error: {error.message}\nhint: {error.hint}\n")
        if file is not None:
            _warn_of_open_secrets(settings, settled, file)
        if said.print_config:
            print(as_toml(self.prog, self.place, settings, settled, os.environ))
            self.exit()
        values = {dest: one.value for dest, one in settled.items()}
        return argparse.Namespace(**{**vars(said), **values}), []

    def error(self, message: str) -> NoReturn:
        sentence = message[:1].upper() + message[1:].rstrip(".")
        self.exit(EXIT_USAGE, f"error: {sentence}.\nhint: '{self.prog} --help' shows what can be given.\n")


def settings_of(parser: argparse.ArgumentParser) -> list[Setting]:
    """The options of a command that may be set elsewhere, in the order of its help."""
    rivals: dict[str, set[str]] = {}
    for group in parser._mutually_exclusive_groups:
        for action in group._group_actions:
            others = {other.dest for other in group._group_actions if other is not action}
            rivals.setdefault(action.dest, set()).update(others)
    return [
        Setting(
            key=max(action.option_strings, key=len).lstrip("-"),
            dest=action.dest,
            kind=_kind_of(action),
            read=action.type if callable(action.type) else None,
            default=action.default,
            choices=tuple(action.choices or ()),
            on=action.const,
            excludes=frozenset(rivals.get(action.dest, ())),
        )
        for action in parser._actions
        if action.option_strings and action.dest not in NOT_SETTINGS
    ]


def shared_options(
    parser: Parser,
    *,
    timeout: float = 60.0,
    joins: bool = True,
    model: str | None = DEFAULT_MODEL,
    names_model: bool = True,
    may_choose_model: bool = False,
) -> None:
    """Add the options that every command takes, behind its own. `timeout` is its own default, in seconds.

    They are read as `args.model`, `.initial_peers` (tuple of addresses and invitations), `.swarm_key`,
    `.identity`, `.allow_peers` and `.block_peers` (Paths or None), `.remembers` (bool), `.json`, `.timeout`
    (seconds) and `.verbose`. A command that `joins` no swarm of others has none of what is about joining; one
    that is about no model in particular has no `model`, and one that is about all of them unless told
    otherwise has None for it. One that `may_choose_model` has `models` beside it, a tuple of names.
    """
    swarm = parser.add_argument_group("the swarm")
    if names_model:
        otherwise = "all models of the swarm" if model is None else model
        naming = swarm.add_mutually_exclusive_group()
        naming.add_argument(
            "--model",
            default=model,
            metavar="NAME",
            help=f"a local folder, a URL, a hub repository or an alias (default: {otherwise})",
        )
        if may_choose_model:
            naming.add_argument(
                "--models",
                type=names,
                default=(),
                metavar="A,B,C",
                help="serve whichever of these models the swarm needs most, and go on with another when that"
                " needs it more (default: --model alone)",
            )
    if joins:
        _joining_options(swarm)
    swarm.add_argument(
        "--timeout",
        type=duration,
        default=timeout,
        metavar="TIME",
        help="the longest to wait for the swarm, such as 30, 90s or 2m (default: %(default)g seconds)",
    )
    _general_options(parser.add_argument_group("general"), has_place=parser.place is not None)


def _joining_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        PEERS_OPTION,
        action=_AddAddresses,
        type=addresses,
        default=(),
        metavar="ADDR",
        help="one or more addresses to join by, as a server prints them, or an invitation",
    )
    group.add_argument(
        "--swarm-key",
        type=file_path,
        metavar="FILE",
        help="the key of a private swarm, which an invitation has in it (default: none)",
    )
    group.add_argument(
        "--identity",
        type=file_path,
        metavar="FILE",
        help="this peer's key; made if it does not exist (default: a new one at each start)",
    )
    group.add_argument(
        "--allow-peers",
        type=file_path,
        metavar="FILE",
        help="have to do with these peers alone, one id a line; changes hold within a second (default: all)",
    )
    group.add_argument(
        "--block-peers",
        type=file_path,
        metavar="FILE",
        help="have nothing to do with these peers, one id a line; changes hold within a second"
        " (default: none)",
    )
    group.add_argument(
        "--no-remembered-peers",
        dest="remembers",
        action="store_false",
        help="neither join by peers that were there before, if the initial peers are gone, nor remember any",
    )


def _general_options(group: argparse._ArgumentGroup, *, has_place: bool) -> None:
    group.add_argument("--json", action="store_true", help="print machine-readable lines on standard output")
    group.add_argument(
        "-v", "--verbose", action="store_true", help="show what happens inside, on standard error"
    )
    if not has_place:
        return
    group.add_argument(
        "--config",
        type=file_path,
        metavar="FILE",
        help="a TOML file with options; those given here come first, then those in the environment, where"
        f" --timeout is SWARM_TIMEOUT (default: ${CONFIG_VARIABLE})",
    )
    group.add_argument(
        "--print-config",
        action="store_true",
        help="print the options that hold, and where each comes from, as such a file",
    )
    group.add_argument("-h", "--help", action="help", help="show this and leave")


class _AddAddresses(argparse.Action):
    """Each use of the option adds its addresses."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, (getattr(namespace, self.dest, None) or ()) + values)


def _join_addresses(arguments: Sequence[str]) -> list[str]:
    """Make `--initial-peers A B` one argument, `--initial-peers=A,B`."""
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1].partition("=")[0] == PEERS_OPTION and ADDRESS_START.match(argument):
            joined[-1] += ("=" if joined[-1] == PEERS_OPTION else ",") + argument
        else:
            joined.append(argument)
    return joined


def _nothing_given(optional: Iterable[str]) -> argparse.Namespace:
    """A namespace to fill from a command line, which takes up no defaults for `optional` names."""
    namespace: argparse.Namespace = type("Given", (argparse.Namespace,), dict.fromkeys(optional))()
    return namespace


def _kind_of(action: argparse.Action) -> Kind:
    if action.nargs == 0:
        return "switch"
    is_list = action.nargs in ("+", "*") or isinstance(action.default, list | tuple)
    return "many" if is_list else "one"


def _config_file(said: argparse.Namespace) -> ConfigFile | None:
    path: Path | None = said.config
    if path is None and os.environ.get(CONFIG_VARIABLE):
        path = file_path(os.environ[CONFIG_VARIABLE])
    return read_file(path) if path is not None else None


def _warn_of_open_secrets(
    settings: Iterable[Setting], settled: Mapping[str, Settled], file: ConfigFile
) -> None:
    """Say so on standard error where others may read the secrets that a file holds."""
    in_file = [one for one in settings if settled[one.dest].source == Source.FILE]
    kept = [one.key for one in in_file if one.hides(settled[one.dest].value)]
    with suppress(OSError):
        if kept and stat.S_IMODE(file.path.stat().st_mode) & 0o077:
            print(
                f"warning: Other users of this machine can read the {kept[0]} in {file.path}: chmod 600 it.",
                file=sys.stderr,
            )
