"""What is noted of a session's route: losses that grow, who took over, and when somebody is told."""

from swarm.client.changes import Change, Changes
from swarm.client.route import Hop
from swarm.dht.announcement import Announcement
from swarm.net.transport import PeerId
from swarm.spans import Span


def hop(name: str, span: Span) -> Hop:
    announcement = Announcement(peer=name, model_id="m", start=span.start, end=span.end, state="serving")
    return Hop(PeerId(name), span, announcement)


A, B, C, D = (hop(name, Span(2 * at, 2 * at + 2)) for at, name in enumerate("abcd"))


def test_more_may_be_lost_until_somebody_takes_over() -> None:
    changes, told = Changes(), list[tuple[Change, ...]]()
    changes.on_change = lambda: told.append(tuple(changes.all))
    changes.lost([A], "fell silent")
    changes.lost([A], "fell silent")
    changes.lost([A, B], "fell silent")
    assert changes.all[0].span == Span(0, 4)
    changes.taken([C, D])
    changes.lost([C], "fell silent")
    assert told == [
        (Change((A,), "fell silent"),),
        (Change((A, B), "fell silent"),),
        (Change((A, B), "fell silent", (C, D)),),
        (Change((A, B), "fell silent", (C, D)), Change((C,), "fell silent")),
    ]


def test_who_leaves_is_replaced_at_once() -> None:
    changes = Changes()
    changes.moved(A, "is about to leave", [B])
    changes.lost([B], "fell silent")
    assert [change.taken_by for change in changes.all] == [(B,), ()]
