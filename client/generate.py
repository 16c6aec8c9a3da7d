"""The command `generate`: one prompt, one answer, streamed to standard output or as one JSON line."""

import argparse
import sys
from typing import TYPE_CHECKING

from swarm import cli
from swarm.client.options import Options
from swarm.client.terminal import SCREEN, answer_options, joined_swarm
from swarm.client.text import printable
from swarm.errors import InputError

if TYPE_CHECKING:
    from swarm.client.facade import Swarm
    from swarm.client.generation import Generation


async def main(args: argparse.Namespace) -> int:
    options = answer_options(args)
    prompt = read_prompt(args.prompt)
    async with joined_swarm(args) as swarm:
        await answer(swarm, prompt, options, raw=args.raw, as_json=args.json)
        if args.evidence_folder is not None:
            await swarm.settle_audits(args.timeout)
    return 0


def read_prompt(given: str | None) -> str:
    """The prompt from the command line, or from standard input if it is `-` or missing.

    Raises:
        InputError: there is none.
    """
    if given is None and sys.stdin.isatty():
        raise InputError(
            "There is no prompt.", 'Write it behind the command: generate "Why is the sky blue?"'
        )
    prompt = sys.stdin.read().removesuffix("\n") if given in (None, "-") else given
    if not prompt:
        raise InputError("The prompt is empty.", "Give some text, as an argument or on standard input.")
    return prompt


async def answer(
    swarm: "Swarm", prompt: str, options: Options, *, raw: bool = False, as_json: bool = False
) -> "Generation":
    """Write the answer to `prompt` to standard output, piece by piece or, as JSON, at its end."""
    stream = swarm.stream(prompt, raw=raw, **options)
    if as_json:
        generation = await stream.result()
        cli.emit(generation.as_json())
        return generation
    shown = printable if sys.stdout.isatty() else str
    try:
        async for piece in stream:
            SCREEN.write(shown(piece))
    finally:
        await stream.aclose()
        SCREEN.end_line()
    return await stream.result()
