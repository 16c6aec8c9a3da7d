"""Where an option has its value from: the command line, else the environment, else a file, else a default.

An option has one name: `--kv-tokens` is `kv-tokens` in the file and `SWARM_KV_TOKENS` in the environment.
Decides over texts and tables alone; commands and their options come from outside.
"""

import argparse
import tomllib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from swarm.errors import InputError
from swarm.option_values import TEXTS, is_invitation

PREFIX = "SWARM_"
NO_OPTIONS = ("SWARM_CACHE",)
"""Variables with our prefix that are not named like options."""

COMMANDS = ("server", "client", "health", "demo")
"""Each has a table of that name in the file."""

SHARED = (
    "model",
    "initial-peers",
    "swarm-key",
    "identity",
    "allow-peers",
    "block-peers",
    "no-remembered-peers",
    "json",
    "timeout",
    "verbose",
)
"""Options that (nearly) every command has: the file may set them above its tables, for all commands."""

SECRETS = ("api-key",)
"""Options whose values are shown to nobody; nor is an invitation, wherever it stands: it may hold a key."""

ON, OFF = ("1", "true", "yes", "on"), ("0", "false", "no", "off")

MAX_FILE_BYTES = 1024 * 1024

Kind: TypeAlias = Literal["one", "many", "switch"]


class Source(IntEnum):
    """Where a value may come from, the weakest first."""

    DEFAULT = 0
    FILE = 1
    ENVIRONMENT = 2
    FLAG = 3


@dataclass(frozen=True)
class Setting:
    """An option as it may be set anywhere; `key` is its long name without the dashes.

    `read` gives the value in a text and raises ArgumentTypeError, ValueError or TypeError. A switch that is
    set has the value `on`. What it `excludes`, other options' `dest`, cannot be set together with it.
    """

    key: str
    dest: str
    kind: Kind = "one"
    read: Callable[[str], Any] | None = None
    default: Any = None
    choices: tuple[str, ...] = ()
    on: Any = True
    excludes: frozenset[str] = frozenset()

    @property
    def variable(self) -> str:
        return PREFIX + self.key.upper().replace("-", "_")

    def hides(self, value: Any) -> bool:
        """Whether that value is shown to nobody."""
        texts = value if self.kind == "many" else (value,)
        return bool(value) and (self.key in SECRETS or any(map(is_invitation, texts)))


class Settled(NamedTuple):
    """The value that holds for an option, and where it came from; `name` is how people know that place."""

    value: Any
    source: Source
    name: str


@dataclass(frozen=True)
class ConfigFile:
    """A file's tables, as parsed."""

    path: Path
    tables: Mapping[str, Any]


@dataclass(frozen=True)
class Place:
    """Where a command's options stand in a file: `client.chat`, in a table beside those of its siblings."""

    table: str
    siblings: tuple[str, ...] = ()


def read_file(path: Path) -> ConfigFile:
    """
    Raises:
        InputError: it cannot be read, or is no TOML.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise InputError(f"The file {path} is too large to be a configuration.", "Give another one.")
        return ConfigFile(path, tomllib.loads(data.decode()))
    except OSError as error:
        raise InputError(
            f"The configuration {path} cannot be read: {error.strerror}.",
            "Give the path of a TOML file with --config or SWARM_CONFIG.",
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(
            f"The configuration {path} is not TOML: {error}.",
            'Write lines like kv-tokens = 4096 or public-name = "my server", below [server].',
        ) from error


def settle(
    settings: Sequence[Setting],
    given: Mapping[str, Any],
    environment: Mapping[str, str],
    file: ConfigFile | None,
    place: Place,
) -> dict[str, Settled]:
    """The value of each setting by its `dest`; `given` are those of the command line.

    Raises:
        InputError: something in the file or the environment cannot be used; says where and what would be.
    """
    in_file = _in_file(file, place, settings) if file else {}
    settled = {}
    for setting in settings:
        text = environment.get(setting.variable, "")
        if setting.dest in given:
            found = Settled(given[setting.dest], Source.FLAG, f"--{setting.key}")
        elif text:
            value = _of_environment(setting, text)
            found = Settled(value, Source.ENVIRONMENT, setting.variable)
        elif file and setting.key in in_file:
            raw, where = in_file[setting.key]
            found = Settled(_of_file(setting, raw, where), Source.FILE, str(file.path))
        else:
            found = Settled(setting.default, Source.DEFAULT, "default")
        settled[setting.dest] = found
    for setting in settings:
        own = settled[setting.dest].source
        if any(settled[other].source > own > Source.DEFAULT for other in setting.excludes):
            settled[setting.dest] = Settled(setting.default, Source.DEFAULT, "default")
    return settled


def unused_variables(settings: Iterable[Setting], environment: Mapping[str, str]) -> list[str]:
    """The variables with our prefix that name no option of this command."""
    used = {setting.variable for setting in settings} | {*NO_OPTIONS, f"{PREFIX}CONFIG"}
    return sorted(name for name in environment if name.startswith(PREFIX) and name not in used)


def without_options(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a child that is told by its arguments alone what to do."""
    return {
        name: value
        for name, value in environment.items()
        if not name.startswith(PREFIX) or name in NO_OPTIONS
    }


