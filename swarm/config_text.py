"""The options that hold for a command, written as a file that brings them about again.

Pure functions; what the values mean is not known here.
"""

import json
from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any

from swarm.configuring import Place, Setting, Settled, unused_variables
from swarm.option_values import spelled

COLUMN = 40
"""Where the comments begin, behind values that are short enough."""


def as_toml(
    command: str,
    place: Place,
    settings: Sequence[Setting],
    settled: Mapping[str, Settled],
    environment: Mapping[str, str],
) -> str:
    """One line for each setting, with where its value came from; those that are not set as comments.

    The values of secrets are left out.
    """
    head = (
        f"The options that hold for '{command}'. Save this, and give it with --config FILE or SWARM_CONFIG."
    )
    lines = [f"# {line}" for line in wrap(head, 98)]
    lines += [
        f"# {name} in the environment is no option of this command."
        for name in unused_variables(settings, environment)
    ]
    lines += ["", f"[{place.table}]"]
    lines += [_line(setting, settled[setting.dest]) for setting in settings]
    return "\n".join(lines)


def _line(setting: Setting, settled: Settled) -> str:
    name = "".join(character if character.isprintable() else "?" for character in settled.name)
    if setting.hides(settled.value):
        return f"# {setting.key} is a secret, set by {name}, and not shown"
    if settled.value is None:
        return f"# {setting.key} is not set"
    text = f"{setting.key} = {_toml(_plain(setting, settled.value))}"
    return f"{text:<{COLUMN}} # {name}"


def _plain(setting: Setting, value: Any) -> Any:
    if setting.kind == "switch":
        return value == setting.on
    if setting.kind == "many":
        return [spelled(item, None) for item in value]
    return spelled(value, setting.read)


def _toml(value: Any) -> str:
    """TOML's form of a text, a number, a switch, or a list of them."""
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):
        text = value.encode(errors="replace").decode()
        return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else str(value)
