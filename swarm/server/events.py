"""What an operator sees of a server: lines for people, or with `--json` one object a line for programs.

Both go to standard output. Knows nothing of how a server works.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Protocol

from swarm.cli import OnProgress, Progress, emit
from swarm.dht.announcement import PeerState
from swarm.net.addresses import outward
from swarm.net.transport import PeerId
from swarm.server.invite import Invite
from swarm.spans import Span


class Events(Protocol):
    """Called in the order in which things happen."""

    def listening(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """The peer can be reached at these multiaddrs."""
        ...

    def metrics(self, url: str) -> None:
        """Metrics can be read there."""
        ...

    def phase(self, phase: PeerState, span: Span, progress: float, *, asleep: bool = False) -> None:
        """The phase, its blocks or, while joining, the loaded fraction is new; `asleep` if nothing loads."""
        ...

    def moving(self, span: Span, to: Span) -> None:
        """The blocks `to` are about to be served instead of `span`."""
        ...

    def model(self, name: str, *, is_first: bool) -> None:
        """Of several models, it is this one that is served, or is about to be."""
        ...


class JsonEvents:
    """One JSON object a line: `listening`, `joining` with progress, `serving`, `draining`, `left`.

    A server that was evicted says `joining` with `asleep`, and `joining` again when it loads. One that goes
    on to other blocks says `moving`, and `serving` once it serves them; in between it says `draining` and
    `joining` if it had to let go of the others first. One that is allowed several models says which by
    `model`.
    """

    def __init__(self, invite: Invite | None = None):
        self._invite = invite or Invite()

    def listening(self, peer: PeerId, addresses: Sequence[str]) -> None:
        shown = self._invite.shown(addresses)
        invitation = {} if shown is None else {"invitation": shown}
        emit({"event": "listening", "addresses": list(addresses), "peer": peer, **invitation})

    def metrics(self, url: str) -> None:
        emit({"event": "metrics", "url": url})

    def phase(self, phase: PeerState, span: Span, progress: float, *, asleep: bool = False) -> None:
        joining = {"progress": round(progress, 4)} if phase == "joining" else {}
        emit({"event": phase, "blocks": list(span), **joining, **({"asleep": True} if asleep else {})})

    def moving(self, span: Span, to: Span) -> None:
        emit({"event": "moving", "blocks": list(span), "to": list(to)})

    def model(self, name: str, *, is_first: bool) -> None:
        emit({"event": "model", "name": name})


class TextEvents:
    """Lines for people: how others join, then a bar for the loading, then each phase."""

    def __init__(
        self,
        model: str,
        span: Span | None,
        num_blocks: int,
        *,
        is_first: bool,
        invite: Invite | None = None,
    ):
        """`span` is None where the blocks are still to be chosen."""
        self._invite = invite or Invite()
        self._model = model
        self._span = span
        self._num_blocks = num_blocks
        self._is_first = is_first
        self._is_moving = False
        self._display = ExitStack()
        self._on_progress: OnProgress | None = None

    def listening(self, peer: PeerId, addresses: Sequence[str]) -> None:
        blocks = "blocks" if self._span is None else f"blocks {self._span}"
        _say(f"Peer {peer}, for {blocks} of {self._model}, which has {self._num_blocks}.")
        _say_where(addresses, self._invite)
        if self._is_first and addresses:
            self._say_how_to_join(best_address(addresses))

    def metrics(self, url: str) -> None:
        _say(f"Metrics: {url}")

    def phase(self, phase: PeerState, span: Span, progress: float, *, asleep: bool = False) -> None:
        if phase != "joining" or asleep or span != self._span:
            self._display.close()
            self._on_progress = None
        self._span = span
        self._is_moving = self._is_moving and phase == "draining"
        if self._is_moving:
            return
        if phase != "joining" or asleep:
            _say(ASLEEP if asleep else PHASES[phase].format(span))
            return
        if self._on_progress is None:
            bars = self._display.enter_context(Progress())
            self._on_progress = bars.stage(f"Loading blocks {span}")
        self._on_progress(progress)

    def moving(self, span: Span, to: Span) -> None:
        self._is_moving = True
        _say(f"Going on from blocks {span} to {to}, where the swarm needs them more.")

    def model(self, name: str, *, is_first: bool) -> None:
        if not is_first:
            self._is_moving = True
            _say(f"Going on with {name}, which needs this server more.")

    def _say_how_to_join(self, address: str) -> None:
        chosen = "" if self._span is None else f" --blocks {next_span(self._span, self._num_blocks)}"
        joining = self._invite.options(address)
        _say("This is a new swarm. Add a server to it:")
        _say(f"  python -m swarm.server --model {self._model}{chosen} {joining}")
        _say("Talk to the model:")
        _say(f"  python -m swarm.client chat --model {self._model} {joining}")


class LastingEvents:
    """What is seen of a server that goes on with other models: it listens once, and leaves once."""

    def __init__(self, events: Events):
        self._events = events
        self._model = ""
        self._goes_on = self._has_listened = False
        self._left: Span | None = None

    def listening(self, peer: PeerId, addresses: Sequence[str]) -> None:
        if not self._has_listened:
            self._events.listening(peer, addresses)
            self._events.model(self._model, is_first=True)
        self._has_listened, self._goes_on = True, False

    def metrics(self, url: str) -> None:
        self._events.metrics(url)

    def phase(self, phase: PeerState, span: Span, progress: float, *, asleep: bool = False) -> None:
        if phase == "left" and self._goes_on:
            self._left = span
        else:
            self._events.phase(phase, span, progress, asleep=asleep)

    def moving(self, span: Span, to: Span) -> None:
        self._events.moving(span, to)

    def model(self, name: str, *, is_first: bool) -> None:
        self._model, self._goes_on = name, not is_first
        if not is_first:
            self._events.model(name, is_first=False)

    def end(self) -> None:
        """It does not go on any more: if that was not seen yet, it has left."""
        if self._goes_on and self._left is not None:
            self._events.phase("left", self._left, 0.0)


class BootstrapEvents:
    """What is seen of a peer that serves no blocks: where it listens, and that it left."""

    def __init__(self, invite: Invite, *, as_json: bool):
        self._invite = invite
        self._as_json = as_json

    def listening(self, peer: PeerId, addresses: Sequence[str], *, is_first: bool) -> None:
        if self._as_json:
            JsonEvents(self._invite).listening(peer, addresses)
            return
        _say(f"Peer {peer} keeps the swarm joinable, and serves no blocks. Ctrl-C leaves the swarm.")
        _say_where(addresses, self._invite)
        if is_first and addresses:
            _say("This is a new swarm. Add a server to it:")
            _say(f"  python -m swarm.server {self._invite.options(best_address(addresses))}")

    def left(self) -> None:
        if self._as_json:
            emit({"event": "left"})
        else:
            _say(PHASES["left"])


PHASES: dict[PeerState, str] = {
    "serving": "Serving blocks {}. Ctrl-C leaves the swarm.",
    "draining": "Leaving: running steps may end. Ctrl-C again ends at once.",
    "left": "Left the swarm.",
}
ASLEEP = "Blocks let go. The next session loads them again."


def _say_where(addresses: Sequence[str], invite: Invite) -> None:
    _say("Addresses to join by:")
    for address in addresses:
        _say(f"  {address}")
    shown = invite.shown(addresses)
    if shown is not None:
        _say("Invitation:" if invite.key is None else "Invitation, by which whoever has it is a member:")
        _say(f"  {shown}")
    elif invite.key is not None and addresses:
        _say("This swarm is private. An invitation is made with:")
        _say(f"  python -m swarm.client invite {invite.options(best_address(addresses))}")


def _say(line: str) -> None:
    print(line, flush=True)


def best_address(addresses: Sequence[str]) -> str:
    """The address to tell others: the first one that leads here from another machine too, if any does."""
    return outward(addresses)[0]


def next_span(span: Span, num_blocks: int) -> Span:
    """The blocks that a swarm of one server lacks most: those after `span`, else before it, else the same."""
    if span.end < num_blocks:
        return Span(span.end, num_blocks)
    return Span(0, span.start) if span.start else span
