"""A swarm of announcements alone, in this process: what the health page watches in tests."""

from collections.abc import Callable
from functools import partial

from swarm.dht.announcement import MODELS_KEY, Announcement, ModelEntry, PeerState, block_key, encode
from swarm.dht.joining import Network
from swarm.dht.memory import MemoryStore
from swarm.dht.records import sign
from swarm.net.calls import MessageStream
from swarm.net.identity import Identity
from swarm.net.memory import MemoryNetwork, MemoryTransport
from swarm.net.messages import Close, Closed, Error, Open, Opened, Ping, Pong
from swarm.net.transport import Stream, StreamClosed

LIFETIME = 30.0
TINY = ModelEntry(model_id="llama-0123", name="tiny", num_blocks=6, fingerprint="f")


class AnnouncedSwarm:
    """Peers by name that announce what they are told to, and answer unless they are killed.

    Those who do not serve answer pings alone.
    """

    def __init__(self, now: Callable[[], float]):
        self.now = now
        self.network = MemoryNetwork()
        self.store = MemoryStore(now)
        self.own_store = self.store.another()
        self.transports: dict[str, MemoryTransport] = {}
        self.pretenders: set[str] = set()

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
        serves: bool = True,
        **more: object,
    ) -> Announcement:
        """Put what the peer of that name says into the store, signed; under its name unless `called`."""
        identity = Identity.from_seed(name)
        if answers and name not in self.transports:
            self.transports[name] = self.network.transport(identity)
            if not serves:
                self.pretenders.add(name)
            await self.transports[name].listen(partial(self._answer, name))
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

    def serve(self, name: str) -> None:
        """Have a peer serve that did not."""
        self.pretenders.discard(name)

    def kill(self, name: str) -> None:
        """End a peer without a farewell: what it announced stays until it expires."""
        self.network.kill(Identity.from_seed(name))

    async def _answer(self, name: str, stream: Stream) -> None:
        """As a server, as far as opening and closing a session."""
        calls = MessageStream(stream)
        try:
            while True:
                asked, _ = await calls.receive()
                if isinstance(asked, Ping):
                    await calls.send(Pong(nonce=asked.nonce))
                elif name in self.pretenders:
                    await calls.send(Error(code="internal", message="No."))
                elif isinstance(asked, Open):
                    await calls.send(
                        Opened(session_id=asked.session_id, dtype="float32", codec="raw", max_step_tokens=512)
                    )
                else:
                    assert isinstance(asked, Close)
                    await calls.send(Closed(session_id=asked.session_id))
        except StreamClosed:
            return
