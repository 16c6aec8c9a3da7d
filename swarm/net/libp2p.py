"""The network of the world: `Transport` over the libp2p daemon, encrypted, authenticated, routed.

It imports `hivemind.p2p`, as `control` does, which takes half a second: import it late. Both adapt hivemind's
client of the daemon and patch nothing. What peers say to each other is not known here.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import swarm.net.slim  # noqa: F401, before hivemind

# isort: split

from hivemind.p2p import P2P, P2PDaemonError
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo
from hivemind.proto.p2pd_pb2 import PeerInfo
from hivemind.utils.logging import use_hivemind_log_handler

from swarm.net.addresses import (
    Address,
    ip_of,
    is_loopback,
    network_of,
    parse_address,
    parse_listen_address,
    usable_addresses,
)
from swarm.net.control import DIAL_TIMEOUT, Control, unreachable
from swarm.net.daemon import Daemon, check_can_listen
from swarm.net.door import Door
from swarm.net.identity import Identity, is_peer_id
from swarm.net.inbound import Inbound
from swarm.net.libp2p_stream import Libp2pStream
from swarm.net.multiaddrs import end_of, multiaddr, peer_bytes
from swarm.net.punching import Punching, is_straight
from swarm.net.relaying import ENOUGH_BYTES, Relaying, is_relayed
from swarm.net.shortcut_turns import AcceptorsTurn, OpenersTurn
from swarm.net.shortcuts import Shortcuts, has_shortcuts
from swarm.net.telling import tell, tellable
from swarm.net.transport import CONNECT_TIMEOUT, OnStream, PeerId, PeerUnreachable, Stream, TransportError
from swarm.net.wary import is_public, permitted, worth_dialling

logger = logging.getLogger(__name__)

# hivemind installs a coloured handler of its own and renames a level when it is imported
use_hivemind_log_handler("nowhere")
logging.getLogger("hivemind").setLevel(logging.WARNING)
logging.addLevelName(logging.WARNING, "WARNING")

SETTLE_TIME = 1.0
"""Seconds in which other initial peers may still answer after the first one did."""
PUNCH_LOOKS = 20
PUNCH_PERIOD = 0.1
"""How often, and after how many seconds again, to look whether a straight connection has come."""
RELAY_ATTEMPTS = 8
"""How often a daemon is started anew that was to relay and does not; every second one does."""
NO_RELAYS = Relaying()


class Libp2pTransport:
    """This peer's access to the network. Implements `Transport`; made by `start`."""

    def __init__(self, identity: Identity, daemon: Daemon, p2p: P2P, door: Door):
        self.door = door
        self.identity = identity
        self.peer = identity.peer
        self.p2p = p2p
        self._daemon = daemon
        self._control = Control(p2p)
        self._streams: set[Libp2pStream] = set()
        self._shortcuts = Shortcuts((), None, self._shortcut_hosts)
        self._inbound: Inbound | None = None
        self._own: list[str] = []
        self._is_wary = False
        self._through: tuple[str, ...] = ()
        self._punching: Punching | None = None
        self._failure: TransportError | None = None
        self._has_failed = asyncio.Event()
        self._watch = asyncio.create_task(self._watch_daemon(), name="watch the libp2p daemon")

    @classmethod
    async def start(
        cls,
        identity: Identity | Path | str,
        initial_peers: Sequence[str] = (),
        host_maddrs: Sequence[str] = ("/ip4/0.0.0.0/tcp/0",),
        announce_maddrs: Sequence[str] = (),
        *,
        routes_for_others: bool = True,
        nat_port_map: bool = False,
        relaying: Relaying = NO_RELAYS,
        shortcut_port: int | None = 0,
        door: Door | None = None,
    ) -> "Libp2pTransport":
        """Start the daemon and join the swarm through whichever of `initial_peers` answers.

        `identity` may be the path of its file, made if missing. An empty `host_maddrs` listens nowhere.
        `routes_for_others` lets other peers ask this one for addresses; a short-lived client turns it off.
        Who has it on dials no private address that a peer names, unless it has none but such itself. Who may
        come in at its `door` may open streams to this peer; by default all may. Streams go on by shortcuts
        where they can, for which it listens at TCP port `shortcut_port` of the same hosts; None has none.

        Raises:
            InputError: an address is malformed, in use, or not this machine's; or the identity's file.
            PeerUnreachable: none of `initial_peers` answered within `CONNECT_TIMEOUT`.
            TransportError: the daemon could not be started.
        """
        if not isinstance(identity, Identity):
            identity = Identity.load_or_create(identity)
        peers = [peer for peer in map(parse_address, initial_peers) if peer.peer != identity.peer]
        hosts = [ip for address in host_maddrs if (ip := ip_of(parse_listen_address(address)))]
        shortcut_maddrs = [f"/ip{6 if ':' in ip else 4}/{ip}/tcp/{shortcut_port or 0}" for ip in hosts]
        for address in (*host_maddrs, *shortcut_maddrs):
            check_can_listen(address)
        options = [
            "-dhtServer=1" if routes_for_others else "-dhtClient=1",
            "-connManager=1",
            f"-natPortMap={int(nat_port_map)}",
            f"-hostAddrs={','.join(host_maddrs)}" if host_maddrs else "-noListenAddrs=1",
            *relaying.options(listens=bool(host_maddrs)),
        ]
        if announced := [parse_listen_address(address) for address in announce_maddrs]:
            options.append(f"-announceAddrs={','.join(announced)}")
        transport = await cls._started(identity, options, door or Door())
        for _ in range(RELAY_ATTEMPTS if relaying.serves else 0):
            if await _relays_enough(transport, host_maddrs):
                break
            await transport.close()
            transport = await cls._started(identity, options, transport.door)
        transport._shortcuts = Shortcuts(hosts, shortcut_port, transport._shortcut_hosts)
        transport._through = relaying.through
        transport._punching = Punching() if relaying.punches(listens=bool(host_maddrs)) else None
        try:
            await transport._join(peers)
            own = await transport.addresses()
            transport._is_wary = routes_for_others and bool(own)
            if transport._punching is not None and is_public(one for one in own if not is_relayed([one])):
                transport._punching.on_seen(time.monotonic())
        except BaseException:
            await transport.close()
            raise
        return transport

    @classmethod
    async def _started(cls, identity: Identity, options: Sequence[str], door: Door) -> "Libp2pTransport":
        daemon = await Daemon.start(identity, options)
        try:
            p2p = await P2P.replicate(multiaddr(daemon.control_address))
            return cls(identity, daemon, p2p, door)
        except BaseException as error:
            await daemon.stop()
            if isinstance(error, OSError | EOFError | P2PDaemonError):
                raise TransportError("The libp2p daemon ended while it started.", daemon.last_line) from error
            raise

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def clock(self) -> float:
        return time.perf_counter()

    async def addresses(self) -> list[str]:
        self._check_usable()
        async with self._daemon_calls():
            known = await self._control.listening_at()
        self._own = [f"{text}/p2p/{self.peer}" for text in known]
        if not is_relayed(self._own):  # the daemon names no relay at a private address
            self._own += [f"{relay}/p2p-circuit/p2p/{self.peer}" for relay in self._through]
        return list(self._own)

    async def seen_at(self, peer: PeerId) -> str:
        return min(await self._ways_to(peer), key=lambda way: is_relayed([way]), default="")

    async def be_seen_at(self, outer: str) -> None:
        own = sorted(await self.addresses(), key=is_loopback, reverse=True)
        seen, listening = tellable(outer), next(filter(None, map(tellable, own)), None)
        if self._punching is None or seen is None or listening is None:
            return
        try:
            await asyncio.to_thread(tell, listening, seen)
        except OSError as error:
            logger.debug("the libp2p daemon does not hear where it is seen: %s", error)
        else:
            self._punching.on_seen(time.monotonic())

    async def networks(self) -> dict[bytes, str]:
        """The network at the other end of this peer's connection with each other one, by binary peer ids.

        Raises:
            TransportError: this peer's own network has failed or was closed.
        """
        return {bytes(known.id): network_of(end_of(known.addrs)) for known in await self._connected()}

    async def known_addresses(self, peer: PeerId) -> list[str]:
        """Multiaddrs at which the daemon has learned that `peer` listens, each ending in its id.

        Raises:
            TransportError: this peer's own network has failed.
        """
        self._check_usable()
        async with self._daemon_calls():
            known = await self._control.addresses_of(peer)
        return list(map(str, usable_addresses(peer, (f"{text}/p2p/{peer}" for text in known))))

    async def bytes_relayed_by(self, peer: PeerId) -> int:
        self._check_usable()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                return await self._control.bytes_relayed_by(peer)
        except (P2PDaemonError, OSError, EOFError, TimeoutError) as error:
            logger.debug("peer %s is no relay: %r", peer, error)
            return 0

    async def listen(self, on_stream: OnStream) -> None:
        self._check_usable()
        before, self._inbound = self._inbound, Inbound(self._shortened(on_stream), self.door, self.peer)
        self.door.watch(self._streams)
        if before is not None:
            await before.close()
            return
        self._shortcuts.listen()
        async with self._daemon_calls():
            for protocol in self._shortcuts.protocols(self.door.protocol):
                await self.p2p.add_binary_stream_handler(protocol, self._on_stream)

    async def open_stream(self, peer: PeerId, addresses: Sequence[str] = ()) -> Libp2pStream:
        self._check_usable()
        if not is_peer_id(peer):
            raise unreachable(peer, self.door.protocol, "not a peer id")
        self.door.check(peer)
        self.door.watch(self._streams)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                named = usable_addresses(peer, addresses)
                chosen = await permitted(named, self._own) if self._is_wary else named
                await self._straighten(peer, chosen)
                protocols = self._shortcuts.protocols(self.door.protocol)
                opened = await self._control.open_stream(peer, chosen, protocols)
                stream = Libp2pStream(peer, *opened, self._streams)
                await self.door.call_enter(stream, self.peer)
                if has_shortcuts(stream.protocol):
                    stream.turn = OpenersTurn(stream, self._shortcuts)
                return stream
        except TimeoutError:
            raise unreachable(peer, self.door.protocol, "no answer in time") from None
        except P2PDaemonError as error:
            self._check_usable()
            raise unreachable(peer, self.door.protocol, str(error)) from error
        except (OSError, EOFError) as error:
            self._check_usable()
            raise _mute_daemon() from error

    async def wait_failed(self) -> TransportError:
        await self._has_failed.wait()
        assert self._failure is not None
        return self._failure

    async def close(self) -> None:
        self._failure = self._failure or TransportError("This peer has left the network.")
        if self._inbound is not None:
            await self._inbound.close()
        await self.door.close()
        self._close_streams()
        self._watch.cancel()
        control = self.p2p._client.control
        await self.p2p.shutdown()
        await self._daemon.stop()
        await self._shortcuts.close()
        tasks = (self._watch, self.p2p._listen_task, control._read_task, control._write_task)
        await asyncio.gather(*(task for task in tasks if task), return_exceptions=True)

    def _shortened(self, on_stream: OnStream) -> OnStream:
        """`on_stream` for streams that may turn to a shortcut, now that their peer has been let in."""

        async def serve(stream: Stream) -> None:
            assert isinstance(stream, Libp2pStream)
            if has_shortcuts(stream.protocol):
                stream.turn = AcceptorsTurn(stream, self._shortcuts)
            await on_stream(stream)

        return serve

    async def _shortcut_hosts(self, peer: PeerId) -> list[str]:
        """The IP addresses at which `peer` is connected with, by no relay, and may be dialled again."""
        ways = [Address(way, peer) for way in await self._ways_to(peer) if not is_relayed([way])]
        chosen = worth_dialling(ways, self._own) if self._is_wary else ways
        return list(dict.fromkeys(ip for way in chosen if (ip := ip_of(way.path))))

    async def _ways_to(self, peer: PeerId) -> list[str]:
        """The other ends of the connections with `peer`."""
        own = peer_bytes(peer)
        return [end_of(known.addrs) for known in await self._connected() if known.id == own]

    async def _connected(self) -> Sequence[PeerInfo]:
        """The peers that the daemon has connections with."""
        self._check_usable()
        async with self._daemon_calls():
            return await self._control.connected()

    async def _join(self, peers: Sequence[Address]) -> None:
        """Connect to the initial peers, all at once: the first answer is enough to be in the swarm."""
        if not peers:
            return
        dialling = {asyncio.create_task(self._control.connect(peer.peer, [peer])) for peer in peers}
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                for fault in asyncio.as_completed(dialling):
                    if not await fault:
                        break
                else:
                    raise TimeoutError
            await asyncio.wait(dialling, timeout=SETTLE_TIME)
        except TimeoutError:
            named = "The initial peer" if len(peers) == 1 else "None of the initial peers"
            verb = "cannot" if len(peers) == 1 else "can"
            raise PeerUnreachable(
                f"{named} {', '.join(map(str, peers))} {verb} be reached.",
                "Check that it is running and that its address and port are right and open to this machine.",
            ) from None
        finally:
            for task in dialling:
                task.cancel()
            await asyncio.gather(*dialling, return_exceptions=True)

    async def _straighten(self, peer: PeerId, addresses: Sequence[Address]) -> None:
        """Let the daemon try for a straight connection with a peer behind relays, where that may succeed.

        It does so when a relayed connection begins; one that carries streams is let be.
        """
        if self._punching is None or not is_relayed([address.path for address in addresses]):
            return
        ways = await self._ways_to(peer)
        if any(stream.peer == peer for stream in self._streams):
            return
        if not self._punching.is_due(peer, ways, time.monotonic()):
            return
        try:
            async with asyncio.timeout(DIAL_TIMEOUT):
                await self._begin_anew(peer, addresses)
        except TimeoutError:
            logger.debug("peer %s does not answer through a relay", peer)

    async def _begin_anew(self, peer: PeerId, addresses: Sequence[Address]) -> None:
        await self._control.disconnect(peer)
        if await self._control.connect(peer, addresses):
            return
        for _ in range(PUNCH_LOOKS):
            if is_straight(await self._ways_to(peer)):
                logger.debug("connected straight with peer %s", peer)
                return
            await asyncio.sleep(PUNCH_PERIOD)

    async def _on_stream(
        self, source: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        peer = PeerId(source.peer_id.to_base58())
        stream = Libp2pStream(peer, source.proto, reader, writer, self._streams)
        if self._inbound is None or self._failure is not None:
            stream.close()
        else:
            self._inbound.accept(stream)

    async def _watch_daemon(self) -> None:
        code = await self._daemon.wait()
        self._failure = TransportError(
            f"The libp2p daemon of this peer died (exit code {code}).",
            "Start this peer again; if it keeps happening, look for lack of memory or open files.",
        )
        self._has_failed.set()
        self._close_streams()

    def _close_streams(self) -> None:
        for stream in list(self._streams):
            stream.close()

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise self._failure

    @asynccontextmanager
    async def _daemon_calls(self) -> AsyncIterator[None]:
        """Turn what goes wrong between this process and its daemon into a `TransportError`."""
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                yield
        except (P2PDaemonError, OSError, EOFError, TimeoutError) as error:
            self._check_usable()
            raise _mute_daemon() from error


async def _relays_enough(transport: Libp2pTransport, host_maddrs: Sequence[str]) -> bool:
    """Whether a daemon that is to relay does so: it starts two relays, and the last one counts, which may be
    the one that ends connections after two minutes."""
    paths = [text.rpartition("/p2p/")[0] for text in await transport.addresses()]
    paths += [path.replace("/ip4/0.0.0.0/", "/ip4/127.0.0.1/") for path in host_maddrs]
    asker = Identity.generate()
    async with await Libp2pTransport.start(
        asker, host_maddrs=(), routes_for_others=False, relaying=Relaying(uses=True)
    ) as probe:
        await probe._control.connect(transport.peer, [Address(path, transport.peer) for path in paths])
        return await probe.bytes_relayed_by(transport.peer) >= ENOUGH_BYTES


def _mute_daemon() -> TransportError:
    return TransportError("The libp2p daemon of this peer does not answer.", "Start this peer again.")
