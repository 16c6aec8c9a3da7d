"""What can go wrong with a hop, kept apart by whose fault it is.

Only a `RemoteFault` counts against a peer. `NoCapacity` passes with time or on another route, and
`RequestRefused` means that this client asked for something wrong.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from swarm.client.route import Hop, blocks_text, label
from swarm.client.text import printable
from swarm.errors import SwarmError
from swarm.net.calls import CallTimeout, Refused
from swarm.net.messages import Error
from swarm.net.transport import FrameError, PeerUnreachable, StreamClosed


class HopError(SwarmError):
    """A hop of a session did not do its part."""

    def __init__(self, hop: Hop, reason: str, hint: str):
        super().__init__(f"{label(hop.announcement)}, which serves {blocks_text(hop.span)}, {reason}.", hint)
        self.hop = hop
        self.reason = reason


class RemoteFault(HopError):
    """The peer is gone, too slow, or answers nonsense."""

    def __init__(self, hop: Hop, reason: str):
        super().__init__(hop, reason, "Try again: the next route avoids this peer where there is another.")


class Gone(RemoteFault):
    """The peer is gone, or says nothing: what it gave before is none the worse for that."""


class SessionLost(Gone):
    """The session ended at the peer: it is gone, or ended what was idle for long. A new session will tell."""


class NoCapacity(HopError):
    """The peer works but cannot take this now. `retry_after` is in seconds, None where waiting won't help."""

    def __init__(self, hop: Hop, reason: str, retry_after: float | None):
        super().__init__(hop, reason, "Try again in a little while.")
        self.retry_after = retry_after


class NoRoom(NoCapacity):
    """A session of this size does not fit beside the others at the peer; a smaller one may."""


class WarmingUp(NoCapacity):
    """The peer is loading its blocks, or has begun to now that it was asked."""


class RequestRefused(HopError):
    """The peer found the request wrong: a fault of this client, or of the way it was used."""

    advice = "The two may run versions of Swarm that do not fit together."

    def __init__(self, hop: Hop, reason: str):
        super().__init__(hop, reason, self.advice)


class NotAdmittedThere(RequestRefused):
    """The peer's operator does not let this client in."""

    advice = "Ask its operator to allow that id; with --identity FILE it stays the same."


class Misled(HopError):
    """What the peer holds may be wrong, by no fault of its own: one that gives wrong results made it."""

    def __init__(self, hop: Hop):
        super().__init__(hop, "holds what another server made that gave wrong results", "Try again.")


@contextmanager
def blaming(hop: Hop) -> Iterator[None]:
    """Turn what the network raises while talking to `hop` into one of the three kinds."""
    try:
        yield
    except Refused as refused:
        raise refusal(hop, refused.error) from refused
    except CallTimeout as timeout:
        raise Gone(hop, "did not answer in time") from timeout
    except PeerUnreachable as unreachable:
        raise Gone(hop, "cannot be reached") from unreachable
    except StreamClosed as closed:
        raise SessionLost(hop, "closed the connection") from closed
    except FrameError as broken:
        raise RemoteFault(hop, "sent something that is not of this protocol") from broken


def refusal(hop: Hop, error: Error) -> HopError:
    """What an error of that hop means."""
    said = printable(error.message).replace("\n", " ").strip().rstrip(".")
    if error.code == "warming_up":
        return WarmingUp(hop, "is still loading", error.retry_after)
    if error.code == "no_capacity":
        return NoRoom(hop, "has no room for another session", error.retry_after)
    if error.code == "draining":
        return NoCapacity(hop, "is about to leave", None)
    if error.code == "unknown_session":
        return SessionLost(hop, "has ended the session")
    if error.code == "bad_request":
        return RequestRefused(hop, f"refused the request: {said}")
    if error.code == "not_allowed":
        return NotAdmittedThere(hop, f"does not let this client in: {said}")
    return RemoteFault(hop, f"failed: {said}" if said else "failed")
