"""Findings about peers: those to join by, and the servers. Pure functions of what was seen."""

from collections.abc import Iterator, Sequence

from swarm.client.diagnose.finding import Finding, Level, milliseconds
from swarm.client.diagnose.seen import Fault, ModelSeen, PeerSeen, RecordsSeen, Seen
from swarm.client.route import Hop, NoRoute, blocks_text, label, missing_spans
from swarm.dht.announcement import Announcement
from swarm.net.addresses import Endpoint
from swarm.net.transport import PROTOCOL
from swarm.spans import Span
from swarm.version import VERSION


def about_initial_peers(peers: Sequence[PeerSeen]) -> Iterator[Finding]:
    """One for each. Where one of them answers, the swarm can be joined, and the others are no problem."""
    is_joined = any(peer.fault is None for peer in peers)
    for peer in peers:
        if peer.fault is None:
            yield Finding(
                "initial peer",
                "ok",
                _answers(peer),
                facts={"address": peer.name, "rtt_ms": _rtt_ms(peer)},
            )
        else:
            level: Level = "warning" if is_joined else "problem"
            cause, advice = explained(peer)
            yield Finding("initial peer", level, cause, advice, {"address": peer.name, "fault": peer.fault})


def _answers(peer: PeerSeen) -> str:
    if peer.rtt is None:
        return f"A peer listens at {peer.name}; which one was not asked, since another address leads to it."
    return f"{peer.name} answers{_in_time(peer)}."


def explained(peer: PeerSeen) -> tuple[str, str]:
    """What kept `peer` from being reached, and what to do about it."""
    where = _where(peer.at)
    host = peer.at.host if peer.at else "its machine"
    faults: dict[Fault, tuple[str, str]] = {
        "malformed": (
            f"'{peer.name}' is not the address of a peer.",
            peer.detail or "Copy the one that the server prints when it starts.",
        ),
        "unresolved": (
            f"The name {host} leads to no IP address.",
            "Check how it is spelled, and that this machine can look up names.",
        ),
        "no_way": (
            f"No way leads from this machine to {where}.",
            "Check this machine's connection, and whether it has the same version of IP.",
        ),
        "silent": (
            f"Nothing comes back from {where}.",
            "Check that the machine is on, and that its firewall and its router let that port in.",
        ),
        "refused": (
            f"Nobody listens on {where}.",
            "Check that the server runs, and its port: without --port it has another one after each start.",
        ),
        "not_a_peer": (
            f"What answers on {where} is no peer of this kind of swarm.",
            "Check the port, and that no proxy answers in the server's place.",
        ),
        "another_peer": (
            f"On {where} peer {peer.detail or 'of another id'} answers instead of {peer.peer}.",
            "Take the address that the server prints now: without --identity it is another peer after each"
            " start.",
        ),
        "other_protocol": (
            f"{peer.name} does not speak {PROTOCOL}.",
            f"Check that it is a server, and bring it to version {VERSION} of swarm, which runs here.",
        ),
        "no_connection": (
            f"A peer is there on {where}, but no connection to {peer.name} came about in time.",
            "Try again; if that does not help, restart the server and look at what it says with --verbose.",
        ),
        "mute": (
            f"{peer.name} can be connected to, but does not answer.",
            "It may be overloaded: try again, and look at what it says with --verbose.",
        ),
    }
    assert peer.fault is not None, "there is nothing to explain"
    return faults[peer.fault]


def about_records(records: RecordsSeen) -> Iterator[Finding]:
    error = records.error
    facts = {"peers": records.peers, "ms": round(records.seconds * 1000, 3)}
    if error is not None:
        yield Finding("records", "problem", error.message, error.hint, facts)
    elif not records.written:
        yield Finding(
            "records",
            "problem",
            "No peer accepted a record from this machine.",
            "Check that this machine's clock is right, and try again.",
            facts,
        )
    elif not records.was_read:
        yield Finding(
            "records",
            "problem",
            "A record was written, and was not there when it was read again.",
            "Try again; peers that keep records may just have left.",
            facts,
        )
    else:
        kept = f"{records.peers} {'peer keeps' if records.peers == 1 else 'peers keep'} them"
        yield Finding(
            "records",
            "ok",
            f"Records can be written and read, both in {milliseconds(records.seconds)}; {kept}.",
            facts=facts,
        )


