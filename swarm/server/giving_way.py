"""Room for standbys: they have what nobody else wants, and go when somebody does.

Owns who may come, and who goes first. Knows seats and engines, nothing of copying.
"""

import logging
from collections.abc import Iterable, Sequence

from swarm.net.messages import Error
from swarm.page_keys import PAGE_TOKENS
from swarm.server.admission import refusal
from swarm.server.seat import Seat
from swarm.server.span_engine import SpanEngine

logger = logging.getLogger(__name__)

SPARE = 0.25
"""The part of all KV memory that standbys leave free."""

STANDBY_RETRY = 30.0
"""Seconds after which a server that had no room for a standby may have some."""


def refuse_standby(tokens: int, engine: SpanEngine) -> Error | None:
    """Why no standby of `tokens` tokens is opened on `engine`; None if one may be."""
    if not engine.can_hand_over:
        return refusal("bad_request", "This model keeps a state that is not copied.")
    if engine.kv_tokens_left - tokens < SPARE * engine.stats.kv_pages * PAGE_TOKENS:
        return refusal("no_capacity", "This server has no room for standbys now.", STANDBY_RETRY)
    return None


def giving_way(standbys: Sequence[int], tokens: int, left: int) -> int:
    """How many of the first `standbys`, promised so much each, must go for `tokens`, of which `left` fit.

    None go where that would not be enough.
    """
    for count in range(len(standbys) + 1):
        if left + sum(standbys[:count]) >= tokens:
            return count
    return 0


def standbys_of(seats: Iterable[Seat], engine: SpanEngine | None = None) -> list[Seat]:
    """The seats of standbys, or of those on `engine`; the ones that were in use last come last."""
    found = [
        seat
        for seat in seats
        if seat.hosted is not None
        and seat.hosted.engine is not None
        and seat.hosted.terms.is_standby
        and (engine is None or seat.hosted.engine is engine)
    ]
    return sorted(found, key=lambda seat: seat.used_at)


def tokens_of(standbys: Iterable[Seat]) -> list[int]:
    """Tokens of KV memory that each was promised, in whole pages."""
    promised = (seat.hosted.terms.max_tokens for seat in standbys if seat.hosted is not None)
    return [-(-tokens // PAGE_TOKENS) * PAGE_TOKENS for tokens in promised]


def make_room(seats: Iterable[Seat], engine: SpanEngine, tokens: int) -> None:
    """Let standbys go until `tokens` are promised to nobody, if that can be."""
    standbys = standbys_of(seats, engine)
    end_standbys(standbys[: giving_way(tokens_of(standbys), tokens, engine.kv_tokens_left)])


def free_pages(seats: Iterable[Seat], engine: SpanEngine) -> bool:
    """Let a standby go, since all pages are in use; whether there was one."""
    first = standbys_of(seats, engine)[:1]
    end_standbys(first)
    return bool(first)


def end_standbys(standbys: Iterable[Seat]) -> None:
    """Free their memory now; that their streams end tells the clients."""
    for seat in standbys:
        logger.info("standby %s of peer %s gives way", seat.session_id, seat.peer)
        if seat.hosted is not None:
            seat.hosted.evict()
        seat.stream.close()
