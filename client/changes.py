"""What became of a session's route: which hops were lost or have left, and who took their blocks.

Owns the list, and tells its owner of every news. Knows hops; how they are replaced it must not know.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from swarm.client.route import Hop
from swarm.spans import Span


@dataclass(frozen=True)
class Change:
    """The hops `gone` of a session are replaced by `taken_by`, or by nobody yet.

    `reason` says why, as what the first of them did: "closed the connection".
    """

    gone: tuple[Hop, ...]
    reason: str
    taken_by: tuple[Hop, ...] = ()

    @property
    def span(self) -> Span:
        return Span(self.gone[0].span.start, self.gone[-1].span.end)


class Changes:
    """The changes of one session's route, `all` in turn; only of the last one the end may be to come.

    `on_change` is called whenever there is news.
    """

    def __init__(self) -> None:
        self.all: list[Change] = []
        self.on_change: Callable[[], None] = lambda: None

    def lost(self, gone: Sequence[Hop], reason: str) -> None:
        """Nobody has these hops' blocks. Until somebody takes them, more may be lost with them."""
        change = Change(tuple(gone), reason)
        if self.all and not self.all[-1].taken_by:
            if self.all[-1] == change:
                return
            self.all.pop()
        self._tell(change)

    def taken(self, hops: Sequence[Hop]) -> None:
        """`hops` have taken what was lost last."""
        self._tell(replace(self.all.pop(), taken_by=tuple(hops)))

    def moved(self, gone: Hop, reason: str, hops: Sequence[Hop]) -> None:
        """`hops` have taken over from one that is still there."""
        self._tell(Change((gone,), reason, tuple(hops)))

    def _tell(self, change: Change) -> None:
        self.all.append(change)
        self.on_change()
