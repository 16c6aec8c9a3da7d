"""A peer that keeps a swarm joinable: it serves no blocks, loads no model, and stands on nobody's route.

Others join by it, and it keeps records for them, relays, and tells who is reached, as every peer that listens
does. Knows no model.
"""

from contextlib import AsyncExitStack

from swarm.net.transport import Transport
from swarm.server.config import ServerConfig
from swarm.server.entering import enter, way_in
from swarm.server.events import BootstrapEvents
from swarm.server.greeting import Greeter
from swarm.server.invite import Invite
from swarm.server.stopping import Stopping, unless


async def keep_joinable(config: ServerConfig, stopping: Stopping, *, as_json: bool) -> None:
    """Be such a peer until asked to stop.

    Raises:
        InputError: the identity, a key, a list, an address or a port cannot be used.
        SwarmError: the swarm cannot be reached, or this peer's network failed.
    """
    async with AsyncExitStack() as stack:
        identity, entrance = await way_in(config)
        events = BootstrapEvents(Invite.of(config, entrance), as_json=as_json)
        network = await unless(stopping.asked, enter(stack, config, identity, entrance))
        if network is not None:
            await network.transport.listen(Greeter(network.transport).on_stream)
            addresses = await network.transport.addresses()
            events.listening(identity.peer, addresses, is_first=network.is_new)
            await unless(stopping.asked, _until_failed(network.transport))
    events.left()
    stopping.has_left = True


async def _until_failed(transport: Transport) -> None:
    raise await transport.wait_failed()
