"""How `--help` is laid out: a short usage, options with their defaults, examples at the end as they are."""

import argparse
from collections.abc import Iterable

EXAMPLES = "examples:\n"


class HelpText(argparse.HelpFormatter):
    """Names the positional arguments in the usage, and sums the options up; leaves examples unwrapped."""

    def add_usage(
        self,
        usage: str | None,
        actions: Iterable[argparse.Action],
        groups: Iterable[argparse._MutuallyExclusiveGroup],
        prefix: str | None = None,
    ) -> None:
        every = list(actions)
        shown = [action for action in every if not action.option_strings]
        if len(shown) < len(every):
            shown.insert(0, argparse.Action([], "options", metavar="[OPTIONS]"))
        super().add_usage(usage, shown, (), prefix)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith(EXAMPLES):
            return text
        return super()._fill_text(text, width, indent)


def examples(*commands: tuple[str, str]) -> str:
    """The end of a help text: what each is for, and the command line below it."""
    return EXAMPLES + "\n".join(f"  {what}:\n    {command}" for what, command in commands)
