"""Waking a peer that has let its blocks go: it loads them again once it is asked for a session on them."""

import secrets

from swarm.client.faults import blaming
from swarm.client.route import Hop
from swarm.dht.announcement import Announcement
from swarm.net.calls import MessageStream
from swarm.net.messages import Open
from swarm.net.transport import Transport


async def wake(transport: Transport, server: Announcement, timeout: float) -> None:
    """Ask `server` for a session, which it refuses until it has its blocks, and give up one that it grants.

    Raises:
        WarmingUp: it is loading them now, as it should.
        RemoteFault, NoCapacity, RequestRefused: see `swarm.client.faults`.
    """
    hop = Hop(server.peer_id, server.span, server)
    asked = Open(
        session_id=secrets.token_hex(16),
        model_id=server.model_id,
        start=server.start,
        end=server.end,
        max_tokens=1,
    )
    with blaming(hop):
        calls = MessageStream(await transport.open_stream(hop.peer, server.addresses))
        try:
            await calls.call(asked, timeout=timeout)
        finally:
            calls.close()
