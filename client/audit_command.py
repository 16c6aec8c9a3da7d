"""The command `audit`: whether evidence of wrong results holds, told by computing them anew from the weights.

Needs the weights of the blocks that are accused, and no swarm.
"""

import argparse
from typing import TYPE_CHECKING

from swarm import cli
from swarm.importing import imported

if TYPE_CHECKING:
    from swarm.client.recomputing import Finding


async def main(args: argparse.Namespace) -> int:
    """
    Returns:
        The exit code: 0 if the evidence holds.
    """
    recomputing = await imported("swarm.client.recomputing")
    with cli.Progress(quiet=args.json) as progress:
        finding: Finding = await recomputing.examine(args.evidence, args.model, on_progress=progress.on_stage)
    if args.json:
        cli.emit(finding.as_json())
    else:
        print(finding)
    return 0 if finding.holds else 1
