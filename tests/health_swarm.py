"""A swarm of announcements alone, in this process: what the health page watches in tests."""

from collections.abc import Callable

from swarm.dht.announcement import MODELS_KEY, Announcement, ModelEntry, PeerState, block_key, encode
from swarm.dht.joining import Network
from swarm.dht.memory import MemoryStore
from swarm.dht.records import sign
from swarm.net.calls import MessageStream
from swarm.net.identity import Identity
from swarm.net.memory import MemoryNetwork, MemoryTransport
from swarm.net.messages import Ping, Pong
from swarm.net.transport import Stream, StreamClosed

LIFETIME = 30.0
TINY = ModelEntry(model_id="llama-0123", name="tiny", num_blocks=6, fingerprint="f")


class AnnouncedSwarm:
    """Peers by name that announce what they are told to, and answer pings unless they are killed."""

    def __init__(self, now: Callable[[], float]):
        self.now = now
        self.network = MemoryNetwork()
        self.store = MemoryStore(now)
        self.own_store = self.store.another()
        self.transports: dict[str, MemoryTransport] = {}

    def access(self, name: str = "page") -> Network:
        """The network of one who serves nothing."""
        identity = Identity.from_seed(name)
        return Network(identity, self.network.transport(identity), self.own_store)

    async def announce(
        self,
        name: str,
        start: int,
        end: int,
        state: PeerState = "serving",
        *,
        model: ModelEntry = TINY,
        lifetime: float = LIFETIME,
        answers: bool = True,
        called: str | None = None,
        **more: object,
    ) -> Announcement:
        """Put what the peer of that name says into the store, signed; under its name unless `called`."""
        identity = Identity.from_seed(name)
        if answers and name not in self.transports:
            self.transports[name] = self.network.transport(identity)
            await self.transports[name].listen(answer_pings)
        said = Announcement(
            peer=identity.peer,
            model_id=model.model_id,
            start=start,
            end=end,
            state=state,
            name=name if called is None else called,
            **more,  # type: ignore[arg-type]
        )
        expires_at = self.now() + lifetime
        records = [
            sign(identity, block_key(model.model_id, block), encode(said), expires_at)
            for block in said.span.blocks
        ]
        await self.store.put([*records, sign(identity, MODELS_KEY, encode(model), expires_at)])
        return said

    def kill(self, name: str) -> None:
        """End a peer without a farewell: what it announced stays until it expires."""
        self.network.kill(Identity.from_seed(name))


async def answer_pings(stream: Stream) -> None:
    calls = MessageStream(stream)
    try:
        while True:
            asked, _ = await calls.receive()
            assert isinstance(asked, Ping)
            await calls.send(Pong(nonce=asked.nonce))
    except StreamClosed:
        return
