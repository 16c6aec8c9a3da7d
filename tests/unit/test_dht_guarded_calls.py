"""What the DHT's calls pass through, between peers in one process: seals, and limits on who calls much."""

from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from google.protobuf.wrappers_pb2 import BytesValue

from swarm.dht import guarded_calls
from swarm.dht.guarded_calls import CallRefused, GuardedCalls
from swarm.net.identity import Identity
from swarm.net.swarm_key import SwarmKey

RIGHT, WRONG = SwarmKey(b"r" * 32), SwarmKey(b"w" * 32)

Handler = Callable[[Any, Any], Awaitable[Any]]


class Id(str):
    def to_base58(self) -> str:
        return str(self)


class Wire:
    """Stands for hivemind's `P2P`s of some peers: bytes in, bytes out. `seen` is all that went over it."""

    def __init__(self) -> None:
        self.handlers: dict[tuple[str, str], tuple[Handler, Any]] = {}
        self.seen: list[bytes] = []

    def p2p(self, name: str) -> Any:
        own = Id(Identity.from_seed(name).peer)

        async def add(name: str, handler: Handler, kind: Any) -> None:
            self.handlers[own, name] = handler, kind

        async def remove(name: str) -> None:
            del self.handlers[own, name]

        async def call(peer: Id, name: str, message: Any, kind: Any) -> Any:
            if (peer, name) not in self.handlers:
                raise RuntimeError("protocols not supported")
            handler, taken = self.handlers[peer, name]
            question = message.SerializeToString()
            answer = await handler(taken.FromString(question), SimpleNamespace(remote_id=own))
            self.seen += [question, answer.SerializeToString()]
            return kind.FromString(self.seen[-1])

        return SimpleNamespace(
            peer_id=own,
            add_protobuf_handler=add,
            remove_protobuf_handler=remove,
            call_protobuf_handler=call,
        )


class Host:
    """Answers "ask" with what it was asked, twice; notes who asked."""

    def __init__(self, wire: Wire, key: SwarmKey | None = None):
        self.now = 0.0
        self.calls = GuardedCalls(wire.p2p("host"), key, lambda: self.now)
        self.callers: list[str | None] = []
        self.peer = self.calls.peer_id
        self.is_wronged = False

    async def answer(self, message: BytesValue, context: Any) -> BytesValue:
        assert context.remote_id == self.calls.caller()
        self.callers.append(self.calls.caller())
        if self.is_wronged:
            self.calls.blame_caller()
        return BytesValue(value=2 * message.value)


async def host_of(wire: Wire, key: SwarmKey | None = None) -> Host:
    host = Host(wire, key)
    await host.calls.add_protobuf_handler("ask", host.answer, BytesValue)
    return host


def guest_of(wire: Wire, key: SwarmKey | None = None, name: str = "guest") -> GuardedCalls:
    return GuardedCalls(wire.p2p(name), key, lambda: 0.0)


async def ask(guest: GuardedCalls, host: Host, data: bytes = b"secret") -> bytes:
    answer = await guest.call_protobuf_handler(host.peer, "ask", BytesValue(value=data), BytesValue)
    assert isinstance(answer, BytesValue)
    return answer.value


async def test_an_open_swarm_calls_plainly() -> None:
    host, guest = await host_of(wire := Wire()), guest_of(wire)
    assert await ask(guest, host) == b"secretsecret"
    assert host.callers == [guest.peer_id]
    assert host.calls.caller() is None
    assert BytesValue(value=b"secret").SerializeToString() in wire.seen


async def test_a_private_swarm_calls_under_seal() -> None:
    host, guest = await host_of(wire := Wire(), RIGHT), guest_of(wire, RIGHT)
    assert await ask(guest, host) == b"secretsecret"
    assert not any(b"secret" in said for said in wire.seen)
    await host.calls.remove_protobuf_handler("ask")
    assert not wire.handlers