def _in_file(file: ConfigFile, place: Place, settings: Sequence[Setting]) -> dict[str, tuple[Any, str]]:
    """What the file says for the command at `place`, by key, and where: the more particular table holds.

    Raises:
        InputError: a key or a table that concerns this command is unknown.
    """
    keys = [setting.key for setting in settings]
    found: dict[str, tuple[Any, str]] = {}
    for name, table, tables in _levels(file.tables, place):
        known = keys if name == place.table else SHARED
        for key, value in table.items():
            full = f"{name}.{key}" if name else key
            if isinstance(value, dict) and key not in tables:
                raise _unknown_table(file, full, tables)
            if not isinstance(value, dict) and key in tables:
                raise InputError(
                    f"In {file.path}, {full} is not a table.", f"Write [{full}] and its options below it."
                )
            if key in known:
                found[key] = value, _where(file, name)
            elif key not in tables:
                raise _unknown_key(file, name, key, known, place if key in keys else None)
    return found


def _levels(
    tables: Mapping[str, Any], place: Place
) -> Iterator[tuple[str, Mapping[str, Any], Collection[str]]]:
    """The tables that concern the command, outermost first: their names, they, and which may lie in them."""
    yield "", tables, COMMANDS
    name = ""
    for part in place.table.split("."):
        tables, name = tables.get(part, {}), f"{name}.{part}" if name else part
        yield name, tables, () if name == place.table else place.siblings


def _unknown_table(file: ConfigFile, name: str, known: Collection[str]) -> InputError:
    outer, _, _ = name.rpartition(".")
    names = [f"[{outer}.{one}]" if outer else f"[{one}]" for one in known]
    close = get_close_matches(f"[{name}]", names, 1)
    if close:
        hint = f"Did you mean {close[0]}?"
    else:
        hint = f"There are {', '.join(names)}." if names else f"[{outer}] holds no tables."
    return InputError(f"In {file.path}, no command is called [{name}].", hint)


def _unknown_key(
    file: ConfigFile, table: str, key: str, known: Collection[str], rather: Place | None
) -> InputError:
    where = _where(file, table)
    if rather is not None:
        return InputError(f"In {where}, {key} stands above its table.", f"Write it below [{rather.table}].")
    close = get_close_matches(key, known, 1)
    hint = f"Did you mean {close[0]}?" if close else f"Known are: {', '.join(sorted(known))}."
    return InputError(f"In {where}, there is no option {key}.", hint)


def _where(file: ConfigFile, table: str) -> str:
    return f"[{table}] of {file.path}" if table else str(file.path)


def _of_file(setting: Setting, raw: Any, where: str) -> Any:
    try:
        return _value(setting, raw)
    except (argparse.ArgumentTypeError, ValueError, TypeError) as error:
        raise _unusable(f"In {where}, {setting.key}", error, setting) from error


def _of_environment(setting: Setting, text: str) -> Any:
    try:
        return _value(setting, _parsed(setting, text))
    except (argparse.ArgumentTypeError, ValueError, TypeError) as error:
        raise _unusable(setting.variable, error, setting) from error


def _parsed(setting: Setting, text: str) -> Any:
    """What the file would have in place of a variable's text."""
    if setting.kind == "switch":
        word = text.strip().lower()
        if word not in (*ON, *OFF):
            raise ValueError(f"'{text}' is neither 1 nor 0")
        return word in ON
    if setting.kind == "many" and text.lstrip().startswith("["):
        try:
            return tomllib.loads(f"list = {text}")["list"]
        except tomllib.TOMLDecodeError:
            raise ValueError("it begins like a list and is none") from None
    return text


def _value(setting: Setting, raw: Any) -> Any:
    """The value of a setting from what TOML has for it: as on the command line, but for lists and switches.

    Raises:
        ArgumentTypeError, ValueError, TypeError: it is none; says why.
    """
    if setting.kind == "switch":
        if not isinstance(raw, bool):
            raise TypeError(f"it is on or off, and this is {_kind_of(raw)}")
        return setting.on if raw else setting.default
    if setting.kind == "one":
        return _one(setting, raw)
    items = raw if isinstance(raw, list) else [raw]
    values = [_one(setting, item) for item in items]
    if isinstance(setting.default, tuple):  # whose reader finds several values in one text
        return tuple(value for some in values for value in some)
    return values


def _one(setting: Setting, raw: Any) -> Any:
    is_number = isinstance(raw, int | float) and not isinstance(raw, bool) and setting.read not in TEXTS
    if not (isinstance(raw, str) or is_number):
        wanted = "a text, in quotes" if setting.read in TEXTS else "a number or a text"
        raise TypeError(f"it takes {wanted}, and this is {_kind_of(raw)}")
    text = str(raw)
    try:
        value = text if setting.read is None else setting.read(text)
    except (ValueError, TypeError):
        raise ValueError(f"'{text}' is no value for it") from None
    if setting.choices and value not in setting.choices:
        raise ValueError(f"'{text}' is none of {', '.join(setting.choices)}")
    return value


def _kind_of(raw: Any) -> str:
    match raw:
        case bool():
            return str(raw).lower()
        case int() | float():
            return f"the number {raw}"
        case str():
            return "a text"
        case list():
            return "a list"
        case dict():
            return "a table"
    return "a time"


def _unusable(what: str, error: Exception, setting: Setting) -> InputError:
    return InputError(f"{what} cannot be used: {str(error).rstrip('.')}.", _hint(setting))


def _hint(setting: Setting) -> str:
    match setting.kind:
        case "switch":
            return f"Write {setting.key} = true in the file, or {setting.variable}=1."
        case "many":
            return f'Write {setting.key} = ["one", "another"], or {setting.variable}=one.'
    return f"What --{setting.key} takes is told by --help."
