"""The command `invite`: one string by which others join this swarm, its key included if it has one."""

import argparse
import asyncio
import sys
from contextlib import AsyncExitStack

from swarm import cli
from swarm.client.joining import join
from swarm.net.addresses import outward
from swarm.net.entrance import entrance_of
from swarm.net.invitation import MAX_PEERS, Invitation

SECRET = "Whoever has this invitation is a member of the swarm: give it only to those, by a safe way."


async def main(args: argparse.Namespace) -> int:
    """Name those by whom this client joined, and others that are there, should they leave.

    Raises:
        InputError: an address or the key cannot be used.
        SwarmError: the swarm cannot be reached.
    """
    way_in = await asyncio.to_thread(entrance_of, args)
    async with AsyncExitStack() as stack:
        with cli.Progress(quiet=args.json) as progress:
            joined = progress.stage("Joining the swarm", counted=False)
            network = await join(stack, way_in, args.identity)
            others = await network.store.neighbours(MAX_PEERS)
            joined(1.0)
    addresses = outward(dict.fromkeys((*way_in.addresses, *others)))
    invitation = Invitation(tuple(addresses), way_in.door.key)
    is_private = way_in.door.key is not None
    if args.json:
        cli.emit({"invitation": invitation.text(), "addresses": addresses, "is_private": is_private})
        return 0
    print(invitation.text(), flush=True)
    if is_private:
        print(SECRET, file=sys.stderr)
    return 0