async def test_another_key_is_answered_with_nothing_and_noticed() -> None:
    host, guest = await host_of(wire := Wire(), RIGHT), guest_of(wire, WRONG)
    with pytest.raises(CallRefused, match="another swarm key"):
        await ask(guest, host)
    assert wire.seen[-1] == b""
    assert not host.callers
    assert guest.refused_by == {host.peer}


@pytest.mark.parametrize(("theirs", "own"), [(RIGHT, None), (None, RIGHT)])
async def test_with_and_without_a_key_do_not_meet(theirs: SwarmKey | None, own: SwarmKey | None) -> None:
    host, guest = await host_of(wire := Wire(), theirs), guest_of(wire, own)
    with pytest.raises(RuntimeError, match="not supported"):
        await ask(guest, host)
    assert await guest.speaks(host.peer, "ask", privately=theirs is not None)
    assert not await guest.speaks(host.peer, "ask", privately=own is not None)
    assert not await guest.speaks(guest.peer_id, "ask", privately=True)


@pytest.mark.parametrize("said", [b"", b"x", bytes(40), b"\n\x06secret"])
async def test_what_a_stranger_says_is_not_read(said: bytes) -> None:
    host = await host_of(wire := Wire(), RIGHT)
    stranger = wire.p2p("stranger")
    raw = guarded_calls._Raw
    answer = await stranger.call_protobuf_handler(host.peer, "swarm-private::ask", raw(said), raw)
    assert answer.data == b""
    assert not host.callers


async def test_a_sealed_question_cannot_be_sent_again_by_another() -> None:
    host, guest = await host_of(wire := Wire(), RIGHT), guest_of(wire, RIGHT)
    await ask(guest, host)
    question, answer = wire.seen
    raw = guarded_calls._Raw
    replayed = await wire.p2p("stranger").call_protobuf_handler(
        host.peer, "swarm-private::ask", raw(question), raw
    )
    assert replayed.data == b""

    async def repeat(message: Any, context: Any) -> Any:
        return raw(answer)

    wire.handlers[host.peer, "swarm-private::ask"] = repeat, raw
    with pytest.raises(CallRefused):
        await ask(guest, host)


async def test_who_calls_too_often_waits_and_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarded_calls, "CALLS_AT_ONCE", 3)
    monkeypatch.setattr(guarded_calls, "CALLS_PER_SECOND", 1.0)
    host, guest = await host_of(wire := Wire()), guest_of(wire)
    for _ in range(3):
        await ask(guest, host)
    with pytest.raises(CallRefused, match="too often"):
        await ask(guest, host)
    await ask(guest_of(wire, name="another"), host)
    host.now = 1.0
    await ask(guest, host)


async def test_who_says_too_much_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarded_calls, "BYTES_AT_ONCE", 2000)
    monkeypatch.setattr(guarded_calls, "BYTES_PER_SECOND", 1000.0)
    host, guest = await host_of(wire := Wire()), guest_of(wire)
    await ask(guest, host, bytes(1500))
    with pytest.raises(CallRefused, match="too often"):
        await ask(guest, host, bytes(1500))
    host.now = 1.1
    await ask(guest, host, bytes(1500))
    with pytest.raises(CallRefused, match="bytes"):
        await ask(guest, host, bytes(guarded_calls.MAX_CALL_BYTES))


async def test_who_brings_nonsense_is_not_listened_to_for_a_while() -> None:
    host, guest = await host_of(wire := Wire()), guest_of(wire)
    host.is_wronged = True
    for _ in range(guarded_calls.FAULTS_AT_ONCE):
        await ask(guest, host)
    with pytest.raises(CallRefused, match="wrong records"):
        await ask(guest, host)
    host.is_wronged = False
    await ask(guest_of(wire, name="another"), host)
    host.now = 1 / guarded_calls.FAULTS_PER_SECOND
    await ask(guest, host)


async def test_nobody_is_blamed_outside_a_call() -> None:
    host = await host_of(Wire())
    for _ in range(2 * guarded_calls.FAULTS_AT_ONCE):
        host.calls.blame_caller()
