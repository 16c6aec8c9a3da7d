"""A client in a process of its own, which tells how it comes to a peer: straight, or through a relay.

`python -m tests.visitor JOIN ADDRESS SECONDS` opens a stream to the peer at ADDRESS every second, for so many
seconds or until one goes straight, and prints where the peer's end of the connection was each time.
"""

import asyncio
import sys
from contextlib import AsyncExitStack

from swarm.dht.joining import join
from swarm.net.addresses import parse_address
from swarm.net.calls import MessageStream, ping
from swarm.net.entrance import Entrance
from swarm.net.relaying import is_relayed


async def visit(way: str, address: str, seconds: int) -> None:
    peer = parse_address(address).peer
    async with AsyncExitStack() as stack:
        transport = (await join(stack, Entrance((way,)))).transport
        for _ in range(seconds):
            calls = MessageStream(await transport.open_stream(peer, [address]))
            await ping(calls)
            seen = await transport.seen_at(peer)
            print(seen, flush=True)
            calls.close()
            if not is_relayed([seen]):
                return
            await asyncio.sleep(1)


if __name__ == "__main__":
    asyncio.run(visit(sys.argv[1], sys.argv[2], int(sys.argv[3])))