def about_models(seen: Seen) -> Iterator[Finding]:
    if seen.wanted is not None:
        yield Finding("model", "problem", seen.wanted.message, seen.wanted.hint)
    if seen.models is not None and not seen.models:
        yield Finding(
            "model",
            "problem",
            "No server of this swarm announces a model.",
            "Start one: python -m swarm.server --initial-peers ADDRESS.",
        )
    for model in seen.models or ():
        yield _about_model(model)
        if model.route is not None:
            yield from (_about_hop(hop, seen.servers.get(hop.peer)) for hop in model.route.hops)
        yield from _about_lost(model, seen)


def _about_model(model: ModelSeen) -> Finding:
    facts = {"model": model.name, "servers": len(model.servers)}
    if model.no_route is None:
        return Finding("model", "ok", f"{model.name} can be run: {model.route}.", facts=facts)
    is_coming = _is_coming(model, model.no_route)
    level: Level = "warning" if is_coming else "problem"
    return Finding("model", level, model.no_route.message, model.no_route.hint, facts)


def _is_coming(model: ModelSeen, reason: NoRoute) -> bool:
    """Whether the model can be run once those who load have done so, and those who sleep are woken."""
    lost = {server.peer for server in model.servers if server.state not in ("serving", "joining")}
    coming = [server for server in model.servers if server.peer not in lost]
    is_held = not missing_spans(coming, Span(0, model.num_blocks))
    return is_held and bool(reason.loading or reason.to_wake)


def _about_hop(hop: Hop, peer: PeerSeen | None) -> Finding:
    """A server on the route; no `peer` if it was not looked at, as one of very many."""
    said = hop.announcement
    answers = f"answers{_in_time(peer)}" if peer else "was not asked"
    return Finding(
        "server",
        "ok",
        f"{label(said)} serves {blocks_text(hop.span)} in {_form(said)} and {answers}.",
        facts={**_server_facts(said), "rtt_ms": _rtt_ms(peer) if peer else None},
    )


def _about_lost(model: ModelSeen, seen: Seen) -> Iterator[Finding]:
    """Servers that are announced and were not reached."""
    for server in model.servers:
        peer = seen.servers.get(server.peer_id)
        if peer is not None and peer.fault is not None:
            cause, advice = explained(peer)
            yield Finding(
                "server",
                "warning",
                f"{label(server)}, with {blocks_text(server.span)}, is not reached: {_lower(cause)}",
                advice,
                {**_server_facts(server), "fault": peer.fault},
            )


def _server_facts(said: Announcement) -> dict[str, object]:
    return {
        "peer": said.peer,
        "blocks": list(said.span),
        "state": said.state,
        "dtype": said.dtype,
        "quantization": said.quantization,
        "version": said.version,
    }


def _form(said: Announcement) -> str:
    return said.dtype if said.quantization == "none" else f"{said.dtype}, {said.quantization}"


def _where(at: Endpoint | None) -> str:
    if at is None:
        return "the way to it"
    host = f"[{at.host}]" if ":" in at.host else at.host
    return f"{host}, {at.protocol.upper()} port {at.port}"


def _in_time(peer: PeerSeen) -> str:
    return "" if peer.rtt is None else f" in {milliseconds(peer.rtt)}"


def _rtt_ms(peer: PeerSeen) -> float | None:
    return None if peer.rtt is None else round(peer.rtt * 1000, 3)


def _lower(sentence: str) -> str:
    """The sentence behind a colon: only what begins with a plain word gets a small letter."""
    first, _, rest = sentence.partition(" ")
    return (
        f"{first.lower()} {rest}"
        if first in ("Nothing", "Nobody", "No", "What", "On", "A", "The")
        else sentence
    )
