"""A peer without blocks answers who asks about the way to it, and nothing else."""

import pytest

from swarm.net.calls import MessageStream, Refused
from swarm.net.memory import MemoryNetwork
from swarm.net.messages import Observe, Observed, Open, Ping
from swarm.net.virtual_time import in_virtual_time
from swarm.server.greeting import Greeter

SESSION = "1" * 32


@in_virtual_time
async def test_it_answers_pings_and_how_it_sees_others_and_opens_no_session() -> None:
    network = MemoryNetwork()
    async with network.transport("greeter") as greeter, network.transport("asker") as asker:
        await greeter.listen(Greeter(greeter).on_stream)
        network.places[asker.peer] = "/ip4/203.0.113.5/tcp/4444"
        calls = MessageStream(await asker.open_stream(greeter.peer))
        await calls.call(Ping(nonce=1), timeout=5)
        told, _ = await calls.call(Observe(nonce=2), timeout=5)
        assert isinstance(told, Observed)
        assert told.address == "/ip4/203.0.113.5/tcp/4444"
        with pytest.raises(Refused, match="serves no model"):
            await calls.call(Open(session_id=SESSION, model_id="m", start=0, end=1, max_tokens=1), timeout=5)
        await calls.call(Ping(nonce=3), timeout=5)
