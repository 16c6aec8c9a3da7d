"""What stands between the DHT and the network: who may call, how much, and in a private swarm under seal.

`GuardedCalls` is hivemind's `P2P` as far as its DHT uses that. A call that comes in is weighed before it is
read: a peer that calls too often, says too much at once, or brings records that no honest peer would is not
listened to for a while. In a private swarm a call is opened first, which only works for who has the key; a
stranger's is answered with nothing. Does not know what is called for.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from swarm.allowance import Allowance
from swarm.errors import SwarmError
from swarm.net.sealing import Call, Seal, SealBroken
from swarm.net.swarm_key import SwarmKey
from swarm.net.transport import PeerId

logger = logging.getLogger(__name__)

PRIVATE_PREFIX = "swarm-private::"
"""Before the names of calls in private swarms: peers of others are told at once that there are none such."""

CALLS_PER_SECOND, CALLS_AT_ONCE = 500.0, 4_000
"""A server of a deep model that announces itself twice a second and reads as often makes 400 a second."""

BYTES_PER_SECOND, BYTES_AT_ONCE = 512 * 1024.0, 4 * 1024 * 1024
MAX_CALL_BYTES = 1024 * 1024
"""Bytes of one call: of records with good signatures, so many are checked within half a second."""

FAULTS_PER_SECOND, FAULTS_AT_ONCE = 0.5, 20
"""Records that an honest peer would not have passed on."""

PROBE_TIMEOUT = 2.0

_REFUSED = b""
"""What a call gets that is not sealed with the swarm's key; a sealed answer is longer."""

_caller: ContextVar[PeerId | None] = ContextVar("caller", default=None)


class CallRefused(SwarmError):
    """The peer is not listened to now, or does not listen to this one."""


class _Raw:
    """Bytes in the place of one of hivemind's messages, which are packed and unpacked here instead."""

    def __init__(self, data: bytes):
        self.data = data

    def SerializeToString(self) -> bytes:
        return self.data

    @staticmethod
    def FromString(data: bytes) -> "_Raw":
        return _Raw(data)


class GuardedCalls:
    """The calls of one peer, `p2p` being hivemind's way to others."""

    def __init__(
        self,
        p2p: Any,
        key: SwarmKey | None,
        now: Callable[[], float] = time.monotonic,
        correct: Callable[[Any, Any], None] = lambda message, sender: None,
    ):
        """`correct` takes out of a message that came what its sender, as hivemind knows it, may not say."""
        self.peer_id = p2p.peer_id
        self.refused_by: set[PeerId] = set()
        """Peers of a private swarm with another key."""
        self._p2p = p2p
        self._seal = Seal(key) if key is not None else None
        self._own = PeerId(p2p.peer_id.to_base58())
        self._now = now
        self._correct = correct
        self._calls = Allowance(CALLS_PER_SECOND, CALLS_AT_ONCE)
        self._bytes = Allowance(BYTES_PER_SECOND, BYTES_AT_ONCE)
        self._faults = Allowance(FAULTS_PER_SECOND, FAULTS_AT_ONCE)

    @staticmethod
    def caller() -> PeerId | None:
        """The peer whose call is being answered where this is asked; None where none is."""
        return _caller.get()

    def blame_caller(self) -> None:
        """Hold it against the peer whose call is being answered, if there is one: it brought nonsense."""
        caller = _caller.get()
        if caller is not None:
            self._faults.take(caller, self._now())

    async def add_protobuf_handler(
        self, name: str, handler: Callable[..., Awaitable[Any]], input_protobuf_type: Any, **how: Any
    ) -> None:
        async def on_call(message: _Raw, context: Any) -> _Raw:
            caller = PeerId(context.remote_id.to_base58())
            self._weigh(caller, message.data)
            call = Call(name, caller, self._own)
            try:
                data = self._seal.open(call, message.data) if self._seal else message.data
            except SealBroken:
                logger.debug("peer %s called without the swarm's key", caller)
                return _Raw(_REFUSED)
            asked = input_protobuf_type.FromString(data)
            self._correct(asked, context.remote_id)
            with _called_by(caller):
                answer = await handler(asked, context)
            data = answer.SerializeToString()
            return _Raw(self._seal.close(call, data, answers=message.data) if self._seal else data)

        await self._p2p.add_protobuf_handler(self._named(name), on_call, _Raw, **how)

    async def remove_protobuf_handler(self, name: str, **how: Any) -> None:
        await self._p2p.remove_protobuf_handler(self._named(name), **how)

    async def call_protobuf_handler(self, peer: Any, name: str, message: Any, output_type: Any) -> Any:
        data = message.SerializeToString()
        if self._seal is not None:
            data = await self._call_sealed(self._seal, peer, name, data)
        else:
            data = (await self._p2p.call_protobuf_handler(peer, name, _Raw(data), _Raw)).data
        answer = output_type.FromString(data)
        self._correct(answer, peer)
        return answer

    async def speaks(self, peer: Any, name: str, *, privately: bool) -> bool:
        """Whether `peer` answers calls of that name, of private swarms or of others, in whatever way."""
        full = PRIVATE_PREFIX + name if privately else name
        try:
            async with asyncio.timeout(PROBE_TIMEOUT):
                await self._p2p.call_protobuf_handler(peer, full, _Raw(b""), _Raw)
        except Exception as error:  # hivemind has many for this, and all mean no
            logger.debug("peer %s does not answer %s: %r", peer, full, error)
            return False
        return True

    async def _call_sealed(self, seal: Seal, peer: Any, name: str, data: bytes) -> bytes:
        callee = PeerId(peer.to_base58())
        call = Call(name, self._own, callee)
        question = seal.close(call, data)
        answer = (await self._p2p.call_protobuf_handler(peer, self._named(name), _Raw(question), _Raw)).data
        try:
            opened = seal.open(call, answer, answers=question)
        except SealBroken:
            self.refused_by.add(callee)
            raise CallRefused(f"Peer {callee} has another swarm key.") from None
        self.refused_by.discard(callee)
        return opened

    def _named(self, name: str) -> str:
        return PRIVATE_PREFIX + name if self._seal else name

    def _weigh(self, caller: PeerId, data: bytes) -> None:
        """
        Raises:
            CallRefused: the caller has said too much, or too much that is wrong.
        """
        now = self._now()
        if self._faults.left(caller, now) < 1:
            raise CallRefused("You have brought too many wrong records.")
        if len(data) > MAX_CALL_BYTES:
            raise CallRefused(f"A call may have {MAX_CALL_BYTES} bytes.")
        if self._calls.take(caller, now) or self._bytes.take(caller, now, len(data)):
            raise CallRefused("You call too often.")


@contextmanager
def _called_by(caller: PeerId) -> Iterator[None]:
    token = _caller.set(caller)
    try:
        yield
    finally:
        _caller.reset(token)
