"""What a server takes from the directory in order to know where it is needed: who holds what, now and soon.

Pure functions of announcements. Must not know how places are compared, nor how sessions travel.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from swarm.dht.announcement import Announcement, Mobility, Throughput
from swarm.net.transport import PeerId
from swarm.server.placement import Holder, turn
from swarm.spans import Span


@dataclass(frozen=True)
class Standing:
    """The servers of a model but one: those that have decided on their blocks, and who has not."""

    holders: tuple[Holder, ...]
    undecided: tuple[Holder, ...]


def standing(
    announcements: Iterable[Announcement],
    peer: PeerId,
    token_bytes: int,
    *,
    gone: Collection[PeerId] = (),
    unwilling: Collection[PeerId] = (),
) -> Standing:
    """All servers but `peer` and those that are `gone`, as `peer` is to count with them.

    Who goes elsewhere counts there already. If that is not decided yet, and it is `peer`'s turn before, it
    counts where it still is. Nobody else is to ask the `unwilling` to move.
    """
    holders, undecided = [], []
    for one in announcements:
        if one.peer == peer or one.peer_id in gone:
            continue
        if one.state == "joining" and one.undecided:
            undecided.append(_holder(one, one.span, token_bytes))
        elif one.goes_to is not None and (not one.undecided or turn(one.peer) < turn(peer)):
            holders.append(_holder(one, Span(*one.goes_to), token_bytes))
        elif one.state in ("joining", "serving"):
            may_move = one.goes_to is None and one.peer_id not in unwilling
            known = _holder(one, one.span, token_bytes)
            holders.append(
                replace(
                    known,
                    serves=one.state == "serving",
                    may_fill=may_move and one.mobility != "fixed",
                    may_improve=may_move and one.mobility == "free",
                    serves_on=one.serves_on,
                )
            )
    return Standing(tuple(holders), tuple(undecided))


def strength(rates: Throughput, span: Span, token_bytes: int) -> float:
    """(token, block) pairs a second of a server of `span`, where each token that it passes on takes
    `token_bytes`: it computes no faster than its network lets tokens through."""
    if rates.network <= 0:
        return rates.decode
    return min(rates.decode, rates.network / token_bytes * span.size)


def mobility(
    demands: Sequence[tuple[Span, int]],
    others: Iterable[Announcement],
    form: tuple[str, str],
    *,
    can_hand_over: bool,
) -> Mobility:
    """What a server may change its blocks for that has sessions with these `demands` in blocks and tokens.

    It can go if `others` serve those blocks with room for the tokens. That is free of cost for the sessions
    if the others compute in the same `form`, dtype and quantisation, so that what is held can be handed over;
    where it has to be computed again, only a hole is worth it.
    """
    staying = [one for one in others if one.state == "serving" and one.goes_to is None]
    alike = [one for one in staying if (one.dtype, one.quantization) == form]
    if not demands or (can_hand_over and _have_room(alike, demands)):
        return "free"
    return "settled" if _have_room(staying, demands) else "fixed"


def _have_room(servers: Sequence[Announcement], demands: Sequence[tuple[Span, int]]) -> bool:
    blocks = {block for span, _ in demands for block in span.blocks}
    return all(
        sum(one.kv_tokens_left for one in servers if block in one.span.blocks)
        >= sum(tokens for span, tokens in demands if block in span.blocks)
        for block in blocks
    )


def _holder(one: Announcement, span: Span, token_bytes: int) -> Holder:
    return Holder(one.peer, span, strength(one.throughput, span, token_bytes), serves=False)
